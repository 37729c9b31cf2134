"""A server on 127.0.0.1 that speaks the HTTP interface of the Hugging Face Hub, as far as its client needs it here.

Repositories are held in memory. Files of `LFS_FROM` bytes and more take the way of large files: a batch request, a PUT,
and a pointer in the commit. HF_ENDPOINT points the client here, and HF_HUB_DISABLE_XET=1 keeps it from asking for a
newer protocol.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LFS_FROM = 2000
"""Bytes of the smallest file that is uploaded as a large file."""
TOKEN = "hf_" + "x" * 34
READER = "hf_" + "r" * 34
"""A valid token of the same account that may only read."""
Answer = tuple[int, dict[str, str], bytes]


@dataclass(kw_only=True)
class Repo:
    """One repository: the files of each commit, newest last."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    is_private: bool = False
    is_gated: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, number: int = -1) -> str:
        number = range(len(self.commits))[number]
        return hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()

    def at(self, revision: str) -> int | None:
        """Return the number of the commit that a branch or a hash names."""
        if revision == "main":
            return len(self.commits) - 1
        return next((number for number in range(len(self.commits)) if self.sha(number) == revision), None)


class Hub(ThreadingHTTPServer):
    """The server. `repos` holds repositories by kind and id, and `asked` the method and path of each request."""

    daemon_threads = True

    def __init__(self, *, organisations: tuple[str, ...] = ("org",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.namespaces = ("me", *organisations)

    def environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """Return the variables that point the client here, with its cache in the directory `home`."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
               "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        return own | ({} if token is None else {"HF_TOKEN": token})

    def downloads(self) -> set[str]:
        """Return the paths of the files whose content was asked for."""
        return {path.split("/resolve/")[1].partition("/")[2] for method, path in self.asked
                if method == "GET" and "/resolve/" in path}  # fmt: skip

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    @contextmanager
    def serving(self) -> Iterator[Self]:
        """Serve in the background."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    """Answers each request by the first route whose pattern fits the path."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        body = self._body()
        status, headers, content = 404, {}, b"{}"
        for method, pattern, route in ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None and self.command in method.split():
                status, headers, content = route(self, body, **found.groupdict())
                break
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(content))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    @property
    def token(self) -> str | None:
        value = self.headers.get("Authorization", "")
        return value.removeprefix("Bearer ") or None

    @property
    def is_known(self) -> bool:
        return self.token in (TOKEN, READER)

    def found(self, kind: str, name: str) -> Repo | Answer:
        """Return a repository, or the answer of the Hub where it is missing, or private to others."""
        repo = self.server.repos.get((kind.rstrip("s"), name))
        if repo is None or (repo.is_private and not self.is_known):
            status = 404 if self.is_known else 401
            return status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        return repo


def answer(content: Any, status: int = 200, **headers: str) -> Answer:
    return status, {key.replace("_", "-"): value for key, value in headers.items()}, json.dumps(content).encode()


def whoami(handler: Handler, body: bytes) -> Answer:
    if not handler.is_known:
        return answer({"error": "Invalid credentials in Authorization header"}, 401,
                      X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
    own, *others = handler.server.namespaces
    return answer({"type": "user", "name": own, "orgs": [{"name": name} for name in others]})


def create(handler: Handler, body: bytes) -> Answer:
    given = json.loads(body)
    if not handler.is_known:
        return answer({"error": "Unauthorized"}, 401)
    owner = given.get("organization") or handler.server.namespaces[0]
    if owner not in handler.server.namespaces or handler.token == READER:
        message = f"You don't have the rights to create a model under the namespace {owner}"
        return answer({"error": message}, 403, X_Error_Message=message)
    name = f"{owner}/{given['name']}"
    url = {"url": f"{handler.server.url}/{name}", "name": name}
    if ("model", name) in handler.server.repos:
        return answer({"error": "You already created this model repo", **url}, 409)
    is_private = given.get("private", False) or given.get("visibility") == "private"
    handler.server.repos["model", name] = Repo(commits=[{".gitattributes": b""}], is_private=is_private)
    return answer(url)


def info(handler: Handler, body: bytes, kind: str, name: str, revision: str | None = None) -> Answer:
    repo = handler.found(kind, name)
    if not isinstance(repo, Repo):
        return repo
    number = repo.at(revision or "main")
    if number is None:
        return answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
    files = repo.commits[number]
    return answer({"id": name, "sha": repo.sha(number), "private": repo.is_private, "gated": repo.is_gated,
                   "siblings": [{"rfilename": path} for path in files], "tags": [], "downloads": 0})  # fmt: skip


def entry_of(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if len(content) >= LFS_FROM:
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def tree(handler: Handler, body: bytes, kind: str, name: str, revision: str, path: str | None = None) -> Answer:
    repo = handler.found(kind, name)
    if not isinstance(repo, Repo):
        return repo
    number = repo.at(revision)
    if number is None:
        return answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
    inside = f"{path}/" if path else ""
    found = [entry_of(each, content) for each, content in repo.commits[number].items() if each.startswith(inside)]
    if path and not found:
        return answer({"error": "no such entry"}, 404, X_Error_Code="EntryNotFound")
    return answer(found)


def paths_info(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> Answer:
    repo = handler.found(kind, name)
    if not isinstance(repo, Repo):
        return repo
    files = repo.commits[repo.at(revision) or 0]
    wanted = json.loads(body)["paths"]
    return answer([entry_of(path, files[path]) for path in wanted if path in files])


def preupload(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> Answer:
    repo = handler.found(kind, name)
    if not isinstance(repo, Repo):
        return repo
    files = [
        {"path": each["path"], "uploadMode": "lfs" if each["size"] >= LFS_FROM else "regular", "shouldIgnore": False}
        for each in json.loads(body)["files"]
    ]
    return answer({"files": files})


def batch(handler: Handler, body: bytes, name: str) -> Answer:
    objects = [
        {**each, "actions": {"upload": {"href": f"{handler.server.url}/large/{each['oid']}"}}}
        for each in json.loads(body)["objects"]
    ]
    return answer({"transfer": "basic", "objects": objects})


def put_large(handler: Handler, body: bytes, oid: str) -> Answer:
    if sha256(body) != oid:
        return answer({"error": "another content"}, 400)
    handler.server.large[oid] = body
    return answer({})


def commit(handler: Handler, body: bytes, kind: str, name: str, revision: str) -> Answer:
    repo = handler.found(kind, name)
    if not isinstance(repo, Repo):
        return repo
    if handler.token != TOKEN:
        return answer({"error": "Forbidden"}, 403)
    files = dict(repo.files)
    for line in body.splitlines():
        entry = json.loads(line)
        key, value = entry["key"], entry["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = handler.server.large[value["oid"]]
        elif key == "deletedFile":
            files.pop(value["path"], None)
    repo.commits.append(files)
    return answer({"commitUrl": f"{handler.server.url}/{name}/commit/{repo.sha()}", "commitOid": repo.sha(),
                   "success": True})  # fmt: skip


def resolve(handler: Handler, body: bytes, name: str, revision: str, path: str, kind: str = "models") -> Answer:
    repo = handler.found(kind or "models", name)
    if not isinstance(repo, Repo):
        return repo
    if repo.is_gated:
        return answer({"error": "gated"}, 403 if handler.is_known else 401, X_Error_Code="GatedRepo",
                      X_Error_Message=f"Access to model {name} is restricted")  # fmt: skip
    number = repo.at(revision)
    if number is None:
        return answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
    content = repo.commits[number].get(path)
    if content is None:
        return answer({"error": "no such entry"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.sha(number))
    is_large = len(content) >= LFS_FROM
    headers = {"ETag": f'"{sha256(content) if is_large else blob_id(content)}"', "X-Repo-Commit": repo.sha(number),
               "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}  # fmt: skip
    return 200, headers, content


def validate_yaml(handler: Handler, body: bytes) -> Answer:
    return answer({"errors": [], "warnings": []})


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+)"
KIND = r"/api/(?P<kind>models|datasets)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", rf"{KIND}/{NAME}", info),
    ("GET", rf"{KIND}/{NAME}/revision/(?P<revision>[^/]+)", info),
    ("GET", rf"{KIND}/{NAME}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", rf"{KIND}/{NAME}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("POST", rf"{KIND}/{NAME}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"{KIND}/{NAME}/commit/(?P<revision>[^/]+)", commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]+)", put_large),
    ("GET HEAD", rf"(?:/(?P<kind>datasets))?/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]

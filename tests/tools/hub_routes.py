"""The answers of the Hub's HTTP interface, for hub_server.py.

Repositories are held in memory. Files of `LFS_FROM` bytes and more take the way of large files: a batch request, a PUT,
and a pointer in the commit.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.hub_server import Handler

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


def answer(content: Any, status: int = 200, **headers: str) -> Answer:
    return status, {key.replace("_", "-"): value for key, value in headers.items()}, json.dumps(content).encode()


def whoami(handler: "Handler", body: bytes) -> Answer:
    if not handler.is_known:
        return answer({"error": "Invalid credentials in Authorization header"}, 401,
                      X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
    own, *others = handler.server.namespaces
    return answer({"type": "user", "name": own, "orgs": [{"name": name} for name in others]})


def create(handler: "Handler", body: bytes) -> Answer:
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


def info(handler: "Handler", body: bytes, kind: str, name: str, revision: str | None = None) -> Answer:
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


def tree(handler: "Handler", body: bytes, kind: str, name: str, revision: str, path: str | None = None) -> Answer:
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


def paths_info(handler: "Handler", body: bytes, kind: str, name: str, revision: str) -> Answer:
    repo = handler.found(kind, name)
    if not isinstance(repo, Repo):
        return repo
    files = repo.commits[repo.at(revision) or 0]
    wanted = json.loads(body)["paths"]
    return answer([entry_of(path, files[path]) for path in wanted if path in files])


def preupload(handler: "Handler", body: bytes, kind: str, name: str, revision: str) -> Answer:
    repo = handler.found(kind, name)
    if not isinstance(repo, Repo):
        return repo
    files = [
        {"path": each["path"], "uploadMode": "lfs" if each["size"] >= LFS_FROM else "regular", "shouldIgnore": False}
        for each in json.loads(body)["files"]
    ]
    return answer({"files": files})


def batch(handler: "Handler", body: bytes, name: str) -> Answer:
    objects = [
        {**each, "actions": {"upload": {"href": f"{handler.server.url}/large/{each['oid']}"}}}
        for each in json.loads(body)["objects"]
    ]
    return answer({"transfer": "basic", "objects": objects})


def put_large(handler: "Handler", body: bytes, oid: str) -> Answer:
    if sha256(body) != oid:
        return answer({"error": "another content"}, 400)
    handler.server.large[oid] = body
    return answer({})


def commit(handler: "Handler", body: bytes, kind: str, name: str, revision: str) -> Answer:
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


def resolve(handler: "Handler", body: bytes, name: str, revision: str, path: str, kind: str = "models") -> Answer:
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


def validate_yaml(handler: "Handler", body: bytes) -> Answer:
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

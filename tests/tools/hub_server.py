"""A server on 127.0.0.1 that speaks the HTTP interface of the Hugging Face Hub, as far as its client needs it here.

Its answers are in hub_routes.py. HF_ENDPOINT points the client here, and HF_HUB_DISABLE_XET=1 keeps the client from
asking for a newer protocol.
"""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tools.hub_routes import READER, ROUTES, TOKEN, Answer, Repo


class Hub(ThreadingHTTPServer):
    """The server. `repos` holds repositories by kind and id, and `asked` the method and path of each request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *, organisations: tuple[str, ...] = ("org",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.namespaces = ("me", *organisations)
        self._connections: list[socket.socket] = []

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
            self._stop()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Refuse connections, inside of `serving`."""
        self._stop()
        try:
            yield
        finally:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
            threading.Thread(target=self.serve_forever, daemon=True).start()

    def _stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self._connections:  # those that clients keep for their next request
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

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

"""Servers on 127.0.0.1 for WANDB_BASE_URL: one that takes runs, and several that fail."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Handler(BaseHTTPRequestHandler):
    """Answers each request with what `reply(path, body)` of its server returns: a status and a body."""

    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self.server.reply(self.path, body)
        if self.server.is_stuck:
            self.server.released.wait()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Answer every request with the same page. Once `is_stuck` is set, accept and never answer."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, status: int = 200, body: bytes = b"") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.is_stuck, self.released = False, threading.Event()
        self._answer = status, body

    def reply(self, path: str, body: bytes) -> tuple[int, bytes]:
        return self._answer

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""

    @contextmanager
    def serving(self) -> Iterator[Self]:
        """Serve in the background."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.released.set()
            self.shutdown()
            self.server_close()


class Takes(Server):
    """As much of wandb's server as it takes to receive a run: `rows` holds the history, `summary` its last figures."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def reply(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path.endswith("/graphql"):
            return 200, json.dumps({"data": self._query(json.loads(body))}).encode()
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            self.rows += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
            for line in files.get("wandb-summary.json", {}).get("content", []):
                self.summary |= json.loads(line)
        return 200, b"{}"

    def _query(self, query: dict[str, Any]) -> dict[str, Any]:
        name, given = query.get("operationName") or query["query"], query.get("variables") or {}
        project = {"id": "p", "name": "sae", "entity": {"id": "e", "name": "me"}}
        if "UpsertBucket" in name:
            run = {"id": "r", "name": given.get("name") or "r", "displayName": "run", "config": "{}", "sweepName": ""}
            return {"upsertBucket": {"bucket": run | {"historyLineCount": 0, "project": project}, "inserted": True}}
        if "RunResumeStatus" in name:
            return {"model": project | {"bucket": None}}
        if "CreateRunFiles" in name:
            files = [{"name": file, "uploadUrl": f"{self.url}/files/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        return {}


def refusing() -> str:
    """Return an address that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"

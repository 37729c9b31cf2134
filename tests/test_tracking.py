"""wandb never ends or hangs a run: what it does at the start, in the middle and at the end, against real sockets."""

import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sae_train.compose import compose_config
from sae_train.training import tracking
from sae_train.training.tracking import Dashboard, Wandb, build_dashboard
from tests.conftest import Command, changed, rows_run

KEY = "0123456789abcdef" * 3
"""Well-formed; no server has issued it."""
START_BOUND = 30.0
START = Callable[..., Dashboard]


@contextmanager
def answering(status: int, body: bytes = b"") -> Iterator[str]:
    """Yield the address of a server that answers every request with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def listening() -> Iterator[str]:
    """Yield the address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def refusing() -> str:
    """Return an address that refuses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[START]:
    """Return `start(**environment)`: the dashboard of a run in tmp_path, with nothing else of wandb's in the way."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "a run").mkdir()
    begun: list[Dashboard] = []
    config = compose_config(["tracking=wandb"])

    def build(**environment: str) -> Dashboard:
        for name, value in ({"HOME": str(tmp_path / "home")} | environment).items():
            monkeypatch.setenv(name, value)
        begun.append(build_dashboard(config, tmp_path / "a run"))
        return begun[-1]

    yield build
    for dashboard in begun:
        dashboard.close()


def offline_directories(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("a run/wandb/offline-run-*"))

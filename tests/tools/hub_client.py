"""A process that exports, pushes and loads SAEs with the Hub's client pointed at a server of the tests.

The client reads most of its environment when it is imported, so it runs in a process of its own. One process answers
many requests, because its imports take seconds.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    """The outcome of one request."""

    status: int
    stdout: str
    stderr: str
    value: Any


class Client:
    """The process. `client_of` starts it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def export(self, *arguments: str, token: str | None = None) -> Done:
        """Run `sae-export`."""
        return self._ask("export", list(arguments), token)

    def load(self, *arguments: str, token: str | None = None) -> Done:
        """Call `sae_train.load`. The value is `digest` of the SAE and its `config`."""
        return self._ask("load", list(arguments), token)

    def _ask(self, what: str, arguments: list[str], token: str | None) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, arguments, token]) + "\n")
        self._process.stdin.flush()
        return Done(*json.loads(self._process.stdout.readline()))


@contextmanager
def client_of(environment: dict[str, str]) -> Iterator[Client]:
    """Start the process with these variables, and end it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen([sys.executable, __file__], env={**kept, **environment, "PYTHONPATH": paths}, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        yield Client(process)
    finally:
        process.communicate()


def digest(sae: Any) -> str:
    """Return a hash of the bits of an SAE's tensors, and of its rule."""
    found = hashlib.sha256(f"{sae.inference} {sae.k}".encode())
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        found.update(getattr(sae, name).detach().numpy().tobytes())
    return found.hexdigest()


def _handle(what: str, arguments: list[str]) -> tuple[int, Any]:
    import sae_train
    from sae_train.cli.export import run_command
    from sae_train.errors import UserError

    if what == "export":
        return run_command(arguments), None
    try:
        sae = sae_train.load(*arguments)
    except UserError as error:
        sys.stderr.write(str(error))
        return error.status, None
    return 0, [digest(sae), sae.config]


def _serve() -> None:
    warnings.simplefilter("ignore")
    answers = sys.stdout
    for line in sys.stdin:
        what, arguments, token = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        stdout, stderr = io.StringIO(), io.StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr):
            status, value = _handle(what, arguments)
        answers.write(json.dumps([status, stdout.getvalue(), stderr.getvalue(), value]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

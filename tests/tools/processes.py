"""Runs in processes of their own: start, wait, kill, and read what they left."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.command_line import LAUNCHERS, QUIET, Outcome, changed
from tools.tiny_runs import tiny_run

Process = subprocess.Popen[str]

MORE = [
    "checkpoint.every_tokens=1024",
    "log_every=1024",
    "evaluate_every=4096",
    "aux_loss=aux_zipf",
    "dead_window=2048",
]


def run_directory(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what depends on the clock."""
    lines = (run_directory(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def weights(folder: Path) -> bytes:
    (file,) = run_directory(folder).glob("saes/*/sae.safetensors")
    return file.read_bytes()


def launch(
    folder: Path, n_ranks: int, arguments: list[str], variables: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start a run on so many ranks; `variables` are in the environment of the ranks, not in torchrun's."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | QUIET | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    launcher = [*launcher, "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    added = ["env", *(f"{name}={value}" for name, value in (variables or {}).items())] if variables else []
    run = [sys.executable, "-m", "sae_train", *changed(tiny_run(folder), *MORE, *arguments)]
    return subprocess.Popen(
        [*launcher, *added, *run],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> Outcome:
    text, _ = process.communicate(timeout=300)
    return Outcome(process.returncode, text, "")


def checkpoints(folder: Path) -> list[str]:
    found = (folder / "runs").glob("*/checkpoints/step_*")
    return sorted(path.name for path in found)


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """Return the process ids of torchrun's ranks, in rank order; each leads a session of its own."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            named = [text for text in variables if text.startswith(b"RANK=")]
            if named:
                found[int(named[0].removeprefix(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


def kill_after_progress(process: "subprocess.Popen[str]", folder: Path, chance: random.Random) -> bool:
    """kill -9 all processes a random moment after the next checkpoint appears; False if the run finished first."""
    before = checkpoints(folder)
    deadline = time.monotonic() + 240
    while checkpoints(folder) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.3))
    if process.poll() is not None:
        return False
    for killed in workers(process):
        os.kill(killed, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    return True


def wait_until(happened: Callable[[], bool], process: Process, *, within: float = 240) -> None:
    deadline = time.monotonic() + within
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)

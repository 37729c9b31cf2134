"""A signal in every long part of a run: status 75 in time, a line that says what is saved, the same bits in the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tools.command_line import LAUNCHERS, QUIET, changed
from tools.grid_world import free_port
from tools.processes import rows, run_directory, weights, workers
from tools.tiny_runs import rows_run, tiny_run

PREEMPTED = 75
GRACE = 30.0
"""Seconds that torchrun and most schedulers give."""
NOTHING = "nothing to save yet; the same command starts again"
SAVED = "saved at step"

SLOW = [
    "harvest.context_length=32",
    "harvest.contexts_per_forward=1",  # a forward pass costs its overhead: long phases on any machine
    "harvest.calibration_tokens=20_000",
    "harvest.pool_batches=32",
    "n_features=1024",
    "batch_tokens=256",
    "tokens=16384",
    "evaluation_tokens=3000",
    "evaluate_every=8192",
    "checkpoint.every_tokens=2048",
    "log_every=2048",
]
"""A run whose every phase lasts seconds."""


class Running:
    """A run in processes of its own, with what it says in files that can be read meanwhile."""

    def __init__(self, folder: Path, arguments: list[str], *, n_ranks: int = 1) -> None:
        self.folder, self.n_ranks, self._said = folder, n_ranks, folder / "said"
        variables = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | QUIET | {"OMP_NUM_THREADS": "1"}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        launcher = [*launcher, "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
        with self._said.open("w") as file:
            command = [*launcher, sys.executable, "-m", "sae_train", *arguments]
            self.process = subprocess.Popen(command, cwd=folder, env=variables, stdout=file, stderr=file,
                                            start_new_session=True)  # fmt: skip

    def said(self) -> str:
        return self._said.read_text()

    def wait_for(self, happened: Callable[[], bool], *, pause: float = 0.005, within: float = 200) -> bool:
        """Return once it has happened; False if the run ended before."""
        deadline = time.monotonic() + within
        while not happened() and time.monotonic() < deadline:
            if self.process.poll() is not None:
                return happened()
            time.sleep(pause)
        return happened()

    def ranks(self) -> list[int]:
        return [self.process.pid] if self.n_ranks == 1 else workers(self.process)

    def stop(self, number: signal.Signals, *, only_last: bool) -> None:
        """Send a signal to every rank, or to the last alone, and see that all of them leave with 75 in time."""
        ranks = self.ranks()
        began = time.monotonic()
        for rank in ranks[-1:] if only_last else ranks:
            os.kill(rank, number)
        self.process.wait(timeout=300)
        seconds, said = time.monotonic() - began, self.said()
        if self.n_ranks == 1:
            assert self.process.returncode == PREEMPTED, said
        else:  # torchrun reports whatever its workers exit with as 1
            assert self.process.returncode == 1, said
            assert "exitcode  : 75" in said
        assert seconds < GRACE
        assert f"stopped by {number.name}: " in said
        assert "sae_train/" not in said, "a traceback"

    def step(self) -> int | None:
        """Return the step that it says is saved; None where it says that nothing is."""
        (line,) = [line for line in self.said().splitlines() if "stopped by" in line]
        if NOTHING in line:
            return None
        step = int(line.split(SAVED)[1].split(";")[0].replace(",", ""))
        newest = sorted((run_directory(self.folder) / "checkpoints").iterdir())[-1]
        assert newest.name == f"step_{step:08d}"
        assert "the same command goes on" in line
        return step


class Moment(NamedTuple):
    """A phase, and how to see from outside that a run is in it."""

    name: str
    is_there: Callable[[Running], bool]
    more: tuple[str, ...] = ()


def shows(text: str) -> Callable[[Running], bool]:
    return lambda run: text in run.said()


def has(pattern: str) -> Callable[[Running], bool]:
    return lambda run: any(run.folder.glob(pattern))


MOMENTS = [
    Moment("loading", has("runs/*/config.yaml")),
    Moment("calibration", shows("calibrating scale and centre: ")),
    Moment("first step", shows("training:   0%")),
    Moment("harvest", lambda run: "training: " in run.said()),
    Moment("checkpoint", has("runs/*/checkpoints/tmp-step_*"), ("checkpoint.beside=true",)),
    Moment("evaluation", lambda run: '"step": 32,' in "".join(map(Path.read_text, run.folder.glob("runs/*/*.jsonl")))),
    Moment("thresholds", shows("training: 100%")),
    Moment("export", has("runs/*/saes/*")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_ranks", "turn"),
    [(1, 0), pytest.param(2, 1, marks=pytest.mark.multirank)],
)
def test_a_signal_in_every_phase(tmp_path: Path, n_ranks: int, turn: int) -> None:
    """One run, stopped in each phase by SIGTERM and SIGUSR1 by turns, ends as one that nobody stopped."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    uninterrupted = Running(whole, changed(tiny_run(whole), *SLOW), n_ranks=n_ranks)
    arguments = changed(tiny_run(torn), *SLOW)
    for number, moment in enumerate(MOMENTS, start=turn):
        name = (signal.SIGTERM, signal.SIGUSR1)[number % 2]
        for _ in range(6):
            run = Running(torn, [*arguments, *moment.more], n_ranks=n_ranks)
            assert run.wait_for(lambda run=run, moment=moment: moment.is_there(run), pause=0.001), run.said()
            if run.process.poll() is None:
                break
            (run_directory(torn) / "summary.json").unlink()  # the export was too quick: it is made again
        run.stop(name, only_last=number % 4 > 1)
        check(moment.name, run, torn)
    last = Running(torn, arguments, n_ranks=n_ranks)
    assert last.process.wait(timeout=300) == 0, last.said()
    assert uninterrupted.process.wait(timeout=300) == 0, uninterrupted.said()
    assert weights(torn) == weights(whole)
    assert rows(torn) == rows(whole)


def check(phase: str, run: Running, folder: Path) -> None:
    step = run.step()
    if phase in ("loading", "calibration"):
        assert step is None
        assert not list(folder.glob("runs/*/checkpoints/step_*"))
    elif phase == "first step":
        assert step is not None
        assert step <= run.n_ranks
    elif phase == "evaluation":
        assert step == 32
    elif phase in ("thresholds", "export"):
        assert step == 64
    assert not list(folder.glob("runs/*/saes/*/sae.json")) or phase == "export"


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_lone_command_listens_before_anything_heavy_is_imported(tmp_path: Path, name: str) -> None:
    run = Running(tmp_path, rows_run(tmp_path))
    assert run.wait_for(lambda: listens(run.process.pid), pause=0.001)
    assert not any(line.endswith("libtorch_cpu.so") for line in mapped(run.process.pid))
    run.stop(signal.Signals[name], only_last=False)
    assert run.step() is None
    assert not (tmp_path / "runs").exists()


def mapped(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


def test_a_rank_that_waits_for_the_others_leaves_at_sigterm(tmp_path: Path) -> None:
    """In the middle of a call into C++, where no handler of Python's runs."""
    port = free_port()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | QUIET | place
    process = subprocess.Popen([sys.executable, "-m", "sae_train", *rows_run(tmp_path)], cwd=tmp_path, env=variables,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while f":{port:04X} " not in listeners() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert f"stopped by SIGTERM: {NOTHING}" in said


def listeners() -> str:
    return "".join(Path(f"/proc/net/{table}").read_text() for table in ("tcp", "tcp6"))

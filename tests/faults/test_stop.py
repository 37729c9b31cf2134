"""Told to stop, at any moment, once or ten times: one checkpoint, status 75; the same command goes on bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_train.errors import Preempted
from sae_train.ranks.interface import Pending, Solo
from sae_train.training.signals import BOTH, NONE, REQUEUE, SAVE, WISHES, Agreement, requeue
from tools.command_line import Outcome
from tools.processes import checkpoints, finish, launch, rows, run_directory, wait_until, weights, workers

PREEMPTED = 75
Process = subprocess.Popen[str]

LISTENER = """
import os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: os._exit(9))  # submitit's, say
from sae_train.training import signals
from sae_train.ranks.interface import Solo

assert "wandb" not in sys.modules
signals.listen()
signals.listen()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
agreement = signals.Agreement(Solo())
seen = [agreement.poll()]
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
    seen.append(signals.wish())
seen += [agreement.poll(), agreement.poll(), agreement.settle(), agreement.now()]
print(*seen)
print(agreement.preempted(step=1234) if agreement.wish else "")
"""


@pytest.mark.parametrize(
    ("signals", "wishes", "named"),
    [
        ([], [], None),
        (["SIGTERM"], [SAVE], "SIGTERM"),
        (["SIGUSR1"], [REQUEUE], "SIGUSR1"),
        (["SIGUSR2", "SIGUSR1"], [REQUEUE, REQUEUE], "SIGUSR1"),
        (["SIGUSR2", "SIGTERM"], [REQUEUE, BOTH], "SIGTERM"),
        (["SIGTERM", "SIGTERM", "SIGUSR2"], [SAVE, SAVE, BOTH], "SIGTERM"),
    ],
)
def test_signals_are_noted_and_the_gravest_counts(signals: list[str], wishes: list[int], named: str | None) -> None:
    done = subprocess.run([sys.executable, "-c", LISTENER, *signals], capture_output=True, text=True, check=True)
    gravest = max([NONE, *wishes])
    seen, message = done.stdout.split("\n")[:2]
    assert [int(word) for word in seen.split()] == [NONE, *wishes, NONE, gravest, gravest, gravest]
    expected = f"stopped by {named}: saved at step 1,234; the same command goes on." if named else ""
    assert message == expected


def test_a_signal_while_python_ends_changes_nothing() -> None:
    """Python restores the default handlers on its way out, and SIGTERM comes just then: `scontrol requeue` sends it."""
    late = """
import ctypes, os, signal, sys
from sae_train.training import signals
signals.listen()
class Last:
    def __del__(self, kill=ctypes.CDLL(None).kill, me=os.getpid(), numbers=[int(n) for n in signals.WISHES]):
        for number in numbers:
            kill(me, number)
sys.modules["kept to the end"] = Last()
sys.exit(75)
"""
    assert subprocess.run([sys.executable, "-c", late]).returncode == PREEMPTED
    released = late.replace("signals.listen()", "signals.listen(); signals.release()")
    assert subprocess.run([sys.executable, "-c", released]).returncode in [-number for number in WISHES]


def test_handlers_are_light() -> None:
    light = "import sys, sae_train.training.signals; assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True)


class Together(Solo):
    """Two ranks of one process, whose reductions come to the larger of both."""

    def __init__(self, values: list[int]) -> None:
        super().__init__()
        self.values = values

    def begin_max(self, value: int) -> Pending:
        return super().begin_max(max(value, self.values.pop(0)))


def test_all_hear_of_it_one_step_later() -> None:
    of_another = [NONE, 2 * (SAVE * 256 + signal.SIGTERM), NONE, NONE]
    agreement = Agreement(Together(of_another))
    assert [agreement.poll() for _ in range(3)] == [NONE, NONE, SAVE]
    assert agreement.settle() == SAVE
    stopped = agreement.preempted(step=2)
    assert isinstance(stopped, Preempted)
    assert stopped.status == PREEMPTED
    assert str(stopped).startswith("stopped by SIGTERM: saved at step 2;")


Scontrol = Callable[..., Path]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    """Return `scontrol(show=, status=, error=)`: put a tool of that name first in PATH; returns what it was asked."""

    def make(*, show: str | None = "", status: int = 0, error: str = "") -> Path:
        tool, asked = tmp_path / "scontrol", tmp_path / "asked"
        asked.write_text("")
        answer = "" if show is None else f'case "$*" in *show*) echo "{show}"; exit 0;; esac'
        tool.write_text(f"#!/bin/sh\necho \"$@\" >> {asked}\n{answer}\necho '{error}' >&2\nexit {status}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return asked

    return make


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_JOB_ID": "77"}, "77"),
        ({"SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "80", "SLURM_ARRAY_TASK_ID": "3"}, "80_3"),
    ],
)
def test_requeue_names_the_job(scontrol: Scontrol, environment: dict[str, str], job: str) -> None:
    asked = scontrol()
    assert requeue(REQUEUE, environment) is None
    assert asked.read_text() == f"requeue {job}\n"


@pytest.mark.parametrize(
    ("wish", "show", "requeued"),
    [
        (NONE, "", False),
        (SAVE, "JobId=77 JobState=RUNNING Reason=None", False),
        (BOTH, "JobId=77 JobState=COMPLETING Reason=None", False),
        (BOTH, "JobId=77 JobState=COMPLETING Reason=TimeLimit", True),
    ],
)
def test_after_sigterm_only_the_time_limit_requeues(scontrol: Scontrol, wish: int, show: str, requeued: bool) -> None:
    """What SLURM 22.05 was seen to say of jobs that got SIGUSR2, then were cancelled or ran out of time."""
    asked = scontrol(show=show)
    assert requeue(wish, {"SLURM_JOB_ID": "77"}) is None
    assert ("requeue 77\n" in asked.read_text()) == requeued


def test_requeue_without_a_job_or_without_luck(
    tmp_path: Path, scontrol: Scontrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert requeue(REQUEUE, {}) is None
    scontrol(status=1, error="slurm_requeue error: Requested operation is presently disabled")
    refused = requeue(REQUEUE, {"SLURM_JOB_ID": "77"})
    assert refused is not None
    assert "presently disabled. To go on, submit the job again" in refused
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    missing = requeue(REQUEUE, {"SLURM_JOB_ID": "77"})
    assert missing is not None
    assert "scontrol requeue 77` failed: " in missing
    assert "submit the job again" in missing


def test_a_job_that_slurm_says_nothing_of_is_left_and_that_is_said(scontrol: Scontrol) -> None:
    asked = scontrol(show=None, status=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    said = requeue(BOTH, {"SLURM_JOB_ID": "77"})
    assert said is not None
    assert "`scontrol show job 77` failed: slurm_load_jobs error: Unable to contact" in said
    assert "If the job's time was up, submit the job again" in said
    assert "requeue" not in asked.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return `whole(n_ranks)`: the folder of a run that nobody stopped."""
    made: dict[int, Path] = {}

    def get(n_ranks: int) -> Path:
        if n_ranks not in made:
            made[n_ranks] = tmp_path_factory.mktemp(f"whole{n_ranks}")
            done = finish(launch(made[n_ranks], n_ranks, []))
            assert done.status == 0, done.stdout
        return made[n_ranks]

    return get


def locked(folder: Path) -> bool:
    """Whether the run has its directory: the first thing it writes, before any activation."""
    return any(folder.glob("runs/*/config.yaml"))


def check_stopped(done: Outcome, folder: Path, name: str) -> int:
    """Return the step that a stopped run says it saved; that is its newest checkpoint and nothing is half written."""
    assert done.status == PREEMPTED, done.stdout
    assert "sae_train/" not in done.stdout  # no traceback but torchrun's own
    (said,) = [line for line in done.stdout.splitlines() if f"stopped by {name}: saved at step" in line]
    step = int(said.split("saved at step ")[1].split(";")[0].replace(",", ""))
    assert checkpoints(folder)[-1] == f"step_{step:08d}"
    assert not list(folder.glob("runs/*/checkpoints/tmp-*"))
    return step


def check_same_end(torn: Path, whole: Path, n_ranks: int) -> None:
    last = finish(launch(torn, n_ranks, []))
    assert last.status == 0, last.stdout
    assert "resuming at step" in last.stdout
    assert weights(torn) == weights(whole)
    assert rows(torn) == rows(whole)
    assert len(list((run_directory(torn) / "checkpoints").iterdir())) == 2  # checkpoint.keep


@pytest.mark.slow
def test_two_signals_in_quick_succession(tmp_path: Path, whole: Callable[[int], Path]) -> None:
    chance = random.Random(5)
    process = launch(tmp_path, 1, [])
    wait_until(lambda: bool(checkpoints(tmp_path)), process)
    time.sleep(chance.uniform(0, 0.2))
    process.send_signal(signal.SIGTERM)
    time.sleep(chance.uniform(0, 0.05))
    process.send_signal(signal.SIGUSR2)
    done = finish(process)
    check_stopped(done, tmp_path, "SIGTERM")
    check_same_end(tmp_path, whole(1), 1)


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_one_of_two_ranks(tmp_path: Path, whole: Callable[[int], Path], rank: int) -> None:
    process = launch(tmp_path, 2, [])
    wait_until(lambda: bool(checkpoints(tmp_path)), process)
    os.kill(workers(process)[rank], signal.SIGTERM)
    done = finish(process)
    assert done.status == 1, done.stdout  # as torchrun reports whatever its workers exit with
    assert "exitcode  : 75" in done.stdout
    check_stopped(Outcome(PREEMPTED, done.stdout, ""), tmp_path, "SIGTERM")
    check_same_end(tmp_path, whole(2), 2)


def test_sigint_in_generated_code_ends_with_the_same_status(tmp_path: Path) -> None:
    """Python notes an interrupt of code that was given as text, as imports do it, and ends by SIGINT for it."""
    (tmp_path / "interrupted.py").write_text(
        "from sae_train.cli import process\n"
        "def run(_):\n"
        "    try:\n"
        "        exec('raise KeyboardInterrupt')\n"
        "    except KeyboardInterrupt:\n"
        "        return process.INTERRUPTED\n"
        "process.run_and_exit(run)\n"
    )
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, check=False)
    assert done.returncode == 130


def test_sigint_still_interrupts(tmp_path: Path) -> None:
    process = launch(tmp_path, 1, [])
    wait_until(lambda: locked(tmp_path), process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.status == 130
    assert "Interrupted. The same command goes on" in done.stdout

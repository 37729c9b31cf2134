"""Stopping on a signal: what a rank was asked, what all ranks agree on, and what SLURM is told afterwards.

A handler only takes note. It raises nothing, so it may come at any moment, twice or ten times, and leaves nothing half
done: the ranks agree, finish the step, write one checkpoint and leave with status 75. SIGTERM is how a scheduler takes
a machine back, or how somebody cancels a job: the run is saved, and whoever sent the signal decides about the rest.
SIGUSR1 and SIGUSR2 are what `sbatch --signal` sends before the time is up: the run is saved and the job put back into
the queue, unless a SIGTERM comes, too: then somebody has cancelled it. Only the SIGTERM of the time that is up takes
nothing back. SIGINT stays Python's. Light: imports no torch, so that the handlers are there before anything heavy is.
"""

import atexit
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING

from sae_train.errors import Preempted
from sae_train.place import job_id

if TYPE_CHECKING:
    from sae_train.verbs import Pending, Ranks

NONE, REQUEUE, SAVE = 0, 1, 2
WISHES = {signal.SIGTERM: SAVE, signal.SIGUSR1: REQUEUE, signal.SIGUSR2: REQUEUE}
SLURM_ANSWERS_WITHIN = 60.0
ABOUT_THE_END = 10.0
"""Seconds before SLURM_JOB_END_TIME from which on a SIGTERM may be that of the time limit."""
_SHIFT = 256
"""A wish and the signal that brought it travel as one number, wish * _SHIFT + signal: the gravest is the largest."""

_noted = NONE


def listen() -> None:
    """Take note of SIGTERM, SIGUSR1 and SIGUSR2 from here on, in place of whoever did before. Main thread only."""
    if threading.current_thread() is threading.main_thread():
        atexit.unregister(_ignore)
        atexit.register(_ignore)
        for number in WISHES:
            signal.signal(number, _note)


def release() -> None:
    """Let these signals end this process again: for a rank that has failed and waits for its launcher to end it."""
    atexit.unregister(_ignore)
    for number in WISHES:
        signal.signal(number, signal.SIG_DFL)


def _ignore() -> None:
    """Let no late signal change the exit status: while it ends, Python brings back the defaults, but not over this."""
    for number in WISHES:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _: FrameType | None) -> None:
    global _noted
    if wish() == REQUEUE and number == signal.SIGTERM and _time_is_up():
        return
    _noted = max(_noted, WISHES[signal.Signals(number)] * _SHIFT + number)


def _time_is_up() -> bool:
    """Whether the SLURM job is at its time limit."""
    try:
        return time.time() > int(os.environ["SLURM_JOB_END_TIME"]) - ABOUT_THE_END
    except (KeyError, ValueError):
        return False


def wish() -> int:
    """Return the gravest thing that this process was asked so far: NONE, REQUEUE or SAVE (and no more)."""
    return _noted // _SHIFT


class Agreement:
    """What the ranks were asked, all together; no step waits for it.

    `poll` begins a reduction and returns what the one before it came to. So every rank hears of a signal at the same
    step, one step after the first rank noticed it. All ranks call these methods in the same order.

    Attributes:
        wish: the gravest wish that is agreed on, NONE, REQUEUE or SAVE.
    """

    def __init__(self, ranks: "Ranks") -> None:
        self._ranks = ranks
        self._open: Pending | None = None
        self._agreed = NONE

    @property
    def wish(self) -> int:
        return self._agreed // _SHIFT

    def poll(self) -> int:
        """Return what is agreed on, and ask all ranks again. Once a step."""
        agreed = self.settle()
        self._open = self._ranks.begin_max(_noted)
        return agreed

    def settle(self) -> int:
        """Wait for the open question, if there is one, and return what is agreed on."""
        if self._open is not None:
            pending, self._open = self._open, None
            self._agreed = max(self._agreed, pending.result())
        return self.wish

    def now(self) -> int:
        """Ask all ranks and wait for the answer. Between long pieces of work, never in a step."""
        self.poll()
        return self.settle()

    def preempted(self, *, step: int) -> Preempted:
        """Return what to raise on every rank once step `step` is saved; no question may be open."""
        name = signal.Signals(self._agreed % _SHIFT).name
        return Preempted(f"stopped by {name}: saved at step {step:,}; the same command goes on.")


def requeue(environment: Mapping[str, str] = os.environ) -> str | None:
    """Put this SLURM job back into its queue. The first rank's last act, after REQUEUE; SLURM then ends the job.

    Returns:
        What went wrong and what to do, for the user; None if it worked or there is no job.
    """
    job = job_id(environment)
    if job is None:
        return None
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True, text=True, errors="replace", timeout=SLURM_ANSWERS_WITHIN, check=False,
        )  # fmt: skip
        problem = (done.stderr or done.stdout).strip().replace("\n", "; ") or f"status {done.returncode}"
        if done.returncode == 0:
            return None
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    return f"`scontrol requeue {job}` failed: {problem}. Submit the job again: it goes on from the checkpoint."

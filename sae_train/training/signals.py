"""Stopping on a signal: what a rank was asked, what all ranks agree on, and what SLURM is told afterwards.

A handler only takes note. It raises nothing, so it may come at any moment, twice or ten times, and leaves nothing half
done: the ranks agree, finish the step, write one checkpoint and leave with status 75. Long loops between steps ask, too
(phases.py). SIGTERM is how a scheduler takes a machine back, or how somebody cancels a job: the run is saved, and
whoever sent the signal decides about the rest.
SIGUSR1 and SIGUSR2 are what `sbatch --signal` sends before the time is up: the run is saved and the job put back into
the queue. Where a SIGTERM comes, too, somebody has cancelled the job, or its time was up before it was saved: SLURM is
asked which. SIGINT stays Python's. Light: imports no torch, so that the handlers are there before anything heavy is.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING

from sae_train.errors import Preempted
from sae_train.ranks.launcher_env import job_id

if TYPE_CHECKING:
    from sae_train.ranks.interface import Pending, Ranks

NONE, REQUEUE, SAVE = 0, 1, 2
BOTH = REQUEUE | SAVE
WISHES = {signal.SIGTERM: SAVE, signal.SIGUSR1: REQUEUE, signal.SIGUSR2: REQUEUE}
SLURM_ANSWERS_WITHIN = 60.0
_SHIFT = 256
"""A wish and the signal that brought it travel as one number, wish * _SHIFT + signal: the gravest is the largest."""

NOTHING_SAVED = "nothing to save yet; the same command starts again."
NOTHING_NEW = "nothing to save yet; the same command starts again, or goes on from the last checkpoint."
"""Before it is known whether there is a checkpoint."""

_noted = NONE
_alarm: int | None = None
"""Where Python writes the number of each signal while a rank waits for the others; None once they have joined."""


def listen(*, joined: bool = True, rank: int = 0) -> None:
    """Take note of SIGTERM, SIGUSR1 and SIGUSR2 from here on, in place of whoever did before. Main thread only.

    Args:
        joined: false for one of several ranks that waits for the others, which no handler interrupts. A thread then
            ends this process at a SIGTERM, with status 75: there is nothing to save yet.
        rank: of this process, for the message.
    """
    if threading.current_thread() is threading.main_thread():
        atexit.unregister(_ignore)
        atexit.register(_ignore)
        _disarm()
        for number in WISHES:
            signal.signal(number, _note)
        if not joined:
            _arm(rank)


def release() -> None:
    """Let these signals end this process again: for a rank that has failed and waits for its launcher to end it."""
    _disarm()
    atexit.unregister(_ignore)
    for number in WISHES:
        signal.signal(number, signal.SIG_DFL)


def _arm(rank: int) -> None:
    """Have a thread watch for SIGTERM: it runs while the main thread waits in C code, where no handler runs."""
    global _alarm
    reader, _alarm = os.pipe()
    os.set_blocking(_alarm, False)
    signal.set_wakeup_fd(_alarm, warn_on_full_buffer=False)
    threading.Thread(target=_leave_at_sigterm, args=(reader, rank), name="sigterm", daemon=True).start()


def _disarm() -> None:
    """End that thread, if there is one."""
    global _alarm
    if _alarm is not None:
        signal.set_wakeup_fd(-1)
        os.close(_alarm)
        _alarm = None


def _leave_at_sigterm(reader: int, rank: int) -> None:
    while came := os.read(reader, 1):
        if came[0] == signal.SIGTERM:
            who = f"rank {rank}: " if rank else ""
            os.write(2, f"{who}stopped by SIGTERM: {NOTHING_SAVED}\n".encode())  # sys.stderr may be locked
            os._exit(Preempted.status)
    os.close(reader)


def _ignore() -> None:
    """Let no late signal change the exit status: while it ends, Python brings back the defaults, but not over this."""
    for number in WISHES:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _: FrameType | None) -> None:
    global _noted
    asked = wish() | WISHES[signal.Signals(number)]
    _noted = asked * _SHIFT + (signal.SIGTERM if asked & SAVE else number)


def wish() -> int:
    """Return the wish of the signals so far: NONE, REQUEUE, SAVE (and no more) or BOTH."""
    return _noted // _SHIFT


class Agreement:
    """What the ranks were asked, all together; no step waits for it.

    `poll` begins a reduction and returns what the one before it came to. So every rank hears of a signal at the same
    step, one step after the first rank noticed it. All ranks call these methods in the same order.

    With it each rank says whether it may have to harvest soon, in the lowest bit, which counts where nobody has a wish:
    the ranks then meet after a harvest, and none of them has to finish one before it stops.

    Attributes:
        wish: the gravest wish that is agreed on: NONE, REQUEUE, SAVE or BOTH.
        fills_soon: returns whether one of the next two steps may have to wait for this rank's harvest.
        may_fill: whether a rank may have to harvest for the coming step; the same on all ranks.
    """

    def __init__(self, ranks: "Ranks") -> None:
        self._ranks = ranks
        self._open: Pending | None = None
        self._agreed = NONE
        self.fills_soon: Callable[[], bool] = lambda: False
        self.may_fill = True  # nobody has said yet

    @property
    def wish(self) -> int:
        return self._agreed // _SHIFT

    def poll(self) -> int:
        """Return the wish that is agreed on, and start the next reduction. Called once a step. Collective."""
        agreed = self.settle()
        self._open = self._ranks.begin_max(2 * _noted + self.fills_soon())
        return agreed

    def settle(self) -> int:
        """Wait for the open reduction, if there is one, and return the wish that is agreed on. Collective."""
        if self._open is not None:
            pending, self._open = self._open, None
            noted, may_fill = divmod(pending.result(), 2)
            self._agreed, self.may_fill = max(self._agreed, noted), bool(may_fill)
        return self.wish

    def now(self) -> int:
        """Return the wish of all ranks as of now; waits for all of them, so never in a step. Collective."""
        self.poll()
        return self.settle()

    def preempted(self, *, step: int | None) -> Preempted:
        """Return the exception that every rank raises. No question to the other ranks may be open.

        Args:
            step: the newest step that is saved; None where there is none.
        """
        return _preempted(max(self._agreed, _noted), step=step)


def _preempted(noted: int, *, step: int | None) -> Preempted:
    saved = NOTHING_SAVED if step is None else f"saved at step {step:,}; the same command goes on."
    return Preempted(f"stopped by {_name(noted)}: {saved}")


def _name(noted: int) -> str:
    return signal.Signals(noted % _SHIFT).name


def leave_early() -> None:
    """Leave if this process, which is alone, was told to before it has begun a run; a SLURM job goes back if asked.

    Raises:
        Preempted: it was told to stop.
    """
    if wish():
        notice = requeue(wish())
        if notice:
            sys.stderr.write(f"{notice}\n")
        raise Preempted(f"stopped by {_name(_noted)}: {NOTHING_NEW}")


def requeue(asked: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Put this SLURM job back into its queue, if that was asked. The first rank's last act: SLURM then ends the job.

    After a SIGTERM it is done only where SLURM says that it was the time limit's: `scancel` is final.

    Returns:
        What went wrong and what to do, for the user; None if it worked, was not asked, or there is no job.
    """
    job = job_id(environment)
    if job is None or not asked & REQUEUE:
        return None
    again = "submit the job again: it goes on from the checkpoint."
    if asked & SAVE:
        done, said = _scontrol("--oneliner", "show", "job", job)
        if not done:
            return f"`scontrol show job {job}` failed: {said}. If the job's time was up, {again}"
        if "Reason=TimeLimit" not in said.split():
            return None
    done, said = _scontrol("requeue", job)
    return None if done else f"`scontrol requeue {job}` failed: {said}. To go on, {again}"


def _scontrol(*arguments: str) -> tuple[bool, str]:
    """Return whether SLURM's tool did as told, and what it said.

    SLURM signals every process of a job, once for the job and once for each step: the tool must not die of the second
    SIGTERM. It inherits our mask; what comes to this thread meanwhile is delivered afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WISHES)
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            capture_output=True, text=True, errors="replace", timeout=SLURM_ANSWERS_WITHIN, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    said = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()
    return done.returncode == 0, said.replace("\n", "; ") or f"status {done.returncode}"

"""Stopping on a signal: the wish of one rank, the agreement of all ranks, and the job's way back into SLURM's queue.

A handler only records the signal. It raises nothing, so it may run at any moment, twice or ten times, and leaves
nothing half done. The ranks agree, finish the step, write one checkpoint and leave with status 75. Long loops between
steps check for signals, too (phases.py).

A scheduler sends SIGTERM when it takes a machine back, or when somebody cancels a job. The run is saved, and the sender
decides about the rest. `sbatch --signal` sends SIGUSR1 or SIGUSR2 before the time is up. The run is saved, and the job
goes back into the queue. Where a SIGTERM follows, somebody has cancelled the job, or its time was up before it was
saved; SLURM's job record tells which. SIGINT stays Python's, except in a process that only calls this program
(`borrowed`).

Light: imports no torch, so that the handlers are there before anything heavy is.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

_received = NONE
_alarm: int | None = None
"""Where Python writes the number of each signal while a rank waits for the others; None once they have joined."""


def listen(*, joined: bool = True, rank: int = 0) -> None:
    """Record SIGTERM, SIGUSR1 and SIGUSR2 from here on, in place of earlier handlers. Main thread only.

    Args:
        joined: false for one of several ranks that waits for the others, because no handler interrupts that wait. A
            thread then ends this process at a SIGTERM, with status 75: there is nothing to save yet.
        rank: of this process, for the message.
    """
    if threading.current_thread() is threading.main_thread():
        atexit.unregister(_ignore)
        atexit.register(_ignore)
        _disarm()
        for number in WISHES:
            signal.signal(number, _receive)
        if not joined:
            _arm(rank)


def release() -> None:
    """Restore the default handlers, for a rank that has failed and waits for its launcher to end it."""
    _disarm()
    atexit.unregister(_ignore)
    for number in WISHES:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def borrowed() -> Iterator[None]:
    """Record signals inside the block, SIGINT among them, and put the process's own handlers back at its end.

    `sae_train.train` uses it, because the process and its handlers belong to the user. A second SIGINT goes to the
    process's own handler, which ends the run at once. Python delivers signals to the main thread alone, so in another
    thread this does nothing.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*WISHES, signal.SIGINT)}
    own = before[signal.SIGINT]

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _received
        if wish() and callable(own):
            own(number, frame)
        else:
            _received = SAVE * _SHIFT + signal.SIGINT

    _received = NONE
    try:
        listen()
        if callable(own):  # else the process ignores interrupts
            signal.signal(signal.SIGINT, interrupt)
        yield
    finally:
        atexit.unregister(_ignore)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _received = NONE


def is_interrupt() -> bool:
    """Return whether the signal that ends the run is SIGINT. Only a `borrowed` process records that one."""
    return _received % _SHIFT == signal.SIGINT


def _arm(rank: int) -> None:
    """Start a thread that watches for SIGTERM while the main thread waits in C code, where no handler runs."""
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
    """Ignore late signals, so that none changes the exit status. Python restores defaults at its end, but not this."""
    for number in WISHES:
        signal.signal(number, signal.SIG_IGN)


def _receive(number: int, _: FrameType | None) -> None:
    global _received
    asked = wish() | WISHES[signal.Signals(number)]
    _received = asked * _SHIFT + (signal.SIGTERM if asked & SAVE else number)


def wish() -> int:
    """Return the wish of the signals so far: NONE, REQUEUE, SAVE (and no more) or BOTH."""
    return _received // _SHIFT


class Agreement:
    """The gravest wish of all ranks. No step waits for it. `run.py` makes one, and `Stopping` calls it.

    `poll` begins a reduction and returns the result of the one before. So a signal takes effect on every rank at the
    same step, one step after the first rank received it. All ranks call these methods in the same order.

    The lowest bit of the reduced number says whether a rank may have to harvest soon. The ranks then meet after that
    harvest, and none of them has to finish one before it stops.

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
        self.may_fill = True  # until the first reduction

    @property
    def wish(self) -> int:
        return self._agreed // _SHIFT

    def poll(self) -> int:
        """Return the wish that is agreed on, and start the next reduction. Called once a step. Collective."""
        agreed = self.settle()
        self._open = self._ranks.begin_max(2 * _received + self.fills_soon())
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
        """Return the exception that every rank raises. No reduction may be open.

        Args:
            step: the newest step that is saved; None where there is none.
        """
        return _preempted(max(self._agreed, _received), step=step)


def _preempted(noted: int, *, step: int | None) -> Preempted:
    saved = NOTHING_SAVED if step is None else f"saved at step {step:,}; the same command goes on."
    return Preempted(f"stopped by {_name(noted)}: {saved}")


def _name(noted: int) -> str:
    return signal.Signals(noted % _SHIFT).name


def leave_early() -> None:
    """Leave if this process, which is alone, received a signal before it began a run. A SLURM job may be requeued.

    Raises:
        Preempted: it received one.
    """
    if wish():
        notice = requeue(wish())
        if notice:
            sys.stderr.write(f"{notice}\n")
        raise Preempted(f"stopped by {_name(_received)}: {NOTHING_NEW}")


def requeue(asked: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Put this SLURM job back into its queue, if a signal asked for that. SLURM then ends the job.

    The first rank calls it last of all. After a SIGTERM the job is requeued only where SLURM's record names the time
    limit: `scancel` is final.

    Returns:
        A notice for the user about what went wrong and what to do. None if it worked, was not asked, or there is no
        job.
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
    """Return whether SLURM's tool succeeded, and its output.

    SLURM signals every process of a job, once for the job and once for each step. The tool must not die of the second
    SIGTERM, so it inherits a mask. Signals to this thread are delivered afterwards.
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

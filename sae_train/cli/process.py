"""Exit statuses, error messages and the end of a process, for every command of this program.

| status | meaning |
|---|---|
| 0 | finished |
| 1 | a fault of this program (traceback), or a lost rank |
| 2 | an error of the user's (message) |
| 3 | stopped by the numbers |
| 75 | preempted and saved |
| 130 | interrupted |
"""

import io
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from sae_train.ranks.launcher_env import this_process
from sae_train.training import signals

BROKEN = 1
PREEMPTED = 75
INTERRUPTED = 130
FIRST_RANK_SPEAKS = 3.0
"""Seconds in which the first rank reports an error that all ranks have, before the launcher ends them all."""


def run_and_exit(command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command with the arguments of `sys.argv` and exit with its status. Each entry point is one such call."""
    show_all_text()
    status = command(sys.argv[1:])
    if this_process().size > 1:
        # Threads of a process group that was left may still end while Python does, and abort it (seen in four of ten
        # runs that had finished well). Nothing is left to do but to return the status.
        end_process(status)
    if status == INTERRUPTED:
        # Where SIGINT interrupted `exec` (dataclasses use it at imports), `python -m` ends itself by SIGINT at the end,
        # though the signal was caught. The next `exec` clears that state.
        exec("")
    sys.exit(status)


def show_all_text() -> None:
    """Make stdout and stderr write escapes, such as \\xe9, for characters outside of their encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_process(status: int) -> NoReturn:
    """End this process at once, without Python's own clean-up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def complain(message: str, *, everywhere: bool) -> None:
    """Print an error message to stderr.

    Args:
        message: the text for the user.
        everywhere: whether all ranks have this message, so that the first rank alone prints it.
    """
    rank = this_process().rank
    if rank:
        if not everywhere:
            signals.release()  # the launcher ends the other ranks by SIGTERM, which then asks for no save
        time.sleep(FIRST_RANK_SPEAKS)
        if everywhere:
            return
        message = f"rank {rank}: {message}"
    sys.stderr.write(f"{message}\n")

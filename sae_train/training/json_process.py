"""A child process that reads and writes JSON lines, and can neither block nor outlive its parent."""

import json
import os
import queue
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LONGEST_QUEUE = 10_000
"""Lines that wait for a child process that does not read; more are dropped."""
BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or SLURM sends to every process of a job. Only the parent acts on them."""
LOOKS_UP = 0.5
"""Seconds between two checks whether a wait is to be given up."""
LAST_WAIT = 2.0
"""Seconds that a killed process may take to be gone."""


class NoAnswer(Exception):
    """The child process did not answer in time, or it ended; the text is the reason."""


class JsonProcess:
    """A child process that ends when it is told to, or after its parent. It blocks the signals in `BLOCKED`.

    `tracking.Wandb` creates one for wandb. A thread writes, so that `send` returns at once.
    """

    def __init__(self, command: list[str], *, environment: dict[str, str]) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # child processes inherit it
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._buffer = b""
        self._lines: queue.Queue[bytes | None] = queue.Queue(maxsize=LONGEST_QUEUE)
        self.n_dropped = 0
        threading.Thread(target=self._write, daemon=True, name="json-process").start()

    def send(self, message: dict[str, Any]) -> None:
        """Queue one line; drop it where the queue is full."""
        try:
            self._lines.put_nowait(json.dumps(message, default=str).encode() + b"\n")
        except queue.Full:
            self.n_dropped += 1

    def answer(self, *, deadline: float, gives_up: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Return the next line of the process, as soon as it is there.

        Args:
            deadline: what `time.monotonic` returns when the wait is over.
            gives_up: asked every now and then; true ends the wait.

        Raises:
            NoAnswer: the deadline has passed, the wait was given up, or the process has ended.
        """
        begun = time.monotonic()
        while b"\n" not in self._buffer:
            if gives_up():
                raise NoAnswer("the run was told to stop")
            with selectors.DefaultSelector() as selector:
                selector.register(self._from, selectors.EVENT_READ)
                left = max(0.0, deadline - time.monotonic())
                if not selector.select(min(left, LOOKS_UP)):
                    if left <= LOOKS_UP:
                        raise NoAnswer(f"no answer within {max(0.0, deadline - begun):.0f} s")
                    continue
            read = os.read(self._from.fileno(), 1 << 16)
            if not read:
                raise NoAnswer(f"its process ended{self._how()}")
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kill the process, if it has not ended by itself."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WAIT)
        self._from.close()
        with suppress(queue.Full):  # else the thread is writing, and fails now
            self._lines.put_nowait(None)

    def _how(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(LAST_WAIT)
            return f" by {signal.Signals(-status).name}" if status < 0 else f" with status {status}"
        return ""

    def _write(self) -> None:
        """Write what is queued until `end`, or until the process does not read any more."""
        with suppress(OSError), self._to:
            while line := self._lines.get():
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._to.fileno(), rest) :]

"""A sign of life from every rank, so that the others do not wait for ever for one whose process or node is gone.

A collective cannot tell a dead rank from a slow one, and the launcher may be gone with the node. Here a thread of each
rank counts in a store that all ranks reach, whatever the main thread is busy with. The first rank reads everybody's
count and says in its own who is missing; the others read only the first rank's: all ranks together read and write
O(ranks) keys a beat. Time is what this process itself spent waiting, by the monotonic clock: a clock that jumps does
not matter, nor does a machine or a job that was suspended as a whole.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

DONE, STORE = "done", -1
STATUS = 1
GO_ON = "The same command goes on from the last checkpoint."


class Store(Protocol):
    """Keys and values that all ranks share. Any exception means: not reached."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> str | None:
        """Return the value, None where nobody has set it yet; does not wait for it."""


class _Heard:
    """What is known of one rank: its newest count, how often that was seen to change, and what it says."""

    def __init__(self) -> None:
        self.count: int | str | None = None
        self.changes, self.host, self.verdict, self.done = 0, "", "", False

    def note(self, facts: dict[str, Any]) -> None:
        self.changes += facts["count"] != self.count
        self.count, self.host, self.verdict = facts["count"], facts["host"], facts["verdict"]
        self.done = self.count == DONE


class Heartbeat:
    """Beats from `with` to its end; ends this process with status 1 when another rank stays silent.

    Use one for each group of processes, once they have joined. A rank that leaves the `with` without an error says that
    it is done, and nobody waits for its next beat; one that leaves with an error just stops beating.

    Args:
        store: a connection that nothing else uses.
        rank, size: who this process is, among how many.
        every: seconds between beats.
        patience: seconds of silence after which a rank is dead. All ranks have stopped five beats later at the latest.
        key: names this group's entries in the store.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, every: float = 3.0, patience: float = 45.0, key: str = "heartbeat"
    ) -> None:
        self._store, self._rank, self._size, self._key = store, rank, size, key
        self._every, self._patience = every, patience
        self._heard = {other: _Heard() for other in (range(1, size) if rank == 0 else [0])}
        self._rounds, self._trouble = 0, ""
        self._verdict, self._published = "", threading.Event()
        self._end, self._well = threading.Event(), False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._speak, self._watch)]

    def __enter__(self) -> "Heartbeat":
        if self._size > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close(well=kind is None)

    def close(self, *, well: bool = True) -> None:
        """Stop beating and watching.

        Args:
            well: this rank has done its part, and the others must not miss it.
        """
        self._well = well
        self._end.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=self._every)

    def _speak(self) -> None:
        """Beat and read until the end. Where the store fails or hangs, `_watch` counts the seconds."""
        count, pause = 0, self._every
        while not self._end.is_set() and not self._is_alone():
            count += 1
            try:
                self._say(count)
                self._listen()
                self._rounds, pause = self._rounds + 1, self._every
            except (RuntimeError, OSError) as error:  # of the store; torch prints a page each time, so not every beat
                self._trouble, pause = f" ({next(iter(str(error).splitlines()), repr(error))})", self._patience / 3
            self._end.wait(pause)
        if self._well:
            with suppress(RuntimeError, OSError):
                self._say(DONE)

    def _is_alone(self) -> bool:
        """Whether the first rank, which alone would listen, has left for good, and perhaps the store with it."""
        return self._rank > 0 and self._heard[0].done

    def _say(self, count: int | str) -> None:
        verdict = self._verdict
        facts = {"count": count, "host": socket.gethostname(), "verdict": verdict}
        self._store.set(f"{self._key}/{self._rank}", json.dumps(facts))
        if verdict:
            self._published.set()

    def _listen(self) -> None:
        for other, heard in self._heard.items():
            value = self._store.get(f"{self._key}/{other}")
            if value is not None:
                heard.note(json.loads(value))

    def _watch(self) -> None:
        """Add up the seconds since each rank and the store were last heard of; act when they are too many."""
        silent, seen = dict.fromkeys([STORE, *self._heard], 0.0), dict.fromkeys([STORE, *self._heard], 0)
        before = time.monotonic()
        while not self._end.wait(self._every / 2):
            now = time.monotonic()
            waited, before = min(now - before, self._every), now  # more than that: this process did not run either
            news = {STORE: self._rounds} | {other: heard.changes for other, heard in self._heard.items()}
            silent = {name: silent[name] + waited if news[name] == seen[name] else 0.0 for name in news}
            seen = news
            verdict = self._judge({name for name, seconds in silent.items() if seconds >= self._patience})
            if verdict:
                self._stop(verdict)

    def _judge(self, missing: set[int]) -> str:
        """Return why this process must stop, or nothing."""
        silence = f"not been heard of for {self._patience:g} s: "
        if self._rank and (self._heard[0].verdict or self._is_alone()):
            return self._heard[0].verdict
        if self._rank == 0 and STORE in missing:
            return f"the store in which the ranks meet has {silence}the launcher or its node is dead{self._trouble}."
        for other, heard in self._heard.items():
            if other in missing and not heard.done:
                host = f" (host {heard.host})" if heard.host else ""
                way = f"{self._trouble}" if self._rank else ""
                return f"rank {other}{host} has {silence}it or its node is dead{way}."
        return ""

    def _stop(self, verdict: str) -> None:
        """End this process, the main thread with it, wherever that waits. The first rank tells the others before."""
        if self._end.is_set():
            return
        with suppress(OSError):
            os.write(2, f"rank {self._rank} stops: {verdict} {GO_ON}\n".encode())  # sys.stderr may be locked
        if self._rank == 0:
            self._verdict = verdict
            if self._published.wait(2 * self._every):
                time.sleep(1.5 * self._every)  # they read it within that; the store may end with this process
        os._exit(STATUS)

"""A failure detector: no rank waits for ever for a rank whose process or node is gone.

A collective does not distinguish a dead rank from a slow one, and the launcher may be gone with the node. Here a thread
of each rank increments a counter in a store that all ranks reach, whatever the main thread does. The first rank reads
all counters and publishes which rank is missing; the others read only the first rank's entry. All ranks together read
and write O(ranks) keys a beat. A rank counts only the time that it spent waiting itself, by the monotonic clock, so a
clock that jumps or a job that is suspended as a whole does no harm.
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
    """Keys and values that all ranks share. Any exception means that the store is not reached."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> str | None:
        """Return the value, or None where no rank has set it. It does not wait."""


class _Peer:
    """The last entry of another rank: its counter, the changes seen of it, its host and its verdict."""

    def __init__(self) -> None:
        self.count: int | str | None = None
        self.changes, self.host, self.verdict, self.done = 0, "", "", False

    def note(self, facts: dict[str, Any]) -> None:
        self.changes += facts["count"] != self.count
        self.count, self.host, self.verdict = facts["count"], facts["host"], facts["verdict"]
        self.done = self.count == DONE


class Heartbeat:
    """Beats from `with` to its end. It ends this process with status 1 when another rank stays silent.

    `Processes` creates one once all processes have joined. A rank that leaves the `with` without an error publishes
    that it is done, and the others expect no further beat. A rank that leaves with an error just stops beating.

    Args:
        store: a connection that nothing else uses.
        rank, size: this process, and the number of processes.
        every: seconds between beats.
        patience: seconds of silence after which a rank counts as dead. All ranks stop within five beats after that.
        key: prefix of this group's entries in the store.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, every: float = 3.0, patience: float = 45.0, key: str = "heartbeat"
    ) -> None:
        self._store, self._rank, self._size, self._key = store, rank, size, key
        self._every, self._patience = every, patience
        self._peers = {other: _Peer() for other in (range(1, size) if rank == 0 else [0])}
        self._rounds, self._trouble = 0, ""
        self._verdict, self._published = "", threading.Event()
        self._end, self._well = threading.Event(), False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch)]

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
            well: this rank is done, so the others expect no further beat.
        """
        self._well = well
        self._end.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=self._every)

    def _beat(self) -> None:
        """Beat and read until the end. Where the store fails or hangs, `_watch` counts the seconds."""
        count, pause = 0, self._every
        while not self._end.is_set() and not self._is_alone():
            count += 1
            try:
                self._publish(count)
                self._read()
                self._rounds, pause = self._rounds + 1, self._every
            except (
                RuntimeError,
                OSError,
            ) as error:  # of the store; torch prints a page each time, so the next try comes late
                self._trouble, pause = f" ({next(iter(str(error).splitlines()), repr(error))})", self._patience / 3
            self._end.wait(pause)
        if self._well:
            with suppress(RuntimeError, OSError):
                self._publish(DONE)

    def _is_alone(self) -> bool:
        """Return whether the first rank, the only reader of this rank's entry, is done."""
        return self._rank > 0 and self._peers[0].done

    def _publish(self, count: int | str) -> None:
        verdict = self._verdict
        facts = {"count": count, "host": socket.gethostname(), "verdict": verdict}
        self._store.set(f"{self._key}/{self._rank}", json.dumps(facts))
        if verdict:
            self._published.set()

    def _read(self) -> None:
        for other, peer in self._peers.items():
            value = self._store.get(f"{self._key}/{other}")
            if value is not None:
                peer.note(json.loads(value))

    def _watch(self) -> None:
        """Add up the seconds since the last sign of each rank and of the store; stop when they exceed the patience."""
        silent, seen = dict.fromkeys([STORE, *self._peers], 0.0), dict.fromkeys([STORE, *self._peers], 0)
        before = time.monotonic()
        while not self._end.wait(self._every / 2):
            now = time.monotonic()
            waited, before = (
                min(now - before, self._every),
                now,
            )  # a longer wait means that this process was suspended, too
            news = {STORE: self._rounds} | {other: peer.changes for other, peer in self._peers.items()}
            silent = {name: silent[name] + waited if news[name] == seen[name] else 0.0 for name in news}
            seen = news
            verdict = self._judge({name for name, seconds in silent.items() if seconds >= self._patience})
            if verdict:
                self._stop(verdict)

    def _judge(self, missing: set[int]) -> str:
        """Return the reason why this process must stop, or an empty text."""
        silence = f"not been heard of for {self._patience:g} s: "
        if self._rank and (self._peers[0].verdict or self._is_alone()):
            return self._peers[0].verdict
        if self._rank == 0 and STORE in missing:
            return f"the store in which the ranks meet has {silence}the launcher or its node is dead{self._trouble}."
        for other, peer in self._peers.items():
            if other in missing and not peer.done:
                host = f" (host {peer.host})" if peer.host else ""
                way = f"{self._trouble}" if self._rank else ""
                return f"rank {other}{host} has {silence}it or its node is dead{way}."
        return ""

    def _stop(self, verdict: str) -> None:
        """End this process, whatever its main thread waits for. The first rank publishes the reason before."""
        if self._end.is_set():
            return
        with suppress(OSError):
            os.write(2, f"rank {self._rank} stops: {verdict} {GO_ON}\n".encode())  # sys.stderr may be locked
        if self._rank == 0:
            self._verdict = verdict
            if self._published.wait(2 * self._every):
                time.sleep(
                    1.5 * self._every
                )  # the others read it within that time; the store may end with this process
        os._exit(STATUS)

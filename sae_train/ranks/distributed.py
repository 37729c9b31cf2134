"""`Ranks` over torch.distributed and accelerate.

This is the only file that imports them. Algorithms receive a `Ranks` value (interface.py), so no algorithm tests
whether it is distributed.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import RankLost
from sae_train.ranks.heartbeat import Heartbeat
from sae_train.ranks.interface import Pending, Ranks, Solo
from sae_train.ranks.launcher_env import this_process

__all__ = ["Group", "Pending", "Processes", "Ranks", "Solo", "find_ranks", "leave"]

PATIENCE = timedelta(days=2)
"""Timeout of a collective. The launcher and the heartbeat notice a dead rank; a slow rank is waited for."""
JOINING = timedelta(minutes=10)
"""How long the ranks that have started wait for the others."""

LOST = ("Connection closed", "Connection reset", "Broken pipe", "Socket", "Timed out", "timed out", "unreachable")
"""Parts of gloo's messages about a broken connection, which are plain RuntimeErrors."""


class _Store:
    """A store of short texts that all ranks share, outside of the collectives. The first rank hosts it."""

    def __init__(self, *, host: str, port: int, is_host: bool) -> None:
        wait = timedelta(seconds=20)
        self._store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
            host, port, is_master=is_host, wait_for_workers=False, timeout=wait
        )
        self.port = self._store.port

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


class Group(Ranks):
    """Several processes, through torch.distributed's collectives.

    Args:
        group: a group of torch.distributed.
        control: a group on the host, for messages that must not wait for the device.
        traffic: bytes by collective, shared by all groups of the process.
    """

    def __init__(self, *, device: torch.device, group: Any, control: Any, traffic: "Counter[str]") -> None:
        self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self.device, self._group, self._control, self.traffic = device, group, control, traffic
        self.data, self.features = self, Solo(device)

    def arranged(self, *, columns: int) -> Ranks:
        raise TypeError("a row or column is not arranged again")

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        self.sum_in_place(total)
        return total

    def sum_in_place(self, tensor: Tensor) -> None:
        with self._counted("sum", 2 * tensor.nbytes * (self.size - 1) // self.size):
            torch.distributed.all_reduce(tensor, group=self._group)

    def max(self, tensor: Tensor) -> Tensor:
        largest = tensor.clone(memory_format=torch.contiguous_format)
        with self._counted("max", 2 * tensor.nbytes * (self.size - 1) // self.size):
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return largest

    def gather(self, tensor: Tensor) -> Tensor:
        parts = tensor.new_empty((self.size, *tensor.shape))
        with self._counted("gather", tensor.nbytes * (self.size - 1)):
            torch.distributed.all_gather(list(parts.unbind(0)), tensor.contiguous(), group=self._group)
        return parts

    def exchange(self, rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        a_row = rows[:1].nbytes if len(rows) else 0
        moved = a_row * max(sum(send) - send[self.rank], sum(receive) - receive[self.rank])
        with self._counted("exchange", moved):
            torch.distributed.all_to_all_single(received, rows.contiguous(), receive, send, group=self._group)
        return received

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        tensor = tensor.contiguous()
        with self._counted("broadcast", tensor.nbytes):
            torch.distributed.broadcast(tensor, group_src=source, group=self._group)
        return tensor

    def begin_max(self, value: int) -> Pending:
        return _Reduction(self, value)

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._counted("objects", 0):
            torch.distributed.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        self.gather_objects(None)

    @contextmanager
    def _counted(self, verb: str, n_bytes: int) -> Iterator[None]:
        """Count the bytes of a collective, and turn a lost connection into RankLost."""
        self.traffic[verb] += n_bytes
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and not any(sign in str(error) for sign in LOST):
                raise
            raise RankLost(
                f"lost touch with another rank while calling `{verb}`: it or its node died, or its own message says "
                f"why it stopped. The same command goes on from the last checkpoint. ({str(error).splitlines()[0]})"
            ) from error


class _Reduction(Pending):
    """A maximum of host integers in progress, over the control group."""

    def __init__(self, group: Group, value: int) -> None:
        self._group, self._value = group, torch.tensor(value)
        with group._counted("control", self._value.nbytes):
            self._work = torch.distributed.all_reduce(
                self._value, op=torch.distributed.ReduceOp.MAX, group=group._control, async_op=True
            )

    def result(self) -> int:
        with self._group._counted("control", 0):
            self._work.wait()
        return int(self._value)


class Processes(Group):
    """All processes of the run, joined by accelerate, and the heartbeat between them. `find_ranks` creates it.

    Raises:
        RankLost: not all processes joined.
    """

    def __init__(self) -> None:
        from accelerate import PartialState

        try:
            self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=JOINING)
        except torch.distributed.DistError as error:
            raise RankLost(_not_joined(str(error).splitlines()[0])) from error
        # The default group keeps the timeout of joining, so the run has groups of its own.
        group = torch.distributed.new_group(timeout=PATIENCE)
        control = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        super().__init__(device=self._state.device, group=group, control=control, traffic=Counter())
        self._grids: dict[int, tuple[Ranks, Ranks]] = {}
        self._heartbeat = Heartbeat(self._open_store(), self.rank, self.size)
        self._heartbeat.__enter__()
        self.sum(torch.zeros(1, device=self.device))  # NCCL connects at the first call; the heartbeat watches it

    def arranged(self, *, columns: int) -> Ranks:
        if columns not in self._grids:
            self._grids[columns] = self._grid(columns)
        self.data, self.features = self._grids[columns]
        return self

    def _grid(self, columns: int) -> tuple[Ranks, Ranks]:
        """Return this rank's column and row. Every rank creates every group, in the same order."""
        rows = [list(range(first, first + columns)) for first in range(0, self.size, columns)]
        splits = [list(range(column, self.size, columns)) for column in range(columns)]
        return self._one_of(splits), self._one_of(rows)

    def _one_of(self, members: list[list[int]]) -> Ranks:
        """Return the group of this rank among groups that together hold every rank."""
        if len(members) == 1:
            return Group(device=self.device, group=self._group, control=self._control, traffic=self.traffic)
        if len(members[0]) == 1:
            return Solo(self.device)
        made: Ranks | None = None
        for ranks in members:
            group = torch.distributed.new_group(ranks, timeout=PATIENCE)
            control = torch.distributed.new_group(ranks, timeout=PATIENCE, backend="gloo")
            if self.rank in ranks:
                torch.distributed.all_reduce(torch.zeros(1, device=self.device), group=group)  # connects, as above
                made = Group(device=self.device, group=group, control=control, traffic=self.traffic)
        assert made is not None, "every rank is in one of the groups"
        return made

    def _open_store(self) -> _Store:
        """Return a connection to a store that the first rank hosts."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        own = _Store(host=host, port=0, is_host=True) if self.is_first else None
        port = self.gather_objects(own.port if own else None)[0]
        return own or _Store(host=host, port=port, is_host=False)

    def close(self) -> None:
        """Leave the group: the last call of a process whose runs ended well. Collective."""
        self.barrier()  # a rank that leaves during a collective makes the others abort
        self._heartbeat.close()
        self._state.destroy_process_group()


def _not_joined(said: str) -> str:
    """Return the message for ranks that could not join."""
    if "EADDRINUSE" in said or "address already in use" in said:
        port = os.environ.get("MASTER_PORT")
        return (
            f"MASTER_PORT={port}: something else listens there. Choose another port, the same for all ranks. ({said})"
        )
    size, minutes = this_process().size, int(JOINING.total_seconds()) // 60
    if "imed out" in said or "imeout" in said:
        return (
            f"not all of {size} ranks have joined within {minutes} minutes; one that failed before says why. ({said})"
        )
    return f"the {size} ranks could not join: {said}. Another one may say why. Check MASTER_ADDR and MASTER_PORT."


_joined: list[Processes] = []
"""The processes of this run, once joined. The next run of a sweep in this process reuses them."""


def find_ranks() -> Ranks:
    """Return the joined processes of the launcher, or a single one. The device is CUDA where there is one."""
    process = this_process()
    if process.size > 1:
        process.export()
        if not torch.cuda.is_available():
            os.environ.setdefault("ACCELERATE_USE_CPU", "1")
        if not _joined or not torch.distributed.is_initialized():
            _joined[:] = [Processes()]
        return _joined[0]
    return Solo("cuda" if torch.cuda.is_available() else "cpu")


def leave() -> None:
    """Leave the joined processes, if any, after runs that ended well. Collective."""
    while _joined:
        _joined.pop().close()

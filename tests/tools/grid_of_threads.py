"""A grid of ranks that are threads of this process: the collectives of ranks.py, without starting processes."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sae_train.ranks.interface import Pending, Ranks, Solo
from tools.small_runs import CPU

T = TypeVar("T")
LOADING = threading.Lock()
"""To be held while a language model is loaded: transformers patches global state meanwhile, of the whole process."""


class Meeting:
    """Where the members of a group lay down what they have and read what the others have."""

    def __init__(self, size: int) -> None:
        self._board: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def all(self, rank: int, value: Any) -> list[Any]:
        self._board[rank] = value
        self.barrier.wait()
        values = list(self._board)
        self.barrier.wait()
        return values


@dataclass
class Outcome(Pending):
    value: int

    def result(self) -> int:
        return self.value


@dataclass
class ThreadRanks(Ranks):
    """A group of threads, with the collectives of ranks.py and their count of bytes."""

    rank: int
    size: int
    meeting: Meeting
    traffic: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.device, self.data, self.features = CPU, self, Solo()

    def arranged(self, *, columns: int) -> Ranks:
        raise TypeError("the grid is made with the threads")

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._alike("sum", tensor, 2 * tensor.nbytes * (self.size - 1) // self.size)).sum(0)

    def sum_in_place(self, tensor: Tensor) -> None:
        total = self.sum(tensor)
        self.barrier()
        tensor.copy_(total)

    def max(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._alike("max", tensor, 2 * tensor.nbytes * (self.size - 1) // self.size)).amax(0)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._alike("gather", tensor, tensor.nbytes * (self.size - 1)))

    def exchange(self, rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
        assert len(rows) == sum(send)
        parts = [whole.split(counts)[self.rank] for whole, counts in self.meeting.all(self.rank, (rows, send))]
        assert [len(part) for part in parts] == receive
        self.traffic["exchange"] += rows.nbytes - rows.split(send)[self.rank].nbytes
        return torch.cat(parts)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return self._alike("broadcast", tensor, tensor.nbytes)[source].clone()

    def begin_max(self, value: int) -> Pending:
        return Outcome(max(self.meeting.all(self.rank, value)))

    def gather_objects(self, value: Any) -> list[Any]:
        return self.meeting.all(self.rank, value)

    def barrier(self) -> None:
        self.meeting.barrier.wait()

    def _alike(self, verb: str, tensor: Tensor, n_bytes: int) -> list[Tensor]:
        tensors = self.meeting.all(self.rank, tensor)
        assert {(each.shape, each.dtype) for each in tensors} == {(tensor.shape, tensor.dtype)}
        self.traffic[verb] += n_bytes
        return tensors


def on_grid(grid: tuple[int, int], work: Callable[[Ranks], T]) -> list[T]:
    """Return the results of `work` on each rank of a grid of (rows, columns), in rank order."""
    n_rows, n_columns = grid
    if n_rows * n_columns == 1:
        return [work(Solo())]
    everyone = Meeting(n_rows * n_columns)
    rows = [Meeting(n_columns) for _ in range(n_rows)]
    columns = [Meeting(n_rows) for _ in range(n_columns)]
    results: list[Any] = [None] * (n_rows * n_columns)
    errors: list[BaseException] = []

    def place(rank: int) -> Ranks:
        row, column = divmod(rank, n_columns)
        ranks = ThreadRanks(rank, n_rows * n_columns, everyone)
        ranks.data = ThreadRanks(row, n_rows, columns[column], ranks.traffic) if n_rows > 1 else Solo()
        ranks.features = ThreadRanks(column, n_columns, rows[row], ranks.traffic) if n_columns > 1 else Solo()
        return ranks

    def one(ranks: Ranks) -> None:
        try:
            results[ranks.rank] = work(ranks)
        except BaseException as error:
            errors.append(error)
            for meeting in (everyone, *rows, *columns):
                meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(place(rank),)) for rank in range(n_rows * n_columns)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


def shard(whole_NF: Tensor, ranks: Ranks) -> tuple[Tensor, tuple[int, int]]:
    """Return the part of the batch that a rank holds, and its first token and feature."""
    (top, bottom), (left, right) = ranks.data.slice(whole_NF.shape[0]), ranks.features.slice(whole_NF.shape[1])
    return whole_NF[top:bottom, left:right].contiguous(), (top, left)


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Return the results of `work` on each of `size` ranks that share the tokens out, in rank order."""
    return on_grid((size, 1), work)

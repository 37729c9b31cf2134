"""The collectives of a run's ranks as an interface, and its version for one process.

Every method with a tensor is a collective: all ranks of the group call it in the same order with equal shapes and
dtypes.

Ranks form a grid: rank = row * columns + column. The ranks of a row have the same tokens and split the features. The
ranks of a column have the same features and split the tokens. One column is `parallel=data`, one row is
`parallel=features`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError


class Pending(ABC):
    """A reduction in progress. `Ranks.begin_max` creates it."""

    @abstractmethod
    def result(self) -> int:
        """Return the result of the reduction, the same on every rank."""


class Known(Pending):
    """A reduction that is finished."""

    def __init__(self, value: int) -> None:
        self._value = value

    def result(self) -> int:
        return self._value


class Ranks(ABC):
    """The processes of a run, or of a row or column of their grid, from the view of one of them.

    `find_ranks` creates it; every algorithm that works on several ranks takes one and calls its methods.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
        device: where this process computes.
        data: the ranks with the same features and other tokens (a column of the grid).
        features: the ranks with the same tokens and other features (a row of the grid).
        traffic: bytes by collective that an optimal algorithm moves to or from this process.
    """

    rank: int
    size: int
    device: torch.device
    data: "Ranks"
    features: "Ranks"
    traffic: Counter[str]

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def slices(self, n: int) -> list[tuple[int, int]]:
        """Return the slice (lo, hi) of `n` things that each rank owns. Sizes differ by one at most.

        Example: with 3 ranks, `slices(10)` is [(0, 3), (3, 6), (6, 10)].
        """
        return [(rank * n // self.size, (rank + 1) * n // self.size) for rank in range(self.size)]

    def slice(self, n: int) -> tuple[int, int]:
        """Return this rank's slice of `n` things, see `slices`."""
        return self.slices(n)[self.rank]

    @abstractmethod
    def arranged(self, *, columns: int) -> "Ranks":
        """Return the same ranks in a grid with `columns` columns, which divides their number. Collective."""

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of `tensor` (any shape, int or float). The argument does not change."""

    @abstractmethod
    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace a contiguous `tensor` by its sum over ranks. This saves a copy of gradients."""

    @abstractmethod
    def max(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks of `tensor`."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Return all ranks' `tensor` stacked in rank order: [size, *tensor.shape]."""

    @abstractmethod
    def exchange(self, rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
        """Send every rank its rows; return the rows that this rank receives, in rank order.

        Args:
            rows: [sum(send), ...]; the first send[0] are for rank 0, and so on.
            send: rows for each rank.
            receive: rows from each rank. It agrees with the senders' counts.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Return rank `source`'s `tensor`. The others pass one of equal shape and dtype, which may be overwritten."""

    @abstractmethod
    def begin_max(self, value: int) -> Pending:
        """Start a maximum over all ranks of `value` (a host integer), without waiting for it or for the device."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order. Host side and slow: never in a step."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called this."""

    def raise_together(self, problem: UserError | None) -> None:
        """Raise on every rank the error of any rank; the first in rank order wins. Host side, as gather_objects."""
        for found in self.gather_objects(problem):
            if found is not None:
                raise found

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows concatenated in rank order. Ranks may hold different numbers of rows. Host side."""
        counts = [int(n) for n in self.gather(torch.tensor([len(rows)], device=rows.device)).flatten()]
        return self._concatenated(rows, counts)

    def gather_slices(self, rows: Tensor, n: int) -> Tensor:
        """Return all `n` rows in order, where each rank holds the rows of its `slice`."""
        return self._concatenated(rows, [hi - lo for lo, hi in self.slices(n)])

    def _concatenated(self, rows: Tensor, counts: list[int]) -> Tensor:
        if self.size == 1:
            return rows
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self.gather(padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class Solo(Ranks):
    """One process: every collective is the identity."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = 0, 1, torch.device(device)
        self.data = self.features = self
        self.traffic = Counter()

    def arranged(self, *, columns: int) -> Ranks:
        return self

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum_in_place(self, tensor: Tensor) -> None:
        return None

    def max(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def exchange(self, rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
        return rows

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return tensor

    def begin_max(self, value: int) -> Pending:
        return Known(value)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None

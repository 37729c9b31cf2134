"""What the ranks of a run say to each other: the verbs, and the one-process twin whose verbs are the identity.

Every verb is a collective: all ranks of the group call it in the same order with equal shapes and dtypes.

Ranks stand in a grid: rank = row * columns + column. Those of a row share tokens and split the features, those of a
column share features and split the tokens. One column is `parallel=data`, one row `parallel=features`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError


class Pending(ABC):
    """A reduction that is under way."""

    @abstractmethod
    def result(self) -> int:
        """Return its outcome, the same on every rank."""


class Known(Pending):
    """A reduction whose outcome is there."""

    def __init__(self, value: int) -> None:
        self._value = value

    def result(self) -> int:
        return self._value


class Ranks(ABC):
    """The processes of a run, or of a row or column of their grid, seen from one of them.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
        device: where this process computes.
        data: the ranks with the same features and other tokens (a column of the grid).
        features: the ranks with the same tokens and other features (a row of the grid).
        traffic: bytes by verb that had to reach or leave this process, at least: what an optimal algorithm moves.
    """

    rank: int
    size: int
    device: torch.device
    data: "Ranks"
    features: "Ranks"
    traffic: Counter[str]

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def slices(self, n: int) -> list[tuple[int, int]]:
        """Return which of `n` things in a row each rank owns: lo, hi. Shares differ by one at most."""
        return [(rank * n // self.size, (rank + 1) * n // self.size) for rank in range(self.size)]

    def slice(self, n: int) -> tuple[int, int]:
        """Return this rank's of `slices`."""
        return self.slices(n)[self.rank]

    @abstractmethod
    def arranged(self, *, columns: int) -> "Ranks":
        """Return the same ranks in a grid with `columns` columns, which divides their number. Collective."""

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of `tensor` (any shape, int or float); the argument is left alone."""

    @abstractmethod
    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace a contiguous `tensor` by its sum over ranks (gradients: no second copy)."""

    @abstractmethod
    def max(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks of `tensor`."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Return all ranks' `tensor` stacked in rank order: [size, *tensor.shape]."""

    @abstractmethod
    def exchange(self, rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
        """Give every rank its rows and return what the others had for this one, in rank order.

        Args:
            rows: [sum(send), ...]; the first send[0] are for rank 0, and so on.
            send: rows for each rank.
            receive: rows from each rank; all ranks know each other's counts.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Return rank `source`'s `tensor`; the others give one of its shape and dtype, which may be overwritten."""

    @abstractmethod
    def begin_max(self, value: int) -> Pending:
        """Start to find the largest of all ranks' `value` (a host integer) without waiting for it or for the device."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order. Host side and slow: never in a step."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called this."""

    def raise_together(self, problem: UserError | None) -> None:
        """Raise on every rank what any rank ran into; the first in rank order wins. Host side, as gather_objects."""
        for found in self.gather_objects(problem):
            if found is not None:
                raise found

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows concatenated in rank order; ranks may hold different numbers of rows. Host side."""
        counts = [int(n) for n in self.gather(torch.tensor([len(rows)], device=rows.device)).flatten()]
        return self._concatenated(rows, counts)

    def gather_slices(self, rows: Tensor, n: int) -> Tensor:
        """Return all `n` rows where each rank holds those of its `slice`, in order."""
        return self._concatenated(rows, [hi - lo for lo, hi in self.slices(n)])

    def _concatenated(self, rows: Tensor, counts: list[int]) -> Tensor:
        if self.size == 1:
            return rows
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self.gather(padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class Solo(Ranks):
    """One process: every verb is the identity."""

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

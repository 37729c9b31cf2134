"""A lane's pool: activations of many contexts, shuffled, taken a share a step.

Batch-wide selection couples the tokens of a batch, so they must come from many contexts. A
pool is refilled when less than half of it is unread, at points that depend on its own consumption alone, and
then shuffled anew by a generator keyed by (data.seed, lane, refill). Its unread rows are its checkpoint.
Rows are whatever the stream puts in. Letters: N rows, W width, C capacity.
"""

import torch
from torch import Tensor

from sae_train.sae.random import keyed_order

_TAKEN_FROM, _FILLING, _FILLED = 0, 1, 2
"""Where a pool is between two takes. A run may be stopped while it fills, and then goes on filling."""


class LanePool:
    """Rows of one lane, in storage that is handed in.

    Attributes:
        taken: rows handed out so far.
    """

    def __init__(self, rows_CW: Tensor, *, lane: int, share: int, forward_rows: int, seed: int) -> None:
        """Args:
        rows_CW: storage.
        lane: index, for the shuffles.
        share: rows a step.
        forward_rows: most rows that one forward pass adds; at most half of C.
        seed: data.seed.
        """
        assert 2 * max(share, forward_rows) <= len(rows_CW), "check_stream refuses smaller pools"
        self._rows_CW = rows_CW
        self._lane, self._share, self._forward_rows, self._seed = lane, share, forward_rows, seed
        self._start = self._end = self._refills = 0
        self.taken = 0
        self._stage = _TAKEN_FROM

    @property
    def unread(self) -> int:
        return self._end - self._start

    @property
    def room(self) -> int:
        """Rows that fit beside the unread ones."""
        return len(self._rows_CW) - self.unread

    @property
    def is_due(self) -> bool:
        """Whether it must be refilled before the next take."""
        return self._stage == _FILLING or (self._stage == _TAKEN_FROM and 2 * self.unread < len(self._rows_CW))

    @property
    def is_due_soon(self) -> bool:
        """Whether it is due now or may be before one of the next two takes."""
        return self.is_due or 2 * (self.unread - 2 * self._share) < len(self._rows_CW)

    @property
    def has_room(self) -> bool:
        """Whether the rows of one more forward pass surely fit."""
        return self.unread + self._forward_rows <= len(self._rows_CW)

    def will_have_room(self, n_rows: int, *, last_row: int) -> bool:
        """Return whether the next refill fits one more forward pass behind `n_rows` rows.

        False where `last_row` rows are all that is ever taken and there is no such refill any more.
        """
        shares = max(0, (2 * self.unread - len(self._rows_CW)) // (2 * self._share) + 1)
        left = self.unread - shares * self._share
        return self.taken + shares * self._share < last_row and left + n_rows + self._forward_rows <= len(self._rows_CW)

    def add(self, rows_NW: Tensor) -> None:
        """Append rows; they must fit. Until `shuffle` the pool is in the middle of a refill."""
        self._stage = _FILLING
        if self._end + len(rows_NW) > len(self._rows_CW):
            self._move_to_front(self._rows_CW[self._start : self._end].clone())
        self._rows_CW[self._end : self._end + len(rows_NW)] = rows_NW
        self._end += len(rows_NW)

    def shuffle(self) -> None:
        """Draw the order in which the unread rows are taken: the end of a refill."""
        order = keyed_order(self.unread, self._seed, "pool", self._lane, self._refills)
        self._move_to_front(self._rows_CW[self._start : self._end][order.to(self._rows_CW.device)])
        self._refills += 1
        self._stage = _FILLED

    def take(self, out_NW: Tensor) -> None:
        """Write the next share into `out_NW`."""
        stop = self._start + self._share
        assert stop <= self._end, "a pool is refilled before it runs dry"
        out_NW.copy_(self._rows_CW[self._start : stop])
        self._start = stop
        self.taken += self._share
        self._stage = _TAKEN_FROM

    def state(self) -> dict[str, Tensor]:
        """Return the unread rows and counters as CPU tensors."""
        return {
            "rows": self._rows_CW[self._start : self._end].to("cpu", copy=True),
            "pool": torch.tensor([self._refills, self.taken, self._stage]),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go back to what `state` returned."""
        self._move_to_front(state["rows"].to(self._rows_CW.device))
        self._refills, self.taken, *stage = state["pool"].tolist()
        self._stage = stage[0] if stage else _TAKEN_FROM  # checkpoints of version 0.1.0 lack it

    def _move_to_front(self, rows_NW: Tensor) -> None:
        self._rows_CW[: len(rows_NW)] = rows_NW
        self._start, self._end = 0, len(rows_NW)

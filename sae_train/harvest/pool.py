"""A lane's pool: rows of many contexts, shuffled, of which every step takes an equal share.

Selection over a whole batch couples the batch's tokens, so they must come from many contexts. A pool is refilled when
less than half of it is unread, at points that depend on its own consumption alone. Every refill ends with a shuffle
keyed by (data.seed, lane, refill). The unread rows are the pool's checkpoint.
"""

import torch
from torch import Tensor

from sae_train.harvest.batch import Batch
from sae_train.sae.random import keyed_order

_TAKEN_FROM, _FILLING, _FILLED = 0, 1, 2
"""States of a pool between two takes. A run may stop while a pool fills, and the resumed run continues the refill."""


class LanePool:
    """Rows of one lane, in storage that the stream allocates. `LiveLane` fills it, and `LiveStream` takes from it.

    Attributes:
        taken: rows taken so far.
    """

    def __init__(self, storage: Batch, *, lane: int, share: int, forward_rows: int, seed: int) -> None:
        """Args:
        storage: memory for the rows; its length is the pool's capacity.
        lane: index of the lane, for the shuffles.
        share: rows a step.
        forward_rows: most rows that one forward pass adds, at most half of the capacity.
        seed: data.seed.
        """
        assert 2 * max(share, forward_rows) <= len(storage), "check_stream refuses smaller pools"
        self._storage = storage
        self._lane, self._share, self._forward_rows, self._seed = lane, share, forward_rows, seed
        self._start = self._end = self._refills = 0
        self.taken = 0
        self._stage = _TAKEN_FROM

    @property
    def unread(self) -> int:
        """Rows that no step has taken yet."""
        return self._end - self._start

    @property
    def room(self) -> int:
        """Rows that fit in addition to the unread ones."""
        return len(self._storage) - self.unread

    @property
    def is_due(self) -> bool:
        """Whether the pool must be refilled before the next take."""
        return self._stage == _FILLING or (self._stage == _TAKEN_FROM and 2 * self.unread < len(self._storage))

    @property
    def is_due_soon(self) -> bool:
        """Whether a refill is due now, or may be before one of the next two takes."""
        return self.is_due or 2 * (self.unread - 2 * self._share) < len(self._storage)

    @property
    def has_room(self) -> bool:
        """Whether the rows of one more forward pass are certain to fit."""
        return self.unread + self._forward_rows <= len(self._storage)

    def will_have_room(self, n_rows: int, *, last_row: int) -> bool:
        """Return whether the next refill fits one more forward pass after `n_rows` rows.

        Args:
            n_rows: rows that are waiting for the refill already.
            last_row: rows that the run takes in all. The answer is False where no refill comes before the last of them.
        """
        shares = max(0, (2 * self.unread - len(self._storage)) // (2 * self._share) + 1)
        left = self.unread - shares * self._share
        return self.taken + shares * self._share < last_row and left + n_rows + self._forward_rows <= len(self._storage)

    def add(self, rows: Batch) -> None:
        """Append rows, which must fit. The refill lasts until `shuffle`."""
        self._stage = _FILLING
        if self._end + len(rows) > len(self._storage):
            self._move_to_front(self._unread_rows().map(Tensor.clone))
        self._storage[self._end : self._end + len(rows)].copy_(rows)
        self._end += len(rows)

    def shuffle(self) -> None:
        """End a refill: draw the order in which steps take the unread rows."""
        order = keyed_order(self.unread, self._seed, "pool", self._lane, self._refills)
        self._move_to_front(self._unread_rows()[order.to(self._storage.x_ND.device)])
        self._refills += 1
        self._stage = _FILLED

    def take(self, out: Batch) -> None:
        """Write the next share into `out`."""
        stop = self._start + self._share
        assert stop <= self._end, "a pool is refilled before it runs dry"
        out.copy_(self._storage[self._start : stop])
        self._start = stop
        self.taken += self._share
        self._stage = _TAKEN_FROM

    def state(self) -> dict[str, Tensor]:
        """Return the unread rows and the counters as CPU tensors."""
        unread = self._unread_rows().map(lambda rows_ND: rows_ND.to("cpu", copy=True))
        gradients = {} if unread.gradient_ND is None else {"gradients": unread.gradient_ND}
        return {"rows": unread.x_ND, **gradients, "pool": torch.tensor([self._refills, self.taken, self._stage])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a result of `state`."""
        rows = Batch(state["rows"], state.get("gradients"))
        self._move_to_front(rows.map(lambda rows_ND: rows_ND.to(self._storage.x_ND.device)))
        self._refills, self.taken, self._stage = state["pool"].tolist()

    def _unread_rows(self) -> Batch:
        return self._storage[self._start : self._end]

    def _move_to_front(self, rows: Batch) -> None:
        self._storage[: len(rows)].copy_(rows)
        self._start, self._end = 0, len(rows)

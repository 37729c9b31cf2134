"""A lane's pool: rows of many contexts, shuffled, of which every step takes an equal share.

Selection over a whole batch couples the batch's tokens, so they must come from many contexts. A pool is refilled when
less than half of it is unread, at points that depend on its own consumption alone. Every refill ends with a shuffle
keyed by (data.seed, lane, refill). The unread rows are the pool's checkpoint.

Sites share the cursor and the shuffles of their lane's pool, and each site has rows of its own. So the same place in
every site's rows is the same token, unless a row over a site's outlier limit was replaced.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae_train.harvest.batch import Batch
from sae_train.sae.random import keyed_order

_TAKEN_FROM, _FILLING, _FILLED = 0, 1, 2
"""States of a pool between two takes. A run may stop while a pool fills, and the resumed run continues the refill."""


class LanePool:
    """Rows of one lane, in storage that the stream allocates. `LiveLane` fills it, and `LiveStream` takes from it.

    Rows of several sites are dictionaries by label. Every site has the same number of rows.

    Attributes:
        taken: rows of each site taken so far.
    """

    def __init__(self, storage: Mapping[str, Batch], *, lane: int, share: int, forward_rows: int, seed: int) -> None:
        """Args:
        storage: memory for the rows of each site; its length is the pool's capacity.
        lane: index of the lane, for the shuffles.
        share: rows a step.
        forward_rows: most rows that one forward pass adds, at most half of the capacity.
        seed: data.seed.
        """
        (self._capacity,) = {len(rows) for rows in storage.values()}
        assert 2 * max(share, forward_rows) <= self._capacity, "check_stream refuses smaller pools"
        self._storage = dict(storage)
        self._lane, self._share, self._forward_rows, self._seed = lane, share, forward_rows, seed
        self._start = self._end = self._refills = 0
        self.taken = 0
        self._stage = _TAKEN_FROM

    @property
    def sites(self) -> tuple[str, ...]:
        """Labels of the sites."""
        return tuple(self._storage)

    @property
    def unread(self) -> int:
        """Rows that no step has taken yet."""
        return self._end - self._start

    @property
    def room(self) -> int:
        """Rows that fit in addition to the unread ones."""
        return self._capacity - self.unread

    @property
    def is_due(self) -> bool:
        """Whether the pool must be refilled before the next take."""
        return self._stage == _FILLING or (self._stage == _TAKEN_FROM and 2 * self.unread < self._capacity)

    @property
    def is_due_soon(self) -> bool:
        """Whether a refill is due now, or may be before one of the next two takes."""
        return self.is_due or 2 * (self.unread - 2 * self._share) < self._capacity

    @property
    def has_room(self) -> bool:
        """Whether the rows of one more forward pass are certain to fit."""
        return self.unread + self._forward_rows <= self._capacity

    def will_have_room(self, n_rows: int, *, last_row: int) -> bool:
        """Return whether the next refill fits one more forward pass after `n_rows` rows.

        Args:
            n_rows: rows that are waiting for the refill already.
            last_row: rows that the run takes in all. The answer is False where no refill comes before the last of them.
        """
        shares = max(0, (2 * self.unread - self._capacity) // (2 * self._share) + 1)
        left = self.unread - shares * self._share
        return self.taken + shares * self._share < last_row and left + n_rows + self._forward_rows <= self._capacity

    def add(self, rows: Mapping[str, Batch]) -> None:
        """Append rows of every site, which must fit. The refill lasts until `shuffle`."""
        (n_rows,) = {len(each) for each in rows.values()}
        self._stage = _FILLING
        if self._end + n_rows > self._capacity:
            self._move_to_front()
        for label, storage in self._storage.items():
            storage[self._end : self._end + n_rows].copy_(rows[label])
        self._end += n_rows

    def shuffle(self) -> None:
        """End a refill: draw the order in which steps take the unread rows."""
        order = keyed_order(self.unread, self._seed, "pool", self._lane, self._refills)
        self._move_to_front(order)
        self._refills += 1
        self._stage = _FILLED

    def take(self, out: Mapping[str, Batch]) -> None:
        """Write the next share of every site into `out`."""
        stop = self._start + self._share
        assert stop <= self._end, "a pool is refilled before it runs dry"
        for label, storage in self._storage.items():
            out[label].copy_(storage[self._start : stop])
        self._start = stop
        self.taken += self._share
        self._stage = _TAKEN_FROM

    def state(self) -> dict[str, Tensor]:
        """Return the unread rows and the counters as CPU tensors."""
        state = {"pool": torch.tensor([self._refills, self.taken, self._stage])}
        for label, storage in self._storage.items():
            unread = storage[self._start : self._end].map(lambda rows_ND: rows_ND.to("cpu", copy=True))
            state[f"rows/{label}"] = unread.x_ND
            if unread.gradient_ND is not None:
                state[f"gradients/{label}"] = unread.gradient_ND
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a result of `state`."""
        for label, storage in self._storage.items():
            rows = Batch(state[f"rows/{label}"], state.get(f"gradients/{label}"))
            storage[: len(rows)].copy_(rows)
            self._start, self._end = 0, len(rows)
        self._refills, self.taken, self._stage = state["pool"].tolist()

    def _move_to_front(self, order: Tensor | None = None) -> None:
        """Move the unread rows to the front, perhaps in another order. It copies one site's unread rows at a time."""
        n_rows = self.unread
        for storage in self._storage.values():
            unread = storage[self._start : self._end]
            kept = unread.map(Tensor.clone) if order is None else unread[order.to(storage.x_ND.device)]
            storage[:n_rows].copy_(kept)
        self._start, self._end = 0, n_rows

"""One lane of a live harvest: its raw rows, normalised, on their way into its pool.

Letters: N tokens, D d_model.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sae_train.harvest.batch import Batch
from sae_train.harvest.filter import next_kept, shortened_to, within
from sae_train.harvest.meter import Meter
from sae_train.harvest.pool import LanePool
from sae_train.harvest.prefetch import Result
from sae_train.harvest.raw_rows import Block, Patience, RawRows
from sae_train.harvest.scaling import Scaling
from sae_train.phases import Phases


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows of a block that `LiveLane` puts into its pool: within each site's outlier limit, normalised."""

    rows: dict[str, Batch]
    """As many rows as the block has, by site."""
    n_over: dict[str, int]
    """Number of the block's rows that were over the limit, by site."""
    cursor: dict[str, Tensor]
    is_last: bool
    """Whether the lane's text ends after the block."""

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


class LiveLane:
    """A lane's raw rows, its pool, and counts of the rows over the outlier limit. `LiveStream` has one for each lane.

    The raw rows may be read ahead of the pool. The lane's state is the state after the rows that are in the pool. The
    raw rows belong to one thread at a time, the pool to the thread that takes from it.

    Attributes:
        raw: the lane's raw rows.
        pool: the lane's pool.
        seen: rows of each site that came to the pool.
        dropped: the number of them that were over the site's outlier limit, by site.
        has_ended: whether no row comes after those in the pool.
    """

    def __init__(self, raw: RawRows, pool: LanePool, *, meter: Meter) -> None:
        self.raw, self.pool, self._meter = raw, pool, meter
        self.seen, self.dropped = 0, dict.fromkeys(pool.sites, 0)
        lacking = "no activation within the outlier limit. Look at its text, or choose another site."
        self._patience = {site: Patience(f"lane {raw.lane}, {site}", lacking=lacking) for site in pool.sites}
        self._early: deque[Result[Kept | None]] = deque()
        self._early_rows = 0
        self.go_to(raw.cursor())

    def go_to(self, cursor: dict[str, Tensor]) -> None:
        """Continue from this place in the text, and drop the rows that were read ahead."""
        self.raw.go_to(cursor)
        self._early.clear()
        self._early_rows = 0
        self._cursor, self.has_ended = cursor, self.raw.has_ended

    def keep(self, block: Block, scalings: Mapping[str, Scaling], dtype: torch.dtype) -> Kept:
        """Return the rows of a block, normalised, with those over a site's outlier limit replaced at that site.

        The next kept row of the block takes the place of a row over the limit; after the last row comes the first.
        Where the block has no kept row, its rows are scaled down to the limit.

        Raises:
            DataError: many blocks in a row had no row within the limit of a site.
        """
        within_limit = {site: within(raw_ND, limit=scalings[site].limit) for site, raw_ND in block.raw.items()}
        counts = torch.stack([kept_N.sum() for kept_N in within_limit.values()]).tolist()  # one reading for all sites
        rows, n_over = {}, {}
        for (site, kept_N), n_kept in zip(within_limit.items(), counts, strict=True):
            raw_ND, gradient_ND = block.raw[site], block.gradients.get(site)
            if 0 < n_kept < len(block):
                source_N = next_kept(kept_N)
                raw_ND, gradient_ND = raw_ND[source_N], None if gradient_ND is None else gradient_ND[source_N]
            raw_ND, gradient_ND = raw_ND.to(dtype), None if gradient_ND is None else gradient_ND.to(dtype)
            if not n_kept:
                raw_ND = shortened_to(raw_ND, limit=scalings[site].limit)
            rows[site], n_over[site] = scalings[site].normalise(raw_ND, gradient_ND), len(block) - n_kept
            self._patience[site].see(n_kept)
        return Kept(rows, n_over, block.cursor, block.is_last)

    def absorb(self, kept: Kept) -> None:
        """Put rows into the pool."""
        with self._meter.timed("pooled"):
            self.pool.add(kept.rows)
        self.seen += len(kept)
        for site, n_over in kept.n_over.items():
            self.dropped[site] += n_over
        self._cursor, self.has_ended = kept.cursor, kept.is_last

    def refill(self, scalings: Mapping[str, Scaling], dtype: torch.dtype, phases: Phases) -> None:
        """Fill the pool as far as whole forward passes fit, and shuffle it.

        `phases` may end this between two forward passes. A later call continues from there, also after a resume.
        """
        while self.pool.has_room:
            kept = self._next_early() if self._early else self._next(scalings, dtype)
            if kept is None:
                self.has_ended = True
                break
            self.absorb(kept)
            phases.advance(len(kept))
        with self._meter.timed("pooled"):
            self.pool.shuffle()

    def wants_more(self, *, most_rows: int, last_row: int) -> bool:
        """Return whether the next refill has a use for one more forward pass than was made ahead.

        Args:
            most_rows: rows that may be harvested ahead of the refill.
            last_row: rows that the run takes in all. No refill comes after the last of them.
        """
        if self._early and (self._early[-1].failed or self._early[-1].get() is None):
            return False
        return self._early_rows < most_rows and self.pool.will_have_room(self._early_rows, last_row=last_row)

    @property
    def in_hand(self) -> int:
        """Rows that are there before the step waits for a forward pass."""
        return self.pool.unread + self._early_rows

    def work_ahead(self, scalings: Mapping[str, Scaling], dtype: torch.dtype) -> None:
        """Make the forward pass that the next refill would make. The refill raises the error, if there is one."""
        result = Result(partial(self._next, scalings, dtype))
        kept = None if result.failed else result.get()
        self._early_rows += 0 if kept is None else len(kept)
        self._early.append(result)

    def _next_early(self) -> Kept | None:
        kept = self._early.popleft().get()
        self._early_rows -= 0 if kept is None else len(kept)
        return kept

    def _next(self, scalings: Mapping[str, Scaling], dtype: torch.dtype) -> Kept | None:
        block = self.raw.next()
        with self._meter.timed("harvested"):
            return None if block is None else self.keep(block, scalings, dtype)

    @property
    def epochs(self) -> float:
        """How often the lane's text has come into the pool, in epochs."""
        return self.raw.epochs(self._cursor)

    def count_rest(self) -> int:
        """Return the number of trainable tokens after those in the pool, and read the text to its end."""
        self.go_to(self._cursor)
        return self.raw.count_rest()

    def state(self) -> dict[str, Tensor]:
        """Return cursor, pool and counts as CPU tensors."""
        dropped = {f"dropped/{site}": torch.tensor(n_rows) for site, n_rows in self.dropped.items()}
        return {**self._cursor, **self.pool.state(), "seen": torch.tensor(self.seen), **dropped}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a result of `state`."""
        self.go_to({name: state[name] for name in self._cursor})
        self.pool.load_state(state)
        self.seen = int(state["seen"])
        self.dropped = {site: int(state[f"dropped/{site}"]) for site in self.dropped}

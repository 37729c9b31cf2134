"""One lane of a live harvest: its raw rows, normalised, on their way into its pool.

Letters: N tokens, D d_model.
"""

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sae_train.harvest.batch import Batch
from sae_train.harvest.filter import within
from sae_train.harvest.pool import LanePool
from sae_train.harvest.prefetch import Result
from sae_train.harvest.raw_rows import Block, Patience, RawRows
from sae_train.harvest.scaling import Scaling
from sae_train.phases import Phases


@dataclass(frozen=True, slots=True)
class Kept:
    """The rows of a block that `LiveLane` puts into its pool: those within the outlier limit, normalised."""

    rows: Batch
    n_seen: int
    """Rows of the block."""
    cursor: dict[str, Tensor]
    is_last: bool
    """Whether the lane's text ends after the block."""


class LiveLane:
    """A lane's raw rows, its pool, and counts of the rows over the outlier limit. `LiveStream` has one for each lane.

    The raw rows may be read ahead of the pool. The lane's state is the state after the rows that are in the pool. The
    raw rows belong to one thread at a time, the pool to the thread that takes from it.

    Attributes:
        raw: the lane's raw rows.
        pool: the lane's pool.
        seen: rows that came to the pool, those over the outlier limit included.
        dropped: those over the limit.
        has_ended: whether no row comes after those in the pool.
    """

    def __init__(self, raw: RawRows, pool: LanePool) -> None:
        self.raw, self.pool = raw, pool
        self.seen = self.dropped = 0
        self._patience = Patience(raw.lane)
        self._early: deque[Result[Kept | None]] = deque()
        self._early_rows = 0
        self.go_to(raw.cursor())

    def go_to(self, cursor: dict[str, Tensor]) -> None:
        """Continue from this place in the text, and drop the rows that were read ahead."""
        self.raw.go_to(cursor)
        self._early.clear()
        self._early_rows = 0
        self._cursor, self.has_ended = cursor, self.raw.has_ended

    def keep(self, block: Block, scaling: Scaling, dtype: torch.dtype) -> Kept:
        """Return the rows of a block within the outlier limit, normalised.

        Raises:
            DataError: the filters left nothing of many blocks in a row.
        """
        kept_N = within(block.raw_ND, limit=scaling.limit)
        gradient_ND = None if block.gradient_ND is None else block.gradient_ND[kept_N].to(dtype)
        rows = scaling.normalise(block.raw_ND[kept_N].to(dtype), gradient_ND)
        self._patience.see(len(rows))
        return Kept(rows, len(block), block.cursor, block.is_last)

    def absorb(self, kept: Kept) -> None:
        """Put rows into the pool."""
        self.pool.add(kept.rows)
        self.seen += kept.n_seen
        self.dropped += kept.n_seen - len(kept.rows)
        self._cursor, self.has_ended = kept.cursor, kept.is_last

    def refill(self, scaling: Scaling, dtype: torch.dtype, phases: Phases) -> None:
        """Fill the pool as far as whole forward passes fit, and shuffle it.

        `phases` may end this between two forward passes. A later call continues from there, also after a resume.
        """
        while self.pool.has_room:
            kept = self._next_early() if self._early else self._next(scaling, dtype)
            if kept is None:
                self.has_ended = True
                break
            self.absorb(kept)
            phases.advance(len(kept.rows))
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

    def work_ahead(self, scaling: Scaling, dtype: torch.dtype) -> None:
        """Make the forward pass that the next refill would make. The refill raises the error, if there is one."""
        result = Result(partial(self._next, scaling, dtype))
        kept = None if result.failed else result.get()
        self._early_rows += 0 if kept is None else len(kept.rows)
        self._early.append(result)

    def _next_early(self) -> Kept | None:
        kept = self._early.popleft().get()
        self._early_rows -= 0 if kept is None else len(kept.rows)
        return kept

    def _next(self, scaling: Scaling, dtype: torch.dtype) -> Kept | None:
        block = self.raw.next()
        return None if block is None else self.keep(block, scaling, dtype)

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
        counts = torch.tensor([self.seen, self.dropped])
        return {**self._cursor, **self.pool.state(), "counts": counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a result of `state`."""
        self.go_to({name: state[name] for name in self._cursor})
        self.pool.load_state(state)
        self.seen, self.dropped = state["counts"].tolist()

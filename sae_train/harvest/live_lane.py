"""One lane of a live harvest: its text, forward passes of the language model, and its pool.

Letters: B contexts, T positions, N tokens, D d_model, W width of a row (D; 2 D with gradients).
"""

from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.held_out import check_finite, trainable
from sae_train.harvest.lanes import Lane
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.harvest.pool import LanePool
from sae_train.harvest.prefetch import Outcome
from sae_train.harvest.scaling import Scaling
from sae_train.phases import Phases

_FRUITLESS_FORWARDS = 200


@dataclass(frozen=True, slots=True)
class Block:
    """What one forward pass gave: raw rows [N, W] without special tokens, and where the lane's text is after it."""

    raw_NW: Tensor
    cursor: dict[str, Tensor]
    is_last: bool
    """Whether the text has ended there."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Of a block the rows within the outlier limit [N, W], normalised, and how many it had before."""

    kept_NW: Tensor
    n_seen: int
    cursor: dict[str, Tensor]
    is_last: bool


class LiveLane:
    """A lane of text, its pool, and counts of what the outlier limit left out.

    Its text and `early` may be ahead of what it is asked for; its state is that of what has come into the pool. Text,
    tokenizer and language model belong to one thread at a time, the pool to the one that takes.
    """

    def __init__(self, text: Lane, pool: LanePool, *, language_model: LanguageModel, tokenizer: Tokenizer,
                 contexts_per_forward: int, site: str, reads_gradients: bool) -> None:  # fmt: skip
        self.text, self.pool = text, pool
        self._language_model, self._tokenizer = language_model, tokenizer
        self._contexts_per_forward, self._site, self._reads_gradients = contexts_per_forward, site, reads_gradients
        self.seen = self.dropped = self._fruitless = 0
        self._early: deque[Outcome[Rows | None]] = deque()
        self._early_rows = 0
        self.go_to(text.state())

    def go_to(self, cursor: dict[str, Tensor]) -> None:
        """Read on from this place of the text."""
        self.text.load_state(cursor)
        self._early.clear()
        self._early_rows = 0
        self._cursor, self.has_ended = cursor, self.text.has_ended

    def forward(self) -> Block | None:
        """Run the next contexts of the lane; None where its documents end."""
        ids_BT = self.text.contexts(self._contexts_per_forward)
        if not len(ids_BT):
            return None
        largest = int(ids_BT.max())
        if largest >= self._language_model.vocab:
            raise DataError(f"the tokenizer gives token {largest}, the language model knows "
                            f"{self._language_model.vocab}. Use the tokenizer that belongs to the model.")  # fmt: skip
        model = self._language_model
        raw_BTW = model.activations_and_gradients(ids_BT) if self._reads_gradients else model.activations(ids_BT)
        raw_NW = raw_BTW[trainable(ids_BT, self._tokenizer).to(raw_BTW.device)]
        check_finite(raw_NW, site=self._site, language_model=model)
        if not len(raw_NW):
            self._note_fruitless()
        return Block(raw_NW, self.text.state(), self.text.has_ended)

    def filtered(self, block: Block, scaling: Scaling, dtype: torch.dtype) -> Rows:
        """Return a block's rows within the outlier limit, normalised."""
        kept = scaling.keeps(block.raw_NW)
        rows_NW = scaling.normalise(block.raw_NW[kept].to(dtype))
        if len(rows_NW):
            self._fruitless = 0
        elif len(kept):
            self._note_fruitless()
        return Rows(rows_NW, len(kept), block.cursor, block.is_last)

    def absorb(self, rows: Rows) -> None:
        """Put rows into the pool."""
        self.pool.add(rows.kept_NW)
        self.seen += rows.n_seen
        self.dropped += rows.n_seen - len(rows.kept_NW)
        self._cursor, self.has_ended = rows.cursor, rows.is_last

    def refill(self, scaling: Scaling, dtype: torch.dtype, phases: Phases) -> None:
        """Fill the pool as far as whole forward passes fit, and shuffle it.

        `phases` may end this between two forward passes; a later call, after a resume too, goes on from there.
        """
        while self.pool.has_room:
            rows = self._next_early() if self._early else self._next(scaling, dtype)
            if rows is None:
                self.has_ended = True
                break
            self.absorb(rows)
            phases.advance(len(rows.kept_NW))
        self.pool.shuffle()

    def wants_more(self, *, most_rows: int, last_row: int) -> bool:
        """Return whether the next refill has use for a forward pass more than is there already.

        Args:
            most_rows: how many rows there may be ahead of it.
            last_row: how many rows the run takes in all; a refill after that is never made.
        """
        if self._early and (self._early[-1].failed or self._early[-1].get() is None):
            return False
        return self._early_rows < most_rows and self.pool.will_have_room(self._early_rows, last_row=last_row)

    @property
    def in_hand(self) -> int:
        """Rows that are there before a forward pass is waited for."""
        return self.pool.unread + self._early_rows

    def work_ahead(self, scaling: Scaling, dtype: torch.dtype) -> None:
        """Do the forward pass that a refill would do next, or meet its error, which then is raised there."""
        outcome = Outcome(partial(self._next, scaling, dtype))
        rows = None if outcome.failed else outcome.get()
        self._early_rows += 0 if rows is None else len(rows.kept_NW)
        self._early.append(outcome)

    def _next_early(self) -> Rows | None:
        rows = self._early.popleft().get()
        self._early_rows -= 0 if rows is None else len(rows.kept_NW)
        return rows

    def _next(self, scaling: Scaling, dtype: torch.dtype) -> Rows | None:
        block = self.forward()
        return None if block is None else self.filtered(block, scaling, dtype)

    @property
    def epochs(self) -> float:
        """How often its text has come into the pool, in epochs."""
        return self.text.epochs(self._cursor)

    def remaining_tokens(self) -> int:
        """Return how many trainable tokens its text still holds behind the pool's; reads it to its end."""
        self.go_to(self._cursor)
        total = 0
        while len(ids_BT := self.text.contexts(64)):
            total += int(trainable(ids_BT, self._tokenizer).sum())
        return total

    def _note_fruitless(self) -> None:
        """Give up on a lane whose text the filters empty, rather than read it for ever."""
        self._fruitless += 1
        if self._fruitless == _FRUITLESS_FORWARDS:
            raise DataError(f"lane {self.text.index}: {self._fruitless} forward passes in a row gave no token that the "
                            "filters keep. Look at its text: it may be made of special tokens.")  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.seen, self.dropped])
        return {**self._cursor, **self.pool.state(), "counts": counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.go_to({name: state[name] for name in self._cursor})
        self.pool.load_state(state)
        self.seen, self.dropped = state["counts"].tolist()

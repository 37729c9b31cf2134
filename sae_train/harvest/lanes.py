"""Lanes: independent readers of a corpus, each with its own stretch of the text, order and cursor.

A stretch belongs to its lane for the whole run. So the text of a lane depends neither on the ranks nor on the progress
of other lanes. Letters: B contexts, T positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.errors import ConfigError, DataError
from sae_train.harvest.corpus import Corpus
from sae_train.harvest.meter import Meter
from sae_train.harvest.stretches import Stretches
from sae_train.sae.random import keyed_order

if TYPE_CHECKING:
    from sae_train.harvest.language_model import Tokenizer


class Packer:
    """Documents, each followed by an end token, cut into contexts that each begin with a beginning token.

    Lanes and held-out contexts each have one. Example, with a beginning token 0, an end token 1 and contexts of 4
    tokens: documents of tokens [5, 6, 7] and [8, 9] give the contexts [0, 5, 6, 7] and [0, 1, 8, 9].
    """

    def __init__(self, tokenizer: "Tokenizer", *, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._head = [] if tokenizer.bos is None else [tokenizer.bos]
        self._tail = [] if tokenizer.eos is None else [tokenizer.eos]
        self._body = context_length - len(self._head)
        self.tokens: list[int] = []

    @property
    def n_contexts(self) -> int:
        """Number of full contexts."""
        return len(self.tokens) // self._body

    def add(self, text: str, *, is_end: bool = True) -> int:
        """Append text and return its number of tokens. A document's end adds an end token, unless the text is empty."""
        ids = self._tokenizer.encode(text)
        self.tokens += ids
        self.tokens += self._tail if is_end and text else []
        return len(ids)

    def take(self, n: int) -> Tensor:
        """Remove and return up to n full contexts, [B, T] int64."""
        n = min(n, self.n_contexts)
        body = torch.tensor(self.tokens[: n * self._body], dtype=torch.int64).view(n, self._body)
        del self.tokens[: n * self._body]
        head = torch.tensor(self._head, dtype=torch.int64).expand(n, -1)
        return torch.cat([head, body], dim=1)


class Lane:
    """One reader: the pieces of its stretch, in an order keyed by (data.seed, epoch, lane), epoch after epoch.

    `LiveStream` creates one for each of its lanes, and `RawRows` reads it. The cursor is the epoch, the place of the
    next piece in that epoch's order, and the tokens that do not fill a context yet.
    """

    def __init__(self, index: int, *, stretches: Stretches, corpus: Corpus, tokenizer: "Tokenizer",
                 context_length: int, seed: int, repeat: bool, meter: Meter | None = None) -> None:  # fmt: skip
        self.index, self._meter = index, meter or Meter()
        self._corpus, self._stretches, self._seed, self._repeat = corpus, stretches, seed, repeat
        self._segments = stretches.segments(index)
        self._packer = Packer(tokenizer, context_length=context_length)
        self._epoch = self._position = 0
        self._epoch_tokens = 0
        self._order = self._draw_order()

    def contexts(self, n: int) -> Tensor:
        """Return the next n contexts [n, T] int64, or fewer where `repeat` is off and the text ends."""
        while self._packer.n_contexts < n:
            if not self._read_piece():
                break
        return self._packer.take(n)

    @property
    def has_ended(self) -> bool:
        """Whether no context is left. It stays false while `repeat` is on."""
        return not self._repeat and self._position == len(self._segments) and not self._packer.n_contexts

    def state(self) -> dict[str, Tensor]:
        """Return the cursor as CPU tensors."""
        return {
            "cursor": torch.tensor([self._epoch, self._position, self._epoch_tokens]),
            "tokens": torch.tensor(self._packer.tokens, dtype=torch.int64),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a cursor."""
        self._epoch, self._position, self._epoch_tokens = state["cursor"].tolist()
        self._packer.tokens = state["tokens"].tolist()
        self._order = self._draw_order()

    def epochs(self, cursor: dict[str, Tensor]) -> float:
        """Return the number of times that the lane's text was read at a cursor, in epochs."""
        epoch, position, _ = cursor["cursor"].tolist()
        return float(epoch + position / max(1, len(self._segments)))

    def _draw_order(self) -> Tensor:
        return keyed_order(len(self._segments), self._seed, "pieces", self._epoch, self.index)

    def _read_piece(self) -> bool:
        """Pack the next piece. Return False where there is none and `repeat` is off."""
        if self._position == len(self._segments):
            if not self._repeat:
                return False
            if not self._epoch_tokens:
                raise DataError(f"lane {self.index} of harvest.lanes={self._stretches.lanes}: its text is empty. "
                                "Lower harvest.lanes.")  # fmt: skip
            self._epoch, self._position, self._epoch_tokens = self._epoch + 1, 0, 0
            self._order = self._draw_order()
        document, start, stop = self._segments[int(self._order[self._position])].tolist()
        self._position += 1
        if not self._corpus.holds_out(document):
            with self._meter.timed("read"):
                part = self._corpus.part(document, start, stop, window=self._stretches.window)
            with self._meter.timed("tokenised"):
                n_tokens = self._packer.add(part.text, is_end=part.is_end)
            self._epoch_tokens += n_tokens
            self._meter.count("read", n_tokens)
            self._meter.count("tokenised", n_tokens)
        return True


def check_lanes(corpus: Corpus, tokenizer: "Tokenizer", *, lanes: int, context_length: int, batch_tokens: int,
                n_ranks: int) -> None:  # fmt: skip
    """Refuse a lane without one full context, and name the largest number of lanes that works.

    It reads each lane only up to its first context.
    """
    short = _short_lane(corpus, tokenizer, lanes=lanes, context_length=context_length)
    if short is None:
        return
    for fewer in range(lanes - 1, 0, -1):
        fits = batch_tokens % fewer == 0 and fewer % n_ranks == 0
        if fits and _short_lane(corpus, tokenizer, lanes=fewer, context_length=context_length) is None:
            raise ConfigError(f"harvest.lanes={lanes}: lane {short} has less text than one context of "
                              f"harvest.context_length={context_length}. The largest that works is "
                              f"harvest.lanes={fewer}; or give more text.")  # fmt: skip
    raise DataError(f"harvest.lanes={lanes}: the corpus has less text than one context of harvest.context_length="
                    f"{context_length} for each lane, for any number of lanes. Give more text, or lower "
                    "harvest.context_length.")  # fmt: skip


def _short_lane(corpus: Corpus, tokenizer: "Tokenizer", *, lanes: int, context_length: int) -> int | None:
    """Return the index of the first lane whose text does not fill a context, or None."""
    stretches = corpus.stretches(lanes, context_length=context_length, tokenizer=tokenizer)
    for index in range(lanes):
        lane = Lane(index, stretches=stretches, corpus=corpus, tokenizer=tokenizer, context_length=context_length,
                    seed=0, repeat=False)  # fmt: skip
        if not len(lane.contexts(1)):
            return index
    return None

"""Lanes: independent readers of a corpus, each with its own documents, order and cursor.

Document i belongs to lane i mod lanes for good, so what a lane reads depends on neither ranks nor other lanes.
Letters: B contexts, T positions.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.errors import ConfigError, DataError
from sae_train.harvest.keys import keyed_order
from sae_train.harvest.text import Corpus

if TYPE_CHECKING:
    from sae_train.harvest.language_model import Tokenizer


class Packer:
    """Documents, each followed by an end token, cut into contexts that each begin with a beginning token."""

    def __init__(self, tokenizer: "Tokenizer", *, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._head = [] if tokenizer.bos is None else [tokenizer.bos]
        self._tail = [] if tokenizer.eos is None else [tokenizer.eos]
        self._body = context_length - len(self._head)
        self.tokens: list[int] = []

    @property
    def n_contexts(self) -> int:
        """Contexts that are full."""
        return len(self.tokens) // self._body

    def add(self, text: str) -> int:
        """Append a document; return how many tokens it has. Without any it leaves no end token either."""
        ids = self._tokenizer.encode(text)
        if ids:
            self.tokens += ids
            self.tokens += self._tail
        return len(ids)

    def take(self, n: int) -> Tensor:
        """Remove and return up to n full contexts, [B, T] int64."""
        n = min(n, self.n_contexts)
        body = torch.tensor(self.tokens[: n * self._body], dtype=torch.int64).view(n, self._body)
        del self.tokens[: n * self._body]
        head = torch.tensor(self._head, dtype=torch.int64).expand(n, -1)
        return torch.cat([head, body], dim=1)


class Lane:
    """One reader: its documents in an order keyed by (data.seed, epoch, lane), epoch after epoch.

    Its cursor is the epoch, the position in that epoch's order and the tokens read but not yet packed.
    """

    def __init__(self, index: int, *, lanes: int, corpus: Corpus, tokenizer: "Tokenizer", context_length: int,
                 seed: int, repeat: bool) -> None:  # fmt: skip
        self.index = index
        self._corpus, self._lanes, self._seed, self._repeat = corpus, lanes, seed, repeat
        self._n_documents = len(range(index, len(corpus), lanes))
        self._packer = Packer(tokenizer, context_length=context_length)
        self._epoch = self._position = 0
        self._epoch_tokens = 0
        self._order = self._draw_order()

    def contexts(self, n: int) -> Tensor:
        """Return the next n contexts [n, T] int64; fewer where `repeat` is off and the documents end."""
        while self._packer.n_contexts < n:
            if not self._read_document():
                break
        return self._packer.take(n)

    @property
    def has_ended(self) -> bool:
        """Whether no context is left, which only happens where `repeat` is off."""
        return not self._repeat and self._position == self._n_documents and not self._packer.n_contexts

    def state(self) -> dict[str, Tensor]:
        """Return the cursor as CPU tensors."""
        return {
            "cursor": torch.tensor([self._epoch, self._position, self._epoch_tokens]),
            "tokens": torch.tensor(self._packer.tokens, dtype=torch.int64),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go back to a cursor."""
        self._epoch, self._position, self._epoch_tokens = state["cursor"].tolist()
        self._packer.tokens = state["tokens"].tolist()
        self._order = self._draw_order()

    def _draw_order(self) -> Tensor:
        return keyed_order(self._n_documents, self._seed, "documents", self._epoch, self.index)

    def _read_document(self) -> bool:
        """Pack the next document; False when there is none and `repeat` is off."""
        if self._position == self._n_documents:
            if not self._repeat:
                return False
            if not self._epoch_tokens:
                raise DataError(f"lane {self.index} of harvest.lanes={self._lanes}: its documents hold no text. "
                                "Lower harvest.lanes.")  # fmt: skip
            self._epoch, self._position, self._epoch_tokens = self._epoch + 1, 0, 0
            self._order = self._draw_order()
        text = self._corpus[self.index + self._lanes * int(self._order[self._position])]
        self._position += 1
        if not self._corpus.holds_out(text):
            self._epoch_tokens += self._packer.add(text)
        return True


def check_lanes(corpus: Corpus, tokenizer: "Tokenizer", *, lanes: int, context_length: int, batch_tokens: int,
                n_ranks: int) -> None:  # fmt: skip
    """Refuse a lane without one full context, naming the largest number of lanes that works.

    Reads only as many tokens of each lane as settle the question.
    """
    body = context_length - (tokenizer.bos is not None)
    short = _short_lane(corpus, tokenizer, lanes=lanes, body=body)
    if short is None:
        return
    for fewer in range(lanes - 1, 0, -1):
        fits = batch_tokens % fewer == 0 and fewer % n_ranks == 0
        if fits and _short_lane(corpus.recut(fewer), tokenizer, lanes=fewer, body=body) is None:
            raise ConfigError(f"harvest.lanes={lanes}: lane {short} has less text than one context of "
                              f"harvest.context_length={context_length}. The largest that works is "
                              f"harvest.lanes={fewer}; or give more text.")  # fmt: skip
    raise DataError(f"harvest.lanes={lanes}: the corpus has less text than one context of harvest.context_length="
                    f"{context_length} for each lane, for any number of lanes. Give more text, or lower "
                    "harvest.context_length.")  # fmt: skip


def _short_lane(corpus: Corpus, tokenizer: "Tokenizer", *, lanes: int, body: int) -> int | None:
    """Return the first lane whose documents do not fill `body` tokens, or None."""
    for lane in range(lanes):
        total = 0
        for index in range(lane, len(corpus), lanes):
            total += _tokens_up_to(corpus[index], corpus, tokenizer, limit=body)
            if total >= body:
                break
        else:
            return lane
    return None


def _tokens_up_to(text: str, corpus: Corpus, tokenizer: "Tokenizer", *, limit: int) -> int:
    """Return how many tokens a document adds to its lane; no more than `limit` need counting."""
    if corpus.holds_out(text):
        return 0
    head = text[: 16 * limit]
    n = len(tokenizer.encode(head))
    if n < limit and len(head) < len(text):
        n = len(tokenizer.encode(text))
    return n + (n > 0 and tokenizer.eos is not None)

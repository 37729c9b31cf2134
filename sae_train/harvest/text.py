"""The corpus: documents by index, which of them are held out, and what is wrong with some.

A document is read in pieces, so that its length costs nothing: between a line end, a blank or a character's start near
`start` and one near `stop`. Whether it is held out is a matter of the whole document.
"""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_train.config import DataConfig
from sae_train.errors import DataError
from sae_train.harvest.documents import FLAWS, SCANNED_BYTES, SCANNED_DOCUMENTS, Document, Documents, Flaw
from sae_train.harvest.open_text import open_text
from sae_train.harvest.plain_text import LONGEST_CHARACTER, character_start
from sae_train.harvest.stretches import Stretches
from sae_train.phases import SILENT, Phases

if TYPE_CHECKING:
    from sae_train.harvest.language_model import Tokenizer

HELD_OUT_SHARE = 0.02
FINGERPRINTED = 16
"""Documents, spread evenly, whose hashes tell one corpus from another."""
COUNTED_BYTES = 4 * 1024 * 1024
"""Text up to this size is shared out over lanes by its tokens."""
LOOKED_AT, LOOKED_AT_BYTES = 100, 16 * 1024 * 1024
"""Of a text too large to be read whole the first documents, this many or this long at most; some must hold text."""
_HASH_RANGE = 2**64
_HELD_OUT_PIECE = 4 * 1024
_UNKNOWN, _TRAINING, _HELD_OUT = 0, 1, 2


class Part(NamedTuple):
    """A piece of a document."""

    text: str
    is_end: bool
    """Whether an end token belongs after it."""


class Corpus:
    """Training documents by index, some of which may be held out by a hash of their text.

    Indices count all documents. Up to `SCANNED_BYTES` of text are read whole when the corpus is opened; of more text,
    what is wrong with a document and whether it is held out is found when it is met.

    Attributes:
        flaw_N: uint8 [documents], a `Flaw` for each, as far as it was met.
        is_scanned: whether all were.
    """

    def __init__(self, data: DataConfig, phases: Phases = SILENT) -> None:
        self._data = data
        self._documents, self._held_out = open_text(data, phases)
        n_bytes, n = self._documents.n_bytes, len(self._documents)
        self.is_scanned = int(n_bytes.sum()) <= SCANNED_BYTES and n <= SCANNED_DOCUMENTS
        self._reason = ""
        self._n_tokens: Tensor | None = None
        self.flaw_N = torch.zeros(n, dtype=torch.uint8)
        if self._documents.is_exact:
            self.flaw_N[n_bytes == 0] = Flaw.EMPTY
        n_looked_at = n if self.is_scanned else _first_few(n_bytes)
        hash_N = np.zeros(n_looked_at, dtype=np.uint64)
        with phases.of("reading text", total=n_looked_at, unit="document"):
            for index in range(n_looked_at):
                hash_N[index] = self._meet(index)
                phases.advance(1)
        if data.strict and bool((self.flaw_N == Flaw.EMPTY).any()):
            self._meet(int((self.flaw_N == Flaw.EMPTY).nonzero()[0]))  # raises
        self._refuse_no_text(self.flaw_N[: len(hash_N)])
        self._last_held_out = -1 if self._held_out is not None else self._largest_held_out(hash_N)
        self._side_N = np.full(n, _UNKNOWN, dtype=np.uint8)
        if self._last_held_out < 0:
            self._side_N[:] = _TRAINING
        else:
            is_held_out = (hash_N <= np.uint64(self._last_held_out)) & self._has_text()[: len(hash_N)].numpy()
            self._side_N[: len(hash_N)] = np.where(is_held_out, _HELD_OUT, _TRAINING)

    def __len__(self) -> int:
        return len(self._documents)

    def holds_out(self, index: int) -> bool:
        """Return whether a document is kept out of training."""
        if self._side_N[index] == _UNKNOWN:
            is_held_out = self._meet(index) <= self._last_held_out and bool(self._has_text(index))
            self._side_N[index] = _HELD_OUT if is_held_out else _TRAINING
        return bool(self._side_N[index] == _HELD_OUT)

    def stretches(self, lanes: int, *, context_length: int, tokenizer: "Tokenizer") -> Stretches:
        """Return how the training text is shared out over lanes; only what is known to be held out is left out."""
        is_left_out = torch.from_numpy(self._side_N == _HELD_OUT)
        n_bytes = torch.where(is_left_out, 0, self._documents.n_bytes)
        n_tokens = self._count_tokens(tokenizer) if int(n_bytes.sum()) <= COUNTED_BYTES else None
        return Stretches(n_bytes, n_tokens=n_tokens, lanes=lanes, context_length=context_length, seed=self._data.seed)

    def part(self, index: int, start: int, stop: int, *, window: int) -> Part:
        """Return a document's text between the cuts near byte `start` and byte `stop`.

        A cut lies at the next line end, else blank, within `window` bytes, else at the next character. Parts that meet
        at a byte meet at its cut: nothing is lost or read twice.
        """
        low, high, size = self._place(self._documents, index, start, stop, window)
        is_end = high >= size > low and self._documents.ends_document(index)
        return Part(self._documents.slice(index, low, high).decode(errors="replace"), is_end)

    def held_out_parts(self) -> Iterator[Part]:
        """Yield the held-out documents in order, long ones in pieces."""
        documents = self._documents if self._held_out is None else self._held_out
        for index in range(len(documents)):
            if self._held_out is None and not self.holds_out(index):
                continue
            size = documents.size(index)
            cuts = [_cut(documents, index, at, size, _HELD_OUT_PIECE) for at in range(0, size, _HELD_OUT_PIECE)]
            for low, high in zip(cuts, [*cuts[1:], size], strict=True):
                text = documents.slice(index, low, high).decode(errors="replace")
                yield Part(text, high >= size > low and documents.ends_document(index))

    def fingerprint(self) -> list[int]:
        """Return numbers that change when the corpus does: how many documents, and hashes of a few of them."""
        last = len(self) - 1
        few = sorted({number * last // FINGERPRINTED for number in range(FINGERPRINTED + 1)})
        return [len(self), *(_hash(self._documents.read(index).data) >> 1 for index in few)]

    def counts(self, flaw_N: Tensor | None = None) -> dict[str, int]:
        """Return how many documents there are, and how many of each flaw.

        Args:
            flaw_N: what all ranks met; None: what this one did.
        """
        flaw_N = self.flaw_N if flaw_N is None else flaw_N
        return {"documents": len(self)} | {name: int((flaw_N == flaw).sum()) for flaw, name in FLAWS.items()}

    def notice(self, flaw_N: Tensor | None = None) -> str:
        """Return a line that says what is wrong with some documents; nothing where nothing is."""
        counts = self.counts(flaw_N)
        said = [f"{counts['empty']:,} empty or null (left out)" if counts["empty"] else "",
                f"{counts['repaired']:,} with bytes or characters that are not UTF-8 (replaced by U+FFFD)"
                if counts["repaired"] else "",
                f"{counts['unusable']:,} that hold no text (left out)" if counts["unusable"] else ""]  # fmt: skip
        found = ", ".join(filter(None, said))
        first = f" The first: {self._reason}" if self._reason else ""
        met = "" if self.is_scanned else " (those that were met)"
        return f"data.id={self._data.id}: of {len(self):,} documents{met} {found}.{first}" if found else ""

    def _count_tokens(self, tokenizer: "Tokenizer") -> Tensor:
        """Return how many tokens each document has, int64 [documents]; counted once."""
        if self._n_tokens is None:
            texts = [self._documents.read(index).data.decode(errors="replace") for index in range(len(self))]
            self._n_tokens = torch.tensor(tokenizer.lengths(texts), dtype=torch.int64)
        return self._n_tokens

    def _meet(self, index: int) -> int:
        """Read a document whole; note what is wrong with it and return its hash.

        Raises:
            DataError: something is, and data.strict=true.
        """
        document = self._documents.read(index)
        if document.flaw != Flaw.NONE:
            self._note(index, document)
        return _hash(document.data)

    def _note(self, index: int, document: Document) -> None:
        if self._data.strict:
            reason = document.reason.rstrip(".")
            raise DataError(f"{reason}. data.strict=true takes no such document; false counts it and goes on.")
        self.flaw_N[index] = document.flaw
        if document.flaw != Flaw.EMPTY:
            self._reason = self._reason or document.reason

    def _has_text(self, index: int | slice = slice(None)) -> Tensor:
        """Return whether documents hold any text, as far as they were met: bool, [documents] or of one."""
        flaw = self.flaw_N[index]
        return (flaw != Flaw.EMPTY) & (flaw != Flaw.UNUSABLE)

    def _refuse_no_text(self, flaw_N: Tensor) -> None:
        """Refuse a corpus in which nothing that was looked at is text: a wrong column, more likely than bad data.

        Raises:
            DataError: see above.
        """
        if bool((flaw_N == Flaw.UNUSABLE).any()) and not self._has_text(slice(len(flaw_N))).any():
            raise DataError(self._reason)
        if not self._has_text().any():
            raise DataError(f"data.id={self._data.id}: holds no text.")

    def _largest_held_out(self, hash_N: NDArray[np.uint64]) -> int:
        """Return the largest hash that is held out: 2% of all hashes are, or as many as hold out two documents.

        Raises:
            DataError: that leaves nothing to train on.
        """
        below = int(HELD_OUT_SHARE * _HASH_RANGE)
        smallest: list[int] = []
        largest = 0
        for index in range(len(self)):
            found = int(hash_N[index]) if index < len(hash_N) else self._meet(index)
            if not self._has_text(index):
                continue
            smallest = sorted([*smallest, found])[:2]
            largest = max(largest, found)
            if len(smallest) == 2 and smallest[1] < below:
                return below - 1
        if not smallest:
            raise DataError(f"data.id={self._data.id}: holds no text.")
        if largest <= smallest[-1]:
            raise DataError(f"data.id={self._data.id}: {len(self)} documents leave none to train on once two are "
                            "held out. Give more, or held-out ones of their own as data.held_out_split.")  # fmt: skip
        return smallest[-1]

    def _place(self, documents: Documents, index: int, start: int, stop: int, window: int) -> tuple[int, int, int]:
        """Return the cuts near `start` and `stop`, and the document's size.

        Where lengths are estimates, as bytes of the file, the places are taken to the same share of the text itself.
        """
        size = documents.size(index)
        if not documents.is_exact:
            estimate = int(documents.n_bytes[index])
            start, stop = start * size // estimate, stop * size // estimate
        return _cut(documents, index, start, size, window), _cut(documents, index, stop, size, window), size


def _first_few(n_bytes: Tensor) -> int:
    """Return how many documents are looked at when a text too large to be read whole is opened."""
    within = int((n_bytes[:LOOKED_AT].cumsum(0) <= LOOKED_AT_BYTES).sum())
    return min(len(n_bytes), max(1, within))


def _cut(documents: Documents, index: int, target: int, size: int, window: int) -> int:
    """Return where a document is cut near `target`: never before it, and never earlier than for a smaller target."""
    if target <= 0 or target >= size:
        return min(max(target, 0), size)
    near = documents.slice(index, target - 1, min(size, target + max(window, LONGEST_CHARACTER)))
    searched = near[: window + 1]
    line_end = searched.find(b"\n")
    if line_end >= 0:
        return target + line_end
    blank = searched.find(b" ", 1)
    if blank >= 0:
        return target - 1 + blank  # a blank goes with the word behind it, as tokenizers have it
    return target - 1 + character_start(near, 1, len(near))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")

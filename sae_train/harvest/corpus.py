"""The corpus: documents by index, the held-out ones among them, and the flaws of some.

A document is read in pieces, so that long documents cost no memory. Pieces are cut at a line end, a blank or the start
of a character. A document is held out as a whole.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_train.config import DataConfig
from sae_train.errors import DataError
from sae_train.harvest.documents import Documents
from sae_train.harvest.inspected_documents import InspectedDocuments
from sae_train.harvest.open_text import open_text
from sae_train.harvest.plain_text import LONGEST_CHARACTER, character_start
from sae_train.harvest.stretches import Stretches
from sae_train.phases import SILENT, Phases

if TYPE_CHECKING:
    from sae_train.harvest.language_model import Tokenizer

HELD_OUT_SHARE = 0.02
FINGERPRINTED = 16
"""Documents, spread evenly, whose hashes identify a corpus."""
MEASURED_PIECES, MEASURED_BYTES, LEAST_SAMPLE = 16_000, 1024 * 1024, 128
"""A text of at most so many pieces is dealt to lanes by tokens, not bytes: most pieces, bytes tokenised in all, and
least bytes of each piece. With more pieces, every lane has enough of them for bytes to serve as well."""
_HASH_RANGE = 2**64
_HELD_OUT_PIECE = 4 * 1024
_UNKNOWN, _TRAINING, _HELD_OUT = 0, 1, 2


class Part(NamedTuple):
    """A piece of a document's text. `Corpus` returns it, and `Packer` tokenises it."""

    text: str
    is_end: bool
    """Whether an end token belongs after the piece."""


class Corpus:
    """Training documents by index, some of which may be held out by a hash of their text.

    `check_stream` opens it. Lanes read the training text, and `TextHeldOut` the held-out text. Indices count all
    documents. Up to `SCANNED_BYTES` of text are read whole when the corpus is opened. In a larger text, flaws and
    held-out documents are found as documents are read.
    """

    def __init__(self, data: DataConfig, phases: Phases = SILENT) -> None:
        self._data = data
        training, held_out = open_text(data, phases)
        self._training = InspectedDocuments(training, source=f"data.id={data.id}", strict=data.strict, phases=phases)
        self._held_out: InspectedDocuments | None = None
        if held_out is not None:
            source = f"data.held_out_split={data.held_out_split or data.id}"
            self._held_out = InspectedDocuments(held_out, source=source, strict=data.strict, phases=phases)
        self._largest_held_out = -1 if self._held_out is not None else self._find_largest_held_out()
        self._side_N = np.full(len(training), _UNKNOWN, dtype=np.uint8)
        for index in self._training.sampled:
            self._decide(index, int(self._training.hash_N[index]))
        is_left_out = torch.from_numpy(self._side_N == _HELD_OUT)
        self._n_bytes = torch.where(is_left_out, 0, training.n_bytes)
        self._shared_out: tuple[tuple[int, int], Stretches] | None = None
        self._fingerprint = self._find_fingerprint()

    def __len__(self) -> int:
        return len(self._training)

    @property
    def revision(self) -> str | None:
        """Commit of the dataset on the Hub. None for other texts."""
        return self._training.documents.revision

    def holds_out(self, index: int) -> bool:
        """Return whether a document is kept out of training."""
        if self._side_N[index] == _UNKNOWN:
            self._decide(index, self._training.inspect(index))
        return bool(self._side_N[index] == _HELD_OUT)

    def stretches(self, lanes: int, *, context_length: int, tokenizer: "Tokenizer") -> Stretches:
        """Return each lane's share of the training text. The last result is cached.

        Documents that were held out when the corpus was opened are left out.
        """
        asked = lanes, context_length
        if self._shared_out is None or self._shared_out[0] != asked:
            measure = partial(self._measure, tokenizer)
            found = Stretches(self._n_bytes, measure=measure, lanes=lanes, context_length=context_length,
                              seed=self._data.seed)  # fmt: skip
            self._shared_out = asked, found
        return self._shared_out[1]

    def part(self, index: int, start: int, stop: int, *, window: int) -> Part:
        """Return a document's text between the cuts near byte `start` and byte `stop`.

        A cut is at the next line end within `window` bytes, else at the next blank within them, else at the next
        character. Two parts with a common byte limit have a common cut: no text is lost or read twice.
        """
        documents = self._training.documents
        low, high, size = _place(documents, index, start, stop, window)
        is_end = high >= size > low and documents.ends_document(index)
        return Part(documents.slice(index, low, high).decode(errors="replace"), is_end)

    def held_out_parts(self) -> Iterator[Part]:
        """Yield the held-out documents in order, long ones in pieces."""
        inspected = self._training if self._held_out is None else self._held_out
        documents = inspected.documents
        for index in range(len(inspected)):
            if self._held_out is None and not self.holds_out(index):
                continue
            if self._held_out is not None and not inspected.is_scanned:
                inspected.inspect(index)
            size, low = documents.size(index), 0
            while low < size:
                high = _cut(documents, index, low + _HELD_OUT_PIECE, size, _HELD_OUT_PIECE)
                text = documents.slice(index, low, high).decode(errors="replace")
                yield Part(text, high >= size and documents.ends_document(index))
                low = high

    def fingerprint(self) -> list[int]:
        """Return numbers that identify the corpus: the number of documents, and hashes of a few of them."""
        return list(self._fingerprint)

    @property
    def flaw_N(self) -> Tensor:
        """uint8 [documents], the `Flaw` of each training document that was inspected so far."""
        return self._training.flaw_N

    def counts(self, flaw_N: Tensor | None = None) -> dict[str, int]:
        """Return the numbers of documents and of documents with each flaw, for training and for held-out files.

        Args:
            flaw_N: flaws that all ranks found in training documents; None: those that this rank found.
        """
        held_out = {} if self._held_out is None else self._held_out.counts()
        return self._training.counts(flaw_N) | {f"held_out_{name}": count for name, count in held_out.items()}

    def notices(self, flaw_N: Tensor | None = None) -> list[str]:
        """Return a line about the flaws of the training text, and one about those of held-out files.

        Args:
            flaw_N: flaws that all ranks found in training documents; None: those that this rank found.
        """
        lines = [self._training.notice(flaw_N), "" if self._held_out is None else self._held_out.notice()]
        return [line for line in lines if line]

    def _decide(self, index: int, found: int) -> None:
        """Decide whether a document with the hash `found` is held out."""
        is_held_out = found <= self._largest_held_out and bool(self._training.has_text(index))
        self._side_N[index] = _HELD_OUT if is_held_out else _TRAINING

    def _measure(self, tokenizer: "Tokenizer", segments: Tensor) -> Tensor | None:
        """Return the estimated tokens of pieces [P, 3], int64 [P], from a sample of each. None: measure in bytes."""
        if not 0 < len(segments) <= MEASURED_PIECES or not self._training.documents.is_exact:
            return None
        sample = max(LEAST_SAMPLE, MEASURED_BYTES // len(segments))
        texts, n_bytes = [], []
        for document, start, stop in segments.tolist():
            first = start + max(0, stop - start - sample) // 2
            data = self._training.documents.slice(document, first, min(stop, first + sample))
            texts.append(data.decode(errors="ignore"))
            n_bytes.append(max(1, len(data)))
        tokens = torch.tensor(tokenizer.lengths(texts), dtype=torch.float64)
        length = segments[:, 2] - segments[:, 1]
        return (tokens * length / torch.tensor(n_bytes)).round().long()

    def _find_fingerprint(self) -> list[int]:
        last = len(self) - 1
        few = sorted({number * last // FINGERPRINTED for number in range(FINGERPRINTED + 1)})
        return [len(self), *(self._training.inspect(index) >> 1 for index in few)]

    def _find_largest_held_out(self) -> int:
        """Return the largest hash that is held out. It covers 2% of all hashes, and at least two documents.

        Raises:
            DataError: nothing is left to train on.
        """
        training, below = self._training, int(HELD_OUT_SHARE * _HASH_RANGE)
        smallest: list[int] = []
        largest = 0
        for index in range(len(self)):
            found = int(training.hash_N[index]) if training.is_scanned else training.inspect(index)
            if not training.has_text(index):
                continue
            smallest = sorted([*smallest, found])[:2]
            largest = max(largest, found)
            if len(smallest) == 2 and smallest[1] < below:
                return below - 1
        if not smallest:
            raise DataError(f"data.id={self._data.id}: holds no text.")
        if largest <= smallest[-1]:
            raise DataError(f"data.id={self._data.id}: {len(self)} documents leave none to train on once two are "
                            "held out. Give more that differ, or held-out ones of their own as "
                            "data.held_out_split.")  # fmt: skip
        return smallest[-1]


def _place(documents: Documents, index: int, start: int, stop: int, window: int) -> tuple[int, int, int]:
    """Return the cuts near `start` and `stop`, and the document's size.

    Where lengths are estimates, such as bytes of the file, both are moved to the same share of the text itself.
    """
    size = documents.size(index)
    if not documents.is_exact:
        estimate = int(documents.n_bytes[index])
        start, stop = start * size // estimate, stop * size // estimate
    return _cut(documents, index, start, size, window), _cut(documents, index, stop, size, window), size


def _cut(documents: Documents, index: int, target: int, size: int, window: int) -> int:
    """Return the byte of the cut near `target`. It is at `target` or later, and grows with `target`."""
    if target <= 0 or target >= size:
        return min(max(target, 0), size)
    near = documents.slice(index, target - 1, min(size, target + max(window, LONGEST_CHARACTER)))
    searched = near[: window + 1]
    line_end = searched.find(b"\n")
    if line_end >= 0:
        return target + line_end
    blank = searched.find(b" ", 1)
    if blank >= 0:
        return target - 1 + blank  # a blank belongs to the next word, as in tokenizers
    return target - 1 + character_start(near, 1, len(near))

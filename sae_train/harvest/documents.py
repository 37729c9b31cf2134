"""Documents by index: the interface of every source of text, and the flaws that a document may have.

Every file of text is a `Documents` of its own (json_lines.py, plain_text.py, dataset_rows.py); the corpus joins them.
Nothing here raises for a bad document. The corpus counts it, and refuses it under `data.strict=true`.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCANNED_BYTES = 256 * 1024 * 1024
SCANNED_DOCUMENTS = 1_000_000
"""Text up to this size is read whole when it is opened, so that its flaws are found before training."""


class Flaw:
    """Flaws of a document, as uint8 in the corpus's table."""

    NONE = 0
    EMPTY = 1
    """The document is null or holds no characters."""
    REPAIRED = 2
    """Bytes that are not UTF-8, or lone surrogates, became U+FFFD."""
    UNUSABLE = 3
    """The document is not text: a line that is not JSON, a row without the column, a number."""


FLAWS = {Flaw.EMPTY: "empty", Flaw.REPAIRED: "repaired", Flaw.UNUSABLE: "unusable"}
"""Names of the flaws, as the summary counts them."""


class Document(NamedTuple):
    """One document as `Documents.read` returns it."""

    data: bytes
    """The text in UTF-8, empty where there is none. A repaired text may hold bytes that decoding replaces."""
    flaw: int = Flaw.NONE
    reason: str = ""
    """The flaw and its place in the file, for messages."""


class Documents(ABC):
    """Texts by index. `open_text` creates one for each file or dataset, and `InspectedDocuments` reads it.

    Attributes:
        n_bytes: int64 [documents], lengths of the texts in UTF-8; upper bounds where `is_exact` is false.
        is_exact: whether `n_bytes` are exact, so that 0 means empty.
        revision: commit of the dataset on the Hub. None for other texts.
    """

    n_bytes: Tensor
    is_exact: bool
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.n_bytes)

    @abstractmethod
    def read(self, index: int) -> Document:
        """Return a whole document."""

    @abstractmethod
    def slice(self, index: int, start: int, stop: int) -> bytes:
        """Return bytes start..stop of a document's text, as far as it reaches, at the cost of a bounded piece."""

    def size(self, index: int) -> int:
        """Return the length of a document's text in bytes."""
        return int(self.n_bytes[index])

    def ends_document(self, index: int) -> bool:
        """Return whether an end token belongs after this text. The parts of one text file have none between them."""
        return True


class Joined(Documents):
    """Several sources of text, one after the other. `open_text` joins the files of a corpus."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = list(parts)
        self._ends: list[int] = []
        for part in self._parts:
            self._ends.append(len(part) + (self._ends[-1] if self._ends else 0))
        self.n_bytes = torch.cat([torch.empty(0, dtype=torch.int64), *(part.n_bytes for part in self._parts)])
        self.is_exact = all(part.is_exact for part in self._parts)

    def read(self, index: int) -> Document:
        part, place = self._find(index)
        return part.read(place)

    def slice(self, index: int, start: int, stop: int) -> bytes:
        part, place = self._find(index)
        return part.slice(place, start, stop)

    def size(self, index: int) -> int:
        part, place = self._find(index)
        return part.size(place)

    def ends_document(self, index: int) -> bool:
        part, place = self._find(index)
        return part.ends_document(place)

    def _find(self, index: int) -> tuple[Documents, int]:
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

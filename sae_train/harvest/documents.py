"""Documents by index: what every source of text offers, and what can be wrong with one document.

Every file of text is a `Documents` of its own (json_lines.py, plain_text.py, dataset_rows.py); the corpus joins them.
Nothing here raises for a bad document: it is counted, and `data.strict=true` turns it into an error in the corpus.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SCANNED_BYTES = 256 * 1024 * 1024
SCANNED_DOCUMENTS = 1_000_000
"""Text up to this size is read whole when it is opened, so that what is wrong with it is found before training."""


class Flaw:
    """What can be wrong with a document; a uint8 in the corpus's table."""

    NONE = 0
    EMPTY = 1
    """It is null or holds no characters."""
    REPAIRED = 2
    """Bytes that are not UTF-8, or lone surrogates, became U+FFFD."""
    UNUSABLE = 3
    """It is no text: a line that is not JSON, a row without the column, a number."""


FLAWS = {Flaw.EMPTY: "empty", Flaw.REPAIRED: "repaired", Flaw.UNUSABLE: "unusable"}
"""Names of the flaws, as the summary counts them."""


class Document(NamedTuple):
    """One document as it was read."""

    data: bytes
    """Its text in UTF-8, but for the bytes of a repaired one that decoding replaces; empty where there is none."""
    flaw: int = Flaw.NONE
    reason: str = ""
    """What is wrong with it, and where it stands; for messages."""


class Documents(ABC):
    """Texts by index.

    Attributes:
        n_bytes: int64 [documents], how long each text is in UTF-8; an upper bound where `is_exact` is false.
        is_exact: whether `n_bytes` are the lengths themselves, so that 0 means empty.
    """

    n_bytes: Tensor
    is_exact: bool

    def __len__(self) -> int:
        return len(self.n_bytes)

    @abstractmethod
    def read(self, index: int) -> Document:
        """Return a whole document."""

    @abstractmethod
    def slice(self, index: int, start: int, stop: int) -> bytes:
        """Return bytes start..stop of a document's text, cut off at its end; costs no more than a bounded piece."""

    def size(self, index: int) -> int:
        """Return how long a document's text is, in bytes."""
        return int(self.n_bytes[index])

    def ends_document(self, index: int) -> bool:
        """Return whether an end token belongs after this text; not between the parts of one text file."""
        return True


class Joined(Documents):
    """Several sources one after the other."""

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

"""Documents and what is wrong with some of them: met one by one, all of them at once where the text is small."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.documents import FLAWS, SCANNED_BYTES, SCANNED_DOCUMENTS, Document, Documents, Flaw
from sae_train.phases import Phases

LOOKED_AT, LOOKED_AT_BYTES = 100, 16 * 1024 * 1024
"""Of a text too large to be read whole so many documents, spread evenly, up to so many bytes; some must hold text."""
_WORDS = {
    Flaw.EMPTY: "empty or null (left out)",
    Flaw.REPAIRED: "with bytes or characters that are not UTF-8 (replaced by U+FFFD)",
    Flaw.UNUSABLE: "that hold no text (left out)",
}


class InspectedDocuments:
    """Documents with a table of their flaws. The corpus has one for what is trained on, one for held-out files.

    Attributes:
        documents: the texts.
        is_scanned: whether all were met when this was made.
        flaw_N: uint8 [documents], a `Flaw` for each, as far as it was met.
        hash_N: uint64 [documents], of their texts; 0 for those that were not met when this was made.
    """

    def __init__(self, documents: Documents, *, source: str, strict: bool, phases: Phases) -> None:
        """Meet all documents, or of a large text a few.

        Args:
            documents: the texts.
            source: the setting that named them, for messages.
            strict: whether a flaw is an error.
            phases: told how many were met.

        Raises:
            DataError: none of those that were met holds text: a wrong column, more likely than bad data.
        """
        self.documents, self._source, self._strict, self._reason = documents, source, strict, ""
        n_bytes, n = documents.n_bytes, len(documents)
        self.is_scanned = int(n_bytes.sum()) <= SCANNED_BYTES and n <= SCANNED_DOCUMENTS
        self.flaw_N = torch.zeros(n, dtype=torch.uint8)
        if documents.is_exact:
            self.flaw_N[n_bytes == 0] = Flaw.EMPTY
        self.hash_N = np.zeros(n, dtype=np.uint64)
        self.met = list(range(n)) if self.is_scanned else _a_few(n_bytes)
        with phases.of("reading text", total=len(self.met), unit="document"):
            for index in self.met:
                self.hash_N[index] = self.meet(index)
                phases.advance(1)
        if strict and bool((self.flaw_N == Flaw.EMPTY).any()):
            self.meet(int((self.flaw_N == Flaw.EMPTY).nonzero()[0]))  # raises
        self._refuse_no_text()

    def __len__(self) -> int:
        return len(self.documents)

    def meet(self, index: int) -> int:
        """Read a document whole; note what is wrong with it and return its hash.

        Raises:
            DataError: something is, and data.strict=true.
        """
        document = self.documents.read(index)
        if document.flaw != Flaw.NONE:
            self._note(index, document)
        return int.from_bytes(hashlib.blake2b(document.data, digest_size=8).digest(), "big")

    def has_text(self, index: int | slice = slice(None)) -> Tensor:
        """Return whether documents hold any text, as far as they were met: bool, of one or [documents]."""
        flaw = self.flaw_N[index]
        return (flaw != Flaw.EMPTY) & (flaw != Flaw.UNUSABLE)

    def counts(self, flaw_N: Tensor | None = None) -> dict[str, int]:
        """Return how many documents there are, and how many of each flaw.

        Args:
            flaw_N: what all ranks met; None: what this one did.
        """
        flaw_N = self.flaw_N if flaw_N is None else flaw_N
        return {"documents": len(self)} | {name: int((flaw_N == flaw).sum()) for flaw, name in FLAWS.items()}

    def notice(self, flaw_N: Tensor | None = None) -> str:
        """Return a line that says what is wrong with some documents; nothing where nothing is. Arguments as above."""
        counts = self.counts(flaw_N)
        found = [f"{counts[FLAWS[flaw]]:,} {words}" for flaw, words in _WORDS.items() if counts[FLAWS[flaw]]]
        first = f" The first: {self._reason}" if self._reason else ""
        met = "" if self.is_scanned else " (those that were met)"
        return f"{self._source}: of {len(self):,} documents{met} {', '.join(found)}.{first}" if found else ""

    def _note(self, index: int, document: Document) -> None:
        if self._strict:
            reason = document.reason.rstrip(".")
            raise DataError(f"{reason}. data.strict=true takes no such document; false counts it and goes on.")
        self.flaw_N[index] = document.flaw
        if document.flaw != Flaw.EMPTY:
            self._reason = self._reason or document.reason

    def _refuse_no_text(self) -> None:
        if bool((self.flaw_N[self.met] == Flaw.UNUSABLE).any()) and not bool(self.has_text()[self.met].any()):
            raise DataError(self._reason)
        if not bool(self.has_text().any()):
            raise DataError(f"{self._source}: holds no text.")


def _a_few(n_bytes: Tensor) -> list[int]:
    """Return the indices of the documents that are met when a text too large to be read whole is opened."""
    spread = sorted({number * len(n_bytes) // LOOKED_AT for number in range(LOOKED_AT)})
    within = int((n_bytes[spread].cumsum(0) <= LOOKED_AT_BYTES).sum())
    return spread[: max(1, within)]

"""Documents and the flaws of some of them. Small texts are inspected whole, larger ones document by document."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.documents import FLAWS, SCANNED_BYTES, SCANNED_DOCUMENTS, Document, Documents, Flaw
from sae_train.phases import Phases

SAMPLED_DOCUMENTS, SAMPLED_BYTES = 100, 16 * 1024 * 1024
"""Documents of a large text that are inspected when it is opened, spread evenly, and their bytes at most."""
_WORDS = {
    Flaw.EMPTY: "empty or null (left out)",
    Flaw.REPAIRED: "with bytes or characters that are not UTF-8 (replaced by U+FFFD)",
    Flaw.UNUSABLE: "that hold no text (left out)",
}


class InspectedDocuments:
    """Documents with a table of their flaws. `Corpus` creates one for training, and one for held-out files.

    Attributes:
        documents: the texts.
        is_scanned: whether all documents were inspected when this was created.
        sampled: indices of the documents that were inspected then.
        flaw_N: uint8 [documents], the `Flaw` of each document that was inspected so far.
        hash_N: uint64 [documents], hashes of the texts; 0 for documents outside `sampled`.
    """

    def __init__(self, documents: Documents, *, source: str, strict: bool, phases: Phases) -> None:
        """Inspect all documents, or a few of a large text.

        Args:
            documents: the texts.
            source: the setting that named them, for messages.
            strict: whether a flaw is an error.
            phases: shows the progress.

        Raises:
            DataError: none of the inspected documents holds text. The likely cause is a wrong column.
        """
        self.documents, self._source, self._strict, self._reason = documents, source, strict, ""
        n_bytes, n = documents.n_bytes, len(documents)
        self.is_scanned = int(n_bytes.sum()) <= SCANNED_BYTES and n <= SCANNED_DOCUMENTS
        self.flaw_N = torch.zeros(n, dtype=torch.uint8)
        if documents.is_exact:
            self.flaw_N[n_bytes == 0] = Flaw.EMPTY
        self.hash_N = np.zeros(n, dtype=np.uint64)
        self.sampled = list(range(n)) if self.is_scanned else _a_few(n_bytes)
        with phases.of("reading text", total=len(self.sampled), unit="document"):
            for index in self.sampled:
                self.hash_N[index] = self.inspect(index)
                phases.advance(1)
        if strict and bool((self.flaw_N == Flaw.EMPTY).any()):
            self.inspect(int((self.flaw_N == Flaw.EMPTY).nonzero()[0]))  # raises
        self._refuse_no_text()

    def __len__(self) -> int:
        return len(self.documents)

    def inspect(self, index: int) -> int:
        """Read a whole document, record its flaw and return its hash.

        Raises:
            DataError: it has a flaw, and data.strict=true.
        """
        document = self.documents.read(index)
        if document.flaw != Flaw.NONE:
            self._record(index, document)
        return int.from_bytes(hashlib.blake2b(document.data, digest_size=8).digest(), "big")

    def has_text(self, index: int | slice = slice(None)) -> Tensor:
        """Return bool, for one document or [documents]: false for those that were found to hold no text."""
        flaw = self.flaw_N[index]
        return (flaw != Flaw.EMPTY) & (flaw != Flaw.UNUSABLE)

    def counts(self, flaw_N: Tensor | None = None) -> dict[str, int]:
        """Return the number of documents, and the number with each flaw.

        Args:
            flaw_N: flaws that all ranks found; None: those that this rank found.
        """
        flaw_N = self.flaw_N if flaw_N is None else flaw_N
        return {"documents": len(self)} | {name: int((flaw_N == flaw).sum()) for flaw, name in FLAWS.items()}

    def notice(self, flaw_N: Tensor | None = None) -> str:
        """Return a line about the flaws of documents, or '' where there are none.

        Args:
            flaw_N: flaws that all ranks found; None: those that this rank found.
        """
        counts = self.counts(flaw_N)
        found = [f"{counts[FLAWS[flaw]]:,} {words}" for flaw, words in _WORDS.items() if counts[FLAWS[flaw]]]
        first = f" The first: {self._reason}" if self._reason else ""
        met = "" if self.is_scanned else " (those that were read)"
        return f"{self._source}: of {len(self):,} documents{met} {', '.join(found)}.{first}" if found else ""

    def _record(self, index: int, document: Document) -> None:
        if self._strict:
            reason = document.reason.rstrip(".")
            raise DataError(f"{reason}. data.strict=true takes no such document; false counts it and goes on.")
        self.flaw_N[index] = document.flaw
        if document.flaw != Flaw.EMPTY:
            self._reason = self._reason or document.reason

    def _refuse_no_text(self) -> None:
        if bool((self.flaw_N[self.sampled] == Flaw.UNUSABLE).any()) and not bool(self.has_text()[self.sampled].any()):
            raise DataError(self._reason)
        if not bool(self.has_text().any()):
            raise DataError(f"{self._source}: holds no text.")


def _a_few(n_bytes: Tensor) -> list[int]:
    """Return the indices of the documents of a large text that are inspected when it is opened."""
    spread = sorted({number * len(n_bytes) // SAMPLED_DOCUMENTS for number in range(SAMPLED_DOCUMENTS)})
    within = int((n_bytes[spread].cumsum(0) <= SAMPLED_BYTES).sum())
    return spread[: max(1, within)]

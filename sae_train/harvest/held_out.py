"""Held-out activations: never trained on, halved by context into a calibration and an evaluation half.

Even contexts set thresholds, and odd ones give every exported figure. The rows of files are halved by blocks.
Letters: B contexts, T positions, N tokens, D d_model.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sae_train.config.harvest import HELD_OUT_BLOCK
from sae_train.errors import DataError
from sae_train.harvest.corpus import Part
from sae_train.harvest.filter import check_finite, trainable, within
from sae_train.harvest.lanes import Packer
from sae_train.ranks.interface import Ranks

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel, Tokenizer
    from sae_train.harvest.tensor_files import TensorTable

Half = Literal["calibration", "evaluation"]
HALVES: tuple[Half, Half] = ("calibration", "evaluation")
_BLOCKS_A_BATCH = 16
"""Blocks of rows of files that are read together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutRows:
    """The activations of some contexts at one site. `HeldOutBatch` holds one for each site."""

    raw_ND: Tensor
    """[N, D] fp32 raw activations of the kept tokens."""
    context_N: Tensor
    """[N] int64 context of each kept token, unique over the held-out data (files: block of 256 rows)."""
    kept_BT: Tensor | None
    """[B, T] bool: true for the tokens in `raw_ND`, in order. None for files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutBatch:
    """The activations of some contexts, on the rank's device. `HeldOut` yields it, and evaluation reads it."""

    sites: dict[str, HeldOutRows]
    """Rows of each site that was asked for, by label. A row over a site's outlier limit is left out at that site."""
    ids_BT: Tensor | None
    """[B, T] int64 token ids. None for files."""
    logits_BTV: Tensor | None = None
    """[B, T, V] logits of the forward pass that gave the rows. None unless `batches` was called `with_logits`."""


class HeldOut(ABC):
    """Held-out activations in two halves. A stream creates it; calibration and evaluation read it.

    Attributes:
        limits: the outlier limit of each site, by label. The stream sets them once its scalings are fixed.
    """

    limits: dict[str, float]

    @abstractmethod
    def batches(self, half: Half, *, max_tokens: int, ranks: Ranks, sites: Collection[str] | None = None,
                with_logits: bool = False) -> Iterator[HeldOutBatch]:  # fmt: skip
        """Yield this rank's share of a half.

        Args:
            half: which half.
            max_tokens: tokens over all ranks. Whole contexts are read until they hold as many, or all are read.
            ranks: the ranks that the batches are dealt to: batch i belongs to rank i % size.
            sites: labels of the sites whose rows the batches hold; None: all.
            with_logits: whether batches of text hold the language model's logits.
        """

    @abstractmethod
    def n_tokens(self, half: Half, *, max_tokens: int) -> int:
        """Return the number of tokens that `batches` yields over all ranks, outliers included."""


class TextHeldOut(HeldOut):
    """Held-out text, run through the language model when it is read. `LiveStream` creates it."""

    def __init__(self, parts: Iterator[Part], *, language_model: "LanguageModel", tokenizer: "Tokenizer",
                 context_length: int, contexts_per_batch: int) -> None:  # fmt: skip
        self._contexts = HeldOutContexts(parts, tokenizer=tokenizer, context_length=context_length)
        self._language_model, self._tokenizer = language_model, tokenizer
        self._contexts_per_batch = contexts_per_batch

    def batches(self, half: Half, *, max_tokens: int, ranks: Ranks, sites: Collection[str] | None = None,
                with_logits: bool = False) -> Iterator[HeldOutBatch]:  # fmt: skip
        chosen = self._contexts.of_half(half, max_tokens=max_tokens)
        size = self._contexts_per_batch
        for number, start in enumerate(range(0, len(chosen), size)):
            if number % ranks.size == ranks.rank:
                yield self._harvest(chosen[start : start + size], sites, with_logits=with_logits)

    def n_tokens(self, half: Half, *, max_tokens: int) -> int:
        return sum(map(self._contexts.n_trainable, self._contexts.of_half(half, max_tokens=max_tokens)))

    def _harvest(self, chosen: list[int], sites: Collection[str] | None, *, with_logits: bool) -> HeldOutBatch:
        model, logits_BTV = self._language_model, None
        ids_BT = torch.stack([self._contexts[index] for index in chosen]).to(model.device)
        if with_logits:
            raw, logits_BTV = model.activations_and_logits(ids_BT, sites)
        else:
            raw = model.activations(ids_BT, sites)
        trainable_BT = trainable(ids_BT, self._tokenizer)
        check_finite({label: [raw_BTD[trainable_BT]] for label, raw_BTD in raw.items()}, language_model=model)
        context_BT = torch.tensor(chosen, device=model.device)[:, None].expand_as(ids_BT)
        rows = {}
        for label, raw_BTD in raw.items():
            kept_BT = trainable_BT & within(raw_BTD, limit=self.limits[label])
            rows[label] = HeldOutRows(raw_ND=raw_BTD[kept_BT].float(), context_N=context_BT[kept_BT], kept_BT=kept_BT)
        return HeldOutBatch(sites=rows, ids_BT=ids_BT, logits_BTV=logits_BTV)


class HeldOutContexts:
    """Held-out documents packed into contexts, tokenised as far as `TextHeldOut` has read them."""

    def __init__(self, parts: Iterator[Part], *, tokenizer: "Tokenizer", context_length: int) -> None:
        self._parts, self._tokenizer = parts, tokenizer
        self._packer = Packer(tokenizer, context_length=context_length)
        self._ids: list[Tensor] = []
        self._trainable: list[int] = []
        if not self._read(2):
            raise DataError(
                f"held-out text is shorter than two contexts of {context_length} tokens, and one half sets thresholds "
                "while the other is evaluated. Give more text, name data.held_out_split, or lower "
                "harvest.context_length."
            )

    def __getitem__(self, index: int) -> Tensor:
        return self._ids[index]

    def n_trainable(self, index: int) -> int:
        """Return the number of trainable tokens of a context."""
        return self._trainable[index]

    def of_half(self, half: Half, *, max_tokens: int) -> list[int]:
        """Return the first contexts of a half that hold `max_tokens` trainable tokens together, or all of them."""
        chosen: list[int] = []
        total, index = 0, HALVES.index(half)
        while total < max_tokens and self._read(index + 1):
            chosen.append(index)
            total += self._trainable[index]
            index += 2
        return chosen

    def _read(self, n_contexts: int) -> bool:
        """Tokenise until `n_contexts` contexts are packed. Return False where the text ends before."""
        while len(self._ids) < n_contexts:
            context = self._packer.take(1)
            if len(context):
                self._ids.append(context[0])
                self._trainable.append(int(trainable(context, self._tokenizer).sum()))
                continue
            part = next(self._parts, None)
            if part is None:
                return False
            self._packer.add(part.text, is_end=part.is_end)
        return True


class TensorHeldOut(HeldOut):
    """Rows `first` and on of a table of files, in blocks of 256 that count as contexts.

    `TensorStream` creates it.
    """

    def __init__(self, table: "TensorTable", *, first: int, site: str) -> None:
        self.table, self.first, self._site = table, first, site

    def batches(self, half: Half, *, max_tokens: int, ranks: Ranks, sites: Collection[str] | None = None,
                with_logits: bool = False) -> Iterator[HeldOutBatch]:  # fmt: skip
        blocks = self._blocks(half, max_tokens)
        for number, start in enumerate(range(0, len(blocks), _BLOCKS_A_BATCH)):
            if number % ranks.size == ranks.rank:
                yield self._read(blocks[start : start + _BLOCKS_A_BATCH], ranks.device)

    def n_tokens(self, half: Half, *, max_tokens: int) -> int:
        return len(self._rows_of(self._blocks(half, max_tokens)))

    def _blocks(self, half: Half, max_tokens: int) -> range:
        n_blocks = -(-(self.table.n_rows - self.first) // HELD_OUT_BLOCK)
        return range(HALVES.index(half), n_blocks, 2)[: -(-max_tokens // HELD_OUT_BLOCK)]

    def _rows_of(self, blocks: range) -> Tensor:
        index_N = (torch.tensor(blocks)[:, None] * HELD_OUT_BLOCK + torch.arange(HELD_OUT_BLOCK)).flatten()
        return index_N[index_N < self.table.n_rows - self.first]

    def _read(self, blocks: range, device: torch.device) -> HeldOutBatch:
        index_N = self._rows_of(blocks)
        raw_ND = self.table.rows(index_N + self.first).to(device)
        kept_N = within(raw_ND, limit=self.limits[self._site])
        context_N = (index_N // HELD_OUT_BLOCK).to(device)[kept_N]
        rows = HeldOutRows(raw_ND=raw_ND[kept_N].float(), context_N=context_N, kept_BT=None)
        return HeldOutBatch(sites={self._site: rows}, ids_BT=None)

"""Small autoencoders of every rule, calibrated on random rows, and held-out batches for them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.corpus import Part
from sae_train.harvest.held_out import Half, HeldOut, HeldOutBatch, TextHeldOut
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import Calibration, calibrate
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.base import Export
from tools.sae_parts import sparsifier_of
from tools.small_runs import run_config
from tools.tiny_models import sentences

D, F, BATCH = 32, 97, 64


END = StepInfo(step=9, tokens=9 * BATCH, total_tokens=9 * BATCH, batch_tokens=BATCH, learning_rate=1e-3, seed=0)


SIZES = [37, 5, 0, 64, 11]
"""Tokens of the held-out batches: ragged, one empty, and not as many batches as ranks."""


class Case(NamedTuple):
    sparsifier: str
    budget: str = "pooled"
    bias: float = 0.0


CASES = {
    "topk": Case("topk"),
    "one threshold": Case("mutual_choice"),
    "budget not used up": Case("mutual_choice", bias=-9.0),
    "a threshold each": Case("feature_choice", "uniform"),
    "zipf": Case("feature_choice", "zipf"),
}


class Rows(HeldOut):
    """Held-out batches of random rows; one may be bad."""

    def __init__(self, ranks: Ranks, *, bad: int | None = None) -> None:
        self._ranks, self._bad = ranks, bad

    def n_tokens(self, half: Half, *, max_tokens: int) -> int:
        return sum(SIZES)

    def batches(self, half: Half, *, max_tokens: int, with_logits: bool = False) -> Iterator[HeldOutBatch]:
        for number, size in enumerate(SIZES):
            if number % self._ranks.size != self._ranks.rank:
                continue
            if number == self._bad:
                raise DataError("this batch is bad")
            context_N = 100 * number + torch.arange(size) // 7
            yield HeldOutBatch(raw_ND=tokens(size, seed=number), context_N=context_N, ids_BT=None, kept_BT=None)


def tokens(n: int, *, seed: int) -> Tensor:
    return 1 + torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def shard(case: Case, ranks: Ranks) -> tuple[SparseAutoencoder, Export]:
    """Return this rank's features, folded, in float64, and the rule that they are exported by."""
    config = run_config(sparsifier=case.sparsifier, budget=case.budget, k=6.0, batch_tokens=BATCH, tokens=END.tokens)
    sparsifier = sparsifier_of(config, n_features=F, ranks=ranks)
    generator = torch.Generator().manual_seed(7)
    W_enc, W_dec = torch.randn(2, F, D, generator=generator, dtype=torch.float64)
    b_enc = case.bias + torch.randn(F, generator=generator, dtype=torch.float64)
    b_dec = torch.randn(D, generator=generator, dtype=torch.float64)
    own = slice(*ranks.features.slice(F))
    dictionary = TrainableAutoencoder(W_enc[own], b_enc[own], W_dec[own], b_dec)
    rule = sparsifier.export(dictionary, END)
    sae = SparseAutoencoder.fold(dictionary, centre_D=torch.ones(D), scale=1.3, k=6.0, inference=rule.inference)
    return sae.double(), rule


def calibrated(case: Case, ranks: Ranks) -> tuple[SparseAutoencoder, Calibration]:
    sae, rule = shard(case, ranks)
    raw = tokens(3 * BATCH + 5, seed=99)
    found = calibrate(sae, raw, k=rule.k, share_F=rule.share_F, batch_tokens=BATCH, n_features=F, ranks=ranks)
    sae.threshold.copy_(found.threshold_F)
    return sae, found


def held_out_text(config: Any, model: LanguageModel, ranks: Ranks) -> TextHeldOut:
    parts = (Part(text, is_end=True) for text in sentences(40))
    held_out = TextHeldOut(parts, language_model=model, tokenizer=Tokenizer(config.model), context_length=16,
                           contexts_per_batch=2, ranks=ranks, site="here")  # fmt: skip
    held_out.limit = 1e9
    return held_out

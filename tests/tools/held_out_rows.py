"""Small autoencoders of every rule, calibrated on random rows, and held-out batches for them."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.evaluation.metric import Subject
from sae_train.harvest.corpus import Part
from sae_train.harvest.held_out import Half, HeldOut, HeldOutBatch, HeldOutRows, TextHeldOut
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


SITES = ("here", "there", "elsewhere")
"""Sites of `Rows`. The later ones keep fewer tokens of a batch."""


class Rows(HeldOut):
    """Held-out batches of random rows at `SITES`; one batch of one site may be bad."""

    def __init__(self, *, bad: tuple[int, str] | None = None) -> None:
        self._bad = bad

    def n_tokens(self, half: Half, *, max_tokens: int) -> int:
        return sum(SIZES)

    def batches(self, half: Half, *, max_tokens: int, ranks: Ranks, sites: Collection[str] | None = None,
                with_logits: bool = False) -> Iterator[HeldOutBatch]:  # fmt: skip
        chosen = [site for site in SITES if sites is None or site in sites]
        for number, size in enumerate(SIZES):
            if number % ranks.size == ranks.rank:
                yield HeldOutBatch(sites={site: self._rows(site, number, size) for site in chosen}, ids_BT=None)

    def _rows(self, site: str, number: int, size: int) -> HeldOutRows:
        if (number, site) == self._bad:
            raise DataError("this batch is bad")
        place = SITES.index(site)
        kept_N = torch.arange(size) % 7 >= place  # the outliers of a site are left out there alone
        raw_ND, context_N = tokens(size, seed=number + 1000 * place), 100 * number + torch.arange(size) // 7
        return HeldOutRows(raw_ND=raw_ND[kept_N], context_N=context_N[kept_N], kept_BT=None)


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


def subject(name: str, ranks: Ranks, *, site: str = "here") -> Subject:
    """Return a calibrated SAE of a case as a subject of an evaluation."""
    sae = calibrated(CASES[name], ranks)[0]
    return Subject(sae=sae, site=site, centre_D=sae.b_dec.detach(), n_features=F, ranks=ranks)


def held_out_text(config: Any, model: LanguageModel) -> TextHeldOut:
    parts = (Part(text, is_end=True) for text in sentences(40))
    held_out = TextHeldOut(parts, language_model=model, tokenizer=Tokenizer(config.model), context_length=16,
                           contexts_per_batch=2)  # fmt: skip
    held_out.limits = dict.fromkeys(model.sites, 1e9)
    return held_out

"""Which features fire where: training's own selection beside the exported autoencoder's, on the same tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.harvest.held_out import Half
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.training.trainer import Trainer
from tools.grid_world import places
from tools.one_of_each import only
from tools.sae_parts import encoded


class Supports(NamedTuple):
    """[N, F] bool of the tokens of one batch."""

    training: Tensor
    exported: Tensor


@torch.no_grad()
def compared(trainer: Trainer, sae: SparseAutoencoder, raw_ND: Tensor) -> Iterator[Supports]:
    """Yield both supports of fresh tokens, batch by batch of training's size; what is left over is left out.

    Training sees its normalised activations and the dictionary, the exported autoencoder raw ones and itself.
    """
    scaling, n_features = only(trainer.stream.scalings), trainer.learners[0].plan.n_features
    for batch_ND in raw_ND.split(trainer.plan.batch_tokens):
        if len(batch_ND) < trainer.plan.batch_tokens:
            return
        x_ND = ((batch_ND.double() - scaling.centre_D) / scaling.scale).to(trainer.learners[0].dictionary.W_dec.dtype)
        token, feature, _ = places(encoded(trainer, x_ND).code)
        training_NF = torch.zeros(len(batch_ND), n_features, dtype=torch.bool)
        training_NF[token, feature] = True
        yield Supports(training_NF, sae.encode(batch_ND) > 0)


def jaccard(pairs: list[Supports]) -> float:
    """Return matches that both have over matches that either has, of all batches together."""
    both = sum(int((pair.training & pair.exported).sum()) for pair in pairs)
    return both / sum(int((pair.training | pair.exported).sum()) for pair in pairs)


def poisson_jaccard(mean_F: Tensor, *, n_tokens: int) -> float:
    """Return the expected Jaccard where training keeps mean_F matches a batch and the export a Poisson count.

    Both keep a feature's largest affinities, so what they share is the smaller count. Training's is the mean rounded
    down or up.
    """
    both = either = torch.zeros((), dtype=torch.float64)
    count = torch.arange(n_tokens + 1, dtype=torch.float64)
    for mean in mean_F.double()[mean_F > 0]:
        chance = (count * mean.log() - mean - torch.lgamma(count + 1)).exp()
        for kept, share in ((mean.floor(), 1 - mean % 1), (mean.floor() + 1, mean % 1)):
            both = both + share * (chance @ count.clamp(max=float(kept)))
            either = either + share * (chance @ count.clamp(min=float(kept)))
    return float(both / either)


class Densities(NamedTuple):
    """[F] float64 of some tokens."""

    fires: Tensor
    """Share of tokens on which a feature of the exported autoencoder fires."""
    error: Tensor
    """Its standard error, contexts being the unit (ratio estimator)."""
    positive: Tensor
    """Share of tokens on which a feature's pre-activation is positive."""


@torch.no_grad()
def densities(sae: SparseAutoencoder, batches: list[tuple[Tensor, Tensor]]) -> Densities:
    """Return the densities on raw activations [N, D], each with the context [N] that it comes from."""
    counts, sizes, positive = [], [], []
    for raw_ND, context_N in batches:
        pre_NF = torch.cat(list(sae.pre_activations(raw_ND)))
        _, group_N = context_N.unique(return_inverse=True)
        n_contexts = int(group_N.max()) + 1
        fires_NF = (pre_NF > sae.threshold).double()
        counts.append(torch.zeros(n_contexts, sae.n_features, dtype=torch.float64).index_add_(0, group_N, fires_NF))
        sizes.append(torch.bincount(group_N).double())
        positive.append((pre_NF > 0).double().sum(0))
    count_CF, size_C = torch.cat(counts), torch.cat(sizes)
    n_contexts, n_tokens = len(size_C), float(size_C.sum())
    fires_F = count_CF.sum(0) / n_tokens
    residual_CF = count_CF - size_C[:, None] * fires_F
    error_F = (residual_CF.square().sum(0) * n_contexts / (n_contexts - 1)).sqrt() / n_tokens
    return Densities(fires_F, error_F, sum(positive) / n_tokens)


def of_half(trainer: Trainer, half: Half) -> list[tuple[Tensor, Tensor]]:
    """Return the raw activations and contexts of a half of the held-out data."""
    max_tokens, ranks = trainer.source.evaluation_tokens, trainer.ranks
    batches = [only(b.sites) for b in trainer.stream.held_out.batches(half, max_tokens=max_tokens, ranks=ranks)]
    return [(batch.raw_ND, batch.context_N) for batch in batches]


def share_within(trainer: Trainer, sae: SparseAutoencoder) -> float:
    """Return the share of features that fire as often on the evaluation half as Feature Choice's budgets say.

    As often is within three standard errors, both halves' added as variances, of the lesser of m_j / N and the share
    of tokens on which the feature's affinity is positive.
    """
    calibration, fresh = (densities(sae, of_half(trainer, half)) for half in ("calibration", "evaluation"))
    budget_F = (
        trainer.learners[0]
        .sparsifier.export(trainer.learners[0].dictionary, trainer.learners[0].step_info(trainer.n_done))
        .share_F
    )
    assert budget_F is not None
    error_F = (calibration.error.square() + fresh.error.square()).sqrt()
    missed_F = (fresh.fires - torch.minimum(budget_F, fresh.positive)).abs()
    return float((missed_F <= 3 * error_F).double().mean())

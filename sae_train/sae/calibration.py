"""Thresholds with which fresh tokens fire as many features as in training: k on average.

Training compares the tokens of a batch. The exported autoencoder sees one token at a time and needs a threshold.
Mutual Choice gets one threshold for all features, Feature Choice one a feature, and TopK needs none. Thresholds that
training has learned get one common factor. Where positive affinities ran out, the target is k times the share of the
budget that training's selection uses on these tokens. Features may be spread over a row of ranks. Every cut and every
count is over the whole row.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.radix import kth_largest
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import CHUNK_BYTES, SparseAutoencoder

SAMPLE_MARGIN = 1.25
"""Affinities gathered before the exact cut, as a multiple of those kept. Too few only cost another pass."""
LARGEST_CORRECTION = 0.1
"""Largest distance of L0 from k, as a share of k, at which learned thresholds are corrected."""


class Calibration(NamedTuple):
    """The result of a calibration."""

    threshold_F: Tensor
    """[F] fp32 thresholds of this rank's features, at least 0; +inf for a feature that must never fire."""
    target_l0: float
    """Mean number of active features a token that the thresholds aim at."""
    used_share: float
    """Share of the budget that training's selection uses on these tokens."""
    correction: dict[str, float] | None = None
    """The correction that brought a penalised sparsifier's L0 to k: {"factor": ...} on learned thresholds, or
    {"threshold": ...} for all features. Empty where L0 was too far from k. None for allocators."""


@torch.no_grad()
def calibrate(
    sae: SparseAutoencoder,
    raw_ND: Tensor,
    *,
    k: float | None,
    batch_tokens: int,
    n_features: int,
    ranks: Ranks,
    share_F: Tensor | None = None,
    learned_F: Tensor | None = None,
    phases: Phases = SILENT,
) -> Calibration:
    """Return thresholds for `sae` from held-out activations that no exported figure is computed on. Collective.

    Args:
        sae: the folded autoencoder with this rank's features. Its own thresholds are not read.
        raw_ND: the whole calibration half, in raw units, the same on every rank.
        k: mean number of active features a token that is aimed at; None leaves L0 as it is (`learned_F` only).
        batch_tokens: tokens of a batch in training, whose selection the thresholds stand in for.
        n_features: features of the whole dictionary.
        ranks: the grid of ranks. Those of a row hold the other features.
        share_F: share of a batch's tokens on which each feature of the whole dictionary may fire; None without budgets
            per feature.
        learned_F: thresholds of this rank's features that training used, in raw units, +inf for a feature that must
            never fire; None where training selects.
        phases: the progress display, which shows each pass over the tokens.
    """
    if len(raw_ND) == 0:
        raise ValueError("no tokens to calibrate thresholds on")
    row, passes = ranks.features, _Passes(sae, phases)
    if learned_F is not None:
        return _corrected(passes, raw_ND, k=k, learned_F=learned_F, n_features=n_features, row=row)
    if k is None:
        raise ValueError("k is None: a sparsifier that selects has a k")
    if sae.inference == "topk":
        return _without_threshold(passes, raw_ND, k=round(k), row=row)
    if share_F is None:
        return _one_threshold(passes, raw_ND, k=k, batch_tokens=batch_tokens, n_features=n_features, row=row)
    return _threshold_each(passes, raw_ND, k=k, share_F=share_F, batch_tokens=batch_tokens, row=row)


class _Passes:
    """Passes of an autoencoder's encoder over the calibration half. Each pass is a phase with its own time left."""

    def __init__(self, sae: SparseAutoencoder, phases: Phases) -> None:
        self.sae, self._phases = sae, phases

    def pre_activations(self, raw_ND: Tensor) -> Iterator[Tensor]:
        """Yield the pre-activations [n, F] of stretches of tokens."""
        with self._phases.of("setting thresholds", total=len(raw_ND)):
            for pre_NF in self.sae.pre_activations(raw_ND):
                yield pre_NF
                self._phases.advance(len(pre_NF))

    def columns(self, raw_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield stretches of features and their pre-activations [f, N] of all tokens."""
        sae, step = self.sae, max(1, CHUNK_BYTES // (4 * len(raw_ND)))
        with self._phases.of("setting thresholds", total=sae.n_features, unit="feature"):
            for first in range(0, sae.n_features, step):
                columns = slice(first, first + step)
                encoder_FD, raw_DN = sae.W_enc[:, columns].t(), raw_ND.to(sae.W_enc.dtype).t()
                pre_FN = torch.addmm(sae.b_enc[columns, None], encoder_FD, raw_DN)
                yield columns, pre_FN
                self._phases.advance(len(pre_FN))


def _without_threshold(passes: _Passes, raw_ND: Tensor, *, k: int, row: Ranks) -> Calibration:
    positive_N = row.sum(torch.cat([_positive(pre_NF) for pre_NF in passes.pre_activations(raw_ND)]))
    used_share = int(positive_N.clamp(max=k).sum()) / (k * len(raw_ND))
    return Calibration(torch.zeros_like(passes.sae.threshold), k * used_share, used_share)


def _one_threshold(
    passes: _Passes, raw_ND: Tensor, *, k: float, batch_tokens: int, n_features: int, row: Ranks
) -> Calibration:
    n_tokens = len(raw_ND)
    most = max(1, round(k * n_tokens))
    values, positive_N = _largest(passes, raw_ND, most=most + 1, n_features=n_features, row=row)
    used = budget = 0
    for batch_N in torch.split(row.sum(positive_N), batch_tokens):
        share = round(k * len(batch_N))
        used, budget = used + min(int(batch_N.sum()), share), budget + share
    used_share = used / max(1, budget)
    threshold = kth_largest(values, round(k * n_tokens * used_share) + 1, row)
    return Calibration(threshold.expand(passes.sae.n_features).float().clone(), k * used_share, used_share)


def _corrected(
    passes: _Passes, raw_ND: Tensor, *, k: float | None, learned_F: Tensor, n_features: int, row: Ranks
) -> Calibration:
    """Bring L0 to k where training has come close: by a factor on learned thresholds, else by one threshold for all.

    Where L0 is far from k, a correction would make another autoencoder, so thresholds stay as training left them.
    Features with a threshold of +inf keep it, and L0 comes to k without them.
    """
    n_tokens, device = len(raw_ND), raw_ND.device
    fires = sum(int((pre_NF > learned_F).sum()) for pre_NF in passes.pre_activations(raw_ND))
    l0 = int(row.sum(torch.tensor(fires, device=device))) / n_tokens
    if k is None:
        return Calibration(learned_F.float(), l0, 1.0)
    if abs(l0 - k) > LARGEST_CORRECTION * k:
        return Calibration(learned_F.float(), k, 1.0, {})
    keep = max(1, round(k * n_tokens))
    never_F = learned_F.isinf()
    has_thresholds = bool(row.max(((learned_F > 0) & ~never_F).any().long()))
    unit_F = learned_F if has_thresholds else torch.where(never_F, torch.inf, torch.ones_like(passes.sae.threshold))
    values, positive_N = _largest(passes, raw_ND, most=keep + 1, n_features=n_features, row=row, unit_F=unit_F)
    used_share = min(1.0, int(row.sum(positive_N.sum())) / keep)
    cut = float(kth_largest(values, keep + 1, row))
    if not has_thresholds:
        threshold_F = torch.where(never_F, torch.inf, cut).float()
        return Calibration(threshold_F, k * used_share, used_share, {"threshold": cut})
    if not math.isfinite(cut):  # features whose threshold is 0 fire more than k times a token by themselves
        return Calibration(learned_F.float(), k, 1.0, {})
    threshold_F = torch.where(never_F, torch.inf, cut * learned_F).float()
    return Calibration(threshold_F, k * used_share, used_share, {"factor": cut})


def _largest(
    passes: _Passes, raw_ND: Tensor, *, most: int, n_features: int, row: Ranks, unit_F: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the largest affinities on this rank, and the positive affinities of its features on each token [N].

    The affinities of all ranks together hold at least the `most` largest ones, or all where there are fewer. Affinities
    are divided by `unit_F` where that is given.
    """

    def affinities(rows_ND: Tensor) -> Iterator[Tensor]:
        for pre_NF in passes.pre_activations(rows_ND):
            yield pre_NF if unit_F is None else pre_NF / unit_F

    sample_ND = raw_ND[:: max(1, len(raw_ND) * n_features * 4 // CHUNK_BYTES)]
    wanted = int(SAMPLE_MARGIN * most * len(sample_ND) / len(raw_ND)) + 64
    bound = float(kth_largest(torch.cat([pre_NF.flatten() for pre_NF in affinities(sample_ND)]), wanted, row))
    while True:
        values, positives = [], []
        for pre_NF in affinities(raw_ND):
            positives.append(_positive(pre_NF))
            values.append(pre_NF[pre_NF > bound])
        found = torch.tensor(sum(map(len, values)), device=raw_ND.device)
        if bound <= 0 or int(row.sum(found)) >= most:
            return torch.cat(values), torch.cat(positives)
        bound = bound / 2 if bound > 1e-6 else 0.0


def _positive(pre_NF: Tensor) -> Tensor:
    """Return the number of positive affinities of each token [N], int64."""
    return (pre_NF > 0).sum(1, dtype=torch.int32).long()


def _threshold_each(
    passes: _Passes, raw_ND: Tensor, *, k: float, share_F: Tensor, batch_tokens: int, row: Ranks
) -> Calibration:
    """Set each feature's threshold at the affinity that as many held-out tokens reach as its budget has matches.

    A share c / (n + 1) of fresh affinities exceeds the c-th largest of n, whatever their distribution. So the sum over
    many features is unbiased. A cut below the c-th would be off by half a match a feature.
    """
    n_tokens = len(raw_ND)
    own_F = share_F[slice(*row.slice(len(share_F)))]
    thresholds, total = [], torch.zeros((), dtype=torch.float64, device=raw_ND.device)
    for columns, pre_FN in passes.columns(raw_ND):
        matches_F = _expected_matches(pre_FN > 0, own_F[columns].to(pre_FN.device), batch_tokens)
        thresholds.append(_reached_by(pre_FN, matches_F))
        total += matches_F.sum()
    used_share = float(row.sum(total)) / (float(share_F.sum()) * n_tokens)
    return Calibration(torch.cat(thresholds).float(), k * used_share, used_share)


def _expected_matches(positive_FN: Tensor, share_F: Tensor, batch_tokens: int) -> Tensor:
    """Return the mean number of matches that training's selection gives each feature on these tokens [F].

    The mean is over the random rounding of budgets.

    Args:
        positive_FN: whether each affinity is positive.
        share_F: budget of each feature as a share of a batch's tokens.
        batch_tokens: tokens of a batch.
    """
    matches_F = torch.zeros_like(share_F)
    for batch_FN in torch.split(positive_FN, batch_tokens, dim=1):
        budget_F, there_F = share_F * batch_FN.shape[1], batch_FN.sum(1).double()
        down_F = budget_F.floor()
        up_share_F = budget_F - down_F
        matches_F += (1 - up_share_F) * torch.minimum(down_F, there_F)
        matches_F += up_share_F * torch.minimum(down_F + 1, there_F)
    return matches_F


def _reached_by(pre_FN: Tensor, matches_F: Tensor) -> Tensor:
    """Return the affinity that a (real) number of tokens reaches in each row [F].

    It is 0 where all positive affinities reach it, and +inf where no token is to reach it.

    Example: a row [5, 3, 1] and 1.5 tokens give 4, between the largest and the second largest.
    """
    most = min(int(matches_F.max()) + 2, pre_FN.shape[1])
    largest = pre_FN.topk(most, dim=1).values.clamp(min=0)
    lower = matches_F.long().clamp(1, most)
    upper = (lower + 1).clamp(max=most)
    at_lower, at_upper = (largest.gather(1, place[:, None] - 1).squeeze(1) for place in (lower, upper))
    share = (matches_F - lower).clamp(0, 1).to(largest.dtype)
    threshold = at_lower + share * (at_upper - at_lower)
    positive_F = (pre_FN > 0).sum(1)
    threshold = torch.where(matches_F >= positive_F, 0, threshold)
    return torch.where((matches_F <= 0) | (positive_F == 0), torch.inf, threshold)

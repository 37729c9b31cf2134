"""How many features fire on a token: the mean, its standard error, and percentiles."""

import math

import torch
from torch import Tensor

from sae_train.evaluation.metric import EvaluationBatch, Metric, Subject, Sums, defined
from sae_train.evaluation.sharded_forward import Reconstruction
from sae_train.ranks.interface import Ranks

L0_BINS = 4096
"""Largest L0 of a token that percentiles distinguish. Percentiles of useful SAEs are far below."""


class L0(Metric):
    """l0, its standard error, and its percentiles over tokens.

    l0 is the mean number of features that fire on a token. Tokens of one context are correlated, so the standard error
    has contexts as its unit (ratio estimator). It is not defined for a single context.
    """

    in_rows = ("l0",)

    def __init__(self, subject: Subject) -> None:
        device = subject.ranks.device
        self._sums = Sums("tokens", "l0", device=device)
        self._context_sums = Sums("contexts", "tokens_tokens", "tokens_l0", "l0_l0", device=device)
        self._histogram = torch.zeros(L0_BINS + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, batch: EvaluationBatch, made: Reconstruction) -> None:
        l0_N = made.l0_N
        if len(l0_N) == 0:
            return
        self._sums.add(tokens=len(l0_N), l0=l0_N.sum())
        self._histogram += torch.bincount(l0_N.clamp_max(L0_BINS), minlength=L0_BINS + 1)
        _, group_N, tokens_C = batch.context_N.unique(return_inverse=True, return_counts=True)
        l0_C = torch.zeros_like(tokens_C).index_add_(0, group_N, l0_N).double()
        t_C = tokens_C.double()
        self._context_sums.add(
            contexts=len(t_C), tokens_tokens=t_C @ t_C, tokens_l0=t_C @ l0_C, l0_l0=l0_C @ l0_C
        )  # fmt: skip

    def figures(self, ranks: Ranks) -> dict[str, float]:
        sums = self._sums.over(ranks)
        n = sums["tokens"]
        if n == 0:
            return {}
        mean = sums["l0"] / n
        p5, p50, p95 = histogram_percentiles(ranks.sum(self._histogram), (0.05, 0.5, 0.95))
        error = self._standard_error(ranks, mean=mean, n_tokens=n)
        return defined({"l0": mean, "l0_standard_error": error, "l0_p5": p5, "l0_p50": p50, "l0_p95": p95})

    def _standard_error(self, ranks: Ranks, *, mean: float, n_tokens: float) -> float:
        """Return the ratio estimator's standard error of l0; NaN for fewer than two contexts."""
        sums = self._context_sums.over(ranks)
        n = sums["contexts"]
        if n < 2:
            return math.nan
        squares = max(sums["l0_l0"] - 2 * mean * sums["tokens_l0"] + mean * mean * sums["tokens_tokens"], 0.0)
        return math.sqrt(squares / (n - 1) * n) / n_tokens


def histogram_percentiles(counts: Tensor, shares: tuple[float, ...]) -> list[int]:
    """Return for each share the smallest bin whose running total reaches that share of all counts.

    Example: `histogram_percentiles(tensor([2, 1, 1]), (0.5, 1.0))` is `[0, 2]`.
    """
    running = counts.cumsum(0)
    targets = torch.tensor([share * float(running[-1]) for share in shares], device=counts.device)
    return [int(i) for i in torch.searchsorted(running.double(), targets.double())]

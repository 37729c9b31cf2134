"""How often each feature fires: dead features and firing densities."""

from typing import Any

import torch
from torch import Tensor

from sae_train.evaluation.density import density_figures
from sae_train.evaluation.metric import EvaluationBatch, Metric, Subject, Sums
from sae_train.evaluation.sharded_forward import Reconstruction
from sae_train.ranks.interface import Ranks


class FiringDensity(Metric):
    """dead_fraction, evaluation_tokens, and the figures of `density_figures` under `density`.

    dead_fraction is the share of features that fire on none of the evaluation tokens.
    """

    in_rows = ("dead_fraction",)

    def __init__(self, subject: Subject) -> None:
        device = subject.ranks.device
        first, last = subject.ranks.features.slice(subject.n_features)
        self._n_features = subject.n_features
        self._sums = Sums("tokens", device=device)
        self._fired_F = torch.zeros(last - first, dtype=torch.int64, device=device)  # on the row's tokens

    @torch.no_grad()
    def update(self, batch: EvaluationBatch, made: Reconstruction) -> None:
        self._fired_F += made.fired_F
        self._sums.add(tokens=len(batch.raw_ND))

    def figures(self, ranks: Ranks) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        n = int(self._sums.over(ranks)["tokens"])
        fired_F = ranks.data.sum(self._fired_F)
        if n > 0:
            n_dead = int(ranks.features.sum((fired_F == 0).sum()))
            figures = {"dead_fraction": n_dead / self._n_features, "evaluation_tokens": n}
        return figures | {"density": density_figures(self._density(fired_F, max(n, 1), ranks))}

    def _density(self, fired_F: Tensor, n_tokens: int, ranks: Ranks) -> Tensor:
        """Return [n_features] float64: the share of tokens on which each feature fires. Collective."""
        return ranks.features.gather_slices(fired_F, self._n_features).double() / n_tokens

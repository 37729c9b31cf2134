"""The interface of a metric, and the sums that a metric adds up.

Letters: N this rank's tokens, D d_model, F this rank's features.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_train.evaluation.language_model import Baseline
from sae_train.evaluation.sharded_forward import Reconstruction
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The SAE that is evaluated. The caller of `evaluate_all` creates it; each metric is made for one."""

    sae: SparseAutoencoder
    """This rank's features, and the whole `b_dec`."""
    site: str
    """Label of the site whose activations it reads."""
    centre_D: Tensor
    """[D] a point near the mean of the site's activations, equal on all ranks."""
    n_features: int
    """Width of the whole dictionary."""
    ranks: Ranks
    """The grid that holds this SAE; the ranks of a row hold the other features. `Solo` where this rank has it whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationBatch:
    """Held-out contexts at one site. `evaluate_all` creates it; every metric of the site's SAEs reads it."""

    raw_ND: Tensor
    """[N, D] raw activations of this rank's kept tokens; N is 0 where this rank has no batch left."""
    context_N: Tensor
    """[N] int64 context of each token. No context spans two batches."""
    baseline: Baseline | None
    """Predictions of the language model without an SAE; None without a language model, a loss or a batch."""


class Metric(ABC):
    """Figures of an SAE on held-out data. `evaluate_all` makes one of each class in `METRICS` for each SAE.

    A metric keeps sums on the device. `update` adds one batch to them, and `figures` adds up the ranks' sums.
    """

    in_rows: ClassVar[tuple[str, ...]] = ()
    """Names of the figures that also go into rows of metrics.jsonl, as `eval/NAME`. summary.json has them all."""

    @abstractmethod
    def __init__(self, subject: Subject) -> None:
        """Start with empty sums."""

    def update(self, batch: EvaluationBatch, made: Reconstruction) -> None:  # noqa: B027 (some read weights alone)
        """Add a batch. All ranks of the SAE call it equally often, some with an empty batch.

        Args:
            batch: this rank's tokens.
            made: reconstructions of these tokens, and the firings of this rank's features on the row's tokens.
        """

    @abstractmethod
    def figures(self, ranks: Ranks) -> dict[str, Any]:
        """Return the figures over the SAE's ranks, as JSON values. Collective. Undefined figures are left out."""


class Sums:
    """Named float64 sums of a metric: a scalar each, in one tensor, so that they cross ranks together.

    Example: `sums = Sums("tokens", "error", device=device)`, `sums.add(tokens=12, error=error_N.sum())`, and
    `sums.over(ranks)["error"]` at the end.
    """

    def __init__(self, *names: str, device: torch.device) -> None:
        self._names = names
        self._values = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, **values: Tensor | float) -> None:
        """Add a number to each sum; all of them must be given."""
        assert values.keys() == set(self._names), values.keys() ^ set(self._names)
        new = [torch.as_tensor(values[name], dtype=torch.float64, device=self._values.device) for name in self._names]
        self._values += torch.stack(new)

    def over(self, ranks: Ranks) -> dict[str, float]:
        """Return each sum over all ranks. Collective."""
        return dict(zip(self._names, ranks.sum(self._values).tolist(), strict=True))


def defined(figures: dict[str, float]) -> dict[str, float]:
    """Return the figures that are finite numbers."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}

"""Settings of how the budget of matches is split over the features."""

from dataclasses import dataclass
from typing import Annotated

from sae_train.config.ranges import SHARE, Range, Settings

LEAST_R2 = 0.5
"""Smallest R^2 of a fit of Zipf's law at which feature densities count as following the law."""
LARGEST_EXPONENT = 20.0
"""Largest exponent of Zipf's law; measured exponents are near 1."""


@dataclass(kw_only=True, slots=True)
class BudgetConfig(Settings):
    """How the budget of k x tokens matches is split; `pooled` does not split it."""

    name: str
    start_k: Annotated[float | None, Range(above=0)]
    """k at the first step, in features a token. Default: k."""
    anneal: Annotated[float, SHARE]
    """Change k linearly from start_k to k over this share of the tokens."""

    def conflicts(self) -> list[str]:
        if self.start_k is not None and self.anneal == 0:
            return [f"budget.start_k={self.start_k:g}: budget.anneal=0 never uses it. Give budget.anneal a share."]
        if self.start_k is None and self.anneal > 0:
            return [f"budget.anneal={self.anneal:g}: no budget.start_k to fall from. Give one or remove this."]
        return []


@dataclass(kw_only=True, slots=True)
class PooledBudgetConfig(BudgetConfig):
    """One budget for the batch."""


@dataclass(kw_only=True, slots=True)
class UniformBudgetConfig(BudgetConfig):
    """The same budget for every feature (Feature Choice)."""


@dataclass(kw_only=True, slots=True)
class ZipfBudgetConfig(BudgetConfig):
    """Budgets proportional to (rank + shift)^-exponent (Feature Choice)."""

    exponent: Annotated[float | None, Range(at_least=0, at_most=LARGEST_EXPONENT)]
    """Exponent of the law. Default: the exponent of zipf_from; with sparsifier.after, the fit to Mutual Choice's
    densities; else 1."""
    shift: Annotated[float | None, Range(at_least=0)]
    """Shift of the law, in ranks. Default: as exponent, but at the last 0.004 n_features. Where only one of exponent
    and shift is given, nothing is fitted."""
    zipf_from: str | None
    """Take exponent and shift from the feature densities of a finished run: its directory. Default: none."""
    cap: Annotated[float | None, Range(above=0, at_most=1, unit="a share of the batch's tokens")]
    """Largest share of a batch's tokens that a feature may fire on. Default: max(0.10, 4 k / n_features)."""
    floor: Annotated[float | None, Range(at_least=0)]
    """Smallest budget of a feature, in matches a batch on average. Default: min(1, k batch_tokens / n_features)."""

    @property
    def is_open(self) -> bool:
        """Whether exponent and shift are left to a fit."""
        return self.exponent is None and self.shift is None

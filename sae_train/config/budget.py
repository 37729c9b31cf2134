"""Settings of how the budget of matches is split over the features."""

from dataclasses import dataclass

LEAST_R2 = 0.5
"""Of a fit of Zipf's law to densities, below which they do not follow it."""
LARGEST_EXPONENT = 20.0
"""Of Zipf's law; measured ones are near 1."""


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """How the budget of k x tokens matches is split; `pooled` does not split it."""

    name: str
    start_k: float | None
    """k at the first step; null is k."""
    anneal: float
    """Share of the tokens over which start_k falls (or rises) linearly to k."""

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.anneal <= 1:
            found.append(f"budget.anneal={self.anneal}: a share of the tokens, 0 to 1.")
        if self.start_k is not None and self.start_k <= 0:
            found.append(f"budget.start_k={self.start_k:g}: must be positive.")
        if self.start_k is not None and self.anneal == 0:
            found.append(f"budget.start_k={self.start_k:g}: budget.anneal=0 never uses it. Give budget.anneal a share.")
        if self.start_k is None and self.anneal > 0:
            found.append(f"budget.anneal={self.anneal:g}: no budget.start_k to fall from. Give one or remove this.")
        return found


@dataclass(kw_only=True, slots=True)
class PooledBudgetConfig(BudgetConfig):
    """One budget for the batch."""


@dataclass(kw_only=True, slots=True)
class UniformBudgetConfig(BudgetConfig):
    """The same budget for every feature (Feature Choice)."""


@dataclass(kw_only=True, slots=True)
class ZipfBudgetConfig(BudgetConfig):
    """Budgets proportional to (rank + shift)^-exponent (Feature Choice)."""

    exponent: float | None
    """null is zipf_from's; else, with sparsifier.after, the fit to what Mutual Choice left; else 1."""
    shift: float | None
    """As exponent, but at the last 0.004 n_features. Where only one of the two is given, nothing is fitted."""
    zipf_from: str | None
    """Directory of a finished run, to whose feature densities exponent and shift were fitted; null for none."""
    cap: float | None
    """Largest share of a batch's tokens that a feature may fire on; null is max(0.10, 4 k / n_features)."""
    floor: float | None
    """Smallest mean number of matches a feature may have in a batch; null is min(1, k batch_tokens / n_features)."""

    @property
    def is_open(self) -> bool:
        """Whether exponent and shift are left to a fit."""
        return self.exponent is None and self.shift is None

    def problems(self) -> list[str]:
        found = BudgetConfig.problems(self)
        if self.exponent is not None and not 0 <= self.exponent <= LARGEST_EXPONENT:
            found.append(f"budget.exponent={self.exponent:g}: must be 0 to {LARGEST_EXPONENT:g}.")
        if self.shift is not None and self.shift < 0:
            found.append(f"budget.shift={self.shift:g}: must not be negative.")
        if self.cap is not None and not 0 < self.cap <= 1:
            found.append(f"budget.cap={self.cap:g}: a share of the batch's tokens, above 0 and at most 1.")
        if self.floor is not None and self.floor < 0:
            found.append(f"budget.floor={self.floor:g}: must not be negative.")
        return found

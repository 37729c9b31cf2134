"""The number of matches a token over the run: from `budget.start_k` linearly to `k`."""

from dataclasses import dataclass

from sae_train.config import SaeConfig
from sae_train.sae.step_info import StepInfo


@dataclass(frozen=True, slots=True)
class KSchedule:
    """The mean number of matches a token at each step.

    Example: k 32, start_k 64 and anneal 0.5 give 64 at the first step, 48 after a quarter of the tokens, 32 from half
    of them on.
    """

    k: float
    """Value at the end."""
    start_k: float
    """Value at the first step."""
    anneal: float
    """Share of the tokens over which the value changes."""

    @classmethod
    def of(cls, config: SaeConfig) -> "KSchedule | None":
        """Return the schedule of a configuration; None where a coefficient takes the place of k."""
        if config.k is None:
            return None
        start_k = config.budget.start_k
        return cls(config.k, *((config.k, 0.0) if start_k is None else (start_k, config.budget.anneal)))

    @property
    def least(self) -> float:
        """The smallest value over the run."""
        return min(self.k, self.start_k)

    @property
    def most(self) -> float:
        """The largest value over the run."""
        return max(self.k, self.start_k)

    def at(self, info: StepInfo) -> float:
        """Return the value at a step."""
        ramp = self.anneal * info.total_tokens
        if info.tokens >= ramp:
            return self.k
        return self.start_k + (self.k - self.start_k) * info.tokens / ramp

"""Settings of the sparsifiers."""

import math
from dataclasses import dataclass

LARGEST_THRESHOLD = 10.0
"""Of sparsifier=jumprelu at the start."""


LARGEST_BETA = 1e6
"""Of sparsifier=gradient; there the gradient's term alone decides."""


PENALTIES = ("l0", "tanh")
"""Of sparsifier=jumprelu."""

LONGEST_HALF_LIFE = 10**15
"""In tokens: of more, a batch would be lost to rounding."""
MASKED_FROM = 0.5
"""Probability above which a feature counts as masked where nothing is drawn: sparsifier=temporal_mask's export_mask."""


@dataclass(kw_only=True, slots=True)
class SparsifierConfig:
    """How pre-activations become a code; see the subclasses."""

    name: str

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class AllocatorConfig(SparsifierConfig):
    """Chooses the matches of a batch, so that there are k a token."""

    revival: float
    """How fast biases of silent features rise while the learning rate decays, in what it has lost by then; 0: not."""

    def problems(self) -> list[str]:
        return [] if self.revival >= 0 else [f"sparsifier.revival={self.revival:g}: must not be negative. 0 is off."]


@dataclass(kw_only=True, slots=True)
class TopKConfig(AllocatorConfig):
    """Each token keeps its k largest affinities (Gao et al. 2024, arXiv 2406.04093)."""

    multi_weight: float
    """Weight of the loss of a reconstruction from 4 k matches a token (Multi-TopK: 0.125); 0 leaves it out."""

    def problems(self) -> list[str]:
        found = AllocatorConfig.problems(self)
        if self.multi_weight < 0:
            found.append(
                f"sparsifier.multi_weight={self.multi_weight:g}: must not be negative. Multi-TopK's is 0.125, 0 is off."
            )
        return found


@dataclass(kw_only=True, slots=True)
class GradientConfig(TopKConfig):
    """As topk, but affinities that the language model's loss heeds count for more in the choice (arXiv 2411.10397)."""

    beta: float
    """Weight of a feature's effect on the loss, its mean over the batch being 1; 0 is topk, without gradients."""

    def problems(self) -> list[str]:
        found = TopKConfig.problems(self)
        if not 0 <= self.beta <= LARGEST_BETA:
            found.append(f"sparsifier.beta={self.beta:g}: must be 0 to {LARGEST_BETA:g}. 1 is the default, 0 is topk.")
        return found


@dataclass(kw_only=True, slots=True)
class MutualChoiceConfig(AllocatorConfig):
    """The batch keeps its k x tokens largest affinities (arXiv 2411.02124; BatchTopK, arXiv 2412.06410)."""


@dataclass(kw_only=True, slots=True)
class FeatureChoiceConfig(AllocatorConfig):
    """Each feature keeps its m_j largest affinities of the batch (arXiv 2411.02124)."""

    after: float
    """Share of the tokens, from 0 to below 1, that is trained as Mutual Choice first."""

    def problems(self) -> list[str]:
        found = AllocatorConfig.problems(self)
        if not 0 <= self.after <= 1:
            found.append(f"sparsifier.after={self.after}: a share of the tokens, from 0 to below 1.")
        return found


@dataclass(kw_only=True, slots=True)
class PenalisedConfig(SparsifierConfig):
    """Sparsity has a price, which is steered so that L0 comes to k."""

    coefficient: float | None
    """The price; null steers it so that L0 comes to k. Where it is given there is no k."""
    settle: float
    """Share of the tokens, 0 to 1, over which L0 is led from where it begins to k (the price from 0 to coefficient)."""

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.settle <= 1:
            found.append(f"sparsifier.settle={self.settle}: a share of the tokens, 0 to 1.")
        if self.coefficient is not None and self.coefficient <= 0:
            found.append(f"sparsifier.coefficient={self.coefficient:g}: must be positive.")
        return found


@dataclass(kw_only=True, slots=True)
class JumpReLUConfig(PenalisedConfig):
    """A feature fires above a threshold that it learns (arXiv 2407.14435)."""

    penalty: str
    """What the price is of: l0, the number of matches; tanh, a smooth stand-in."""
    steepness: float | None
    """c in tanh(c value); null is 4 sqrt(d_model). Read by penalty=tanh alone."""
    threshold: float
    """Every threshold at the start, as a share of the activations' root mean square norm."""
    threshold_rate: float
    """Of the logarithms of the thresholds, as a share of the learning rate."""
    bandwidth: float
    """Width about its threshold in which a feature's threshold learns, in the same unit."""

    def problems(self) -> list[str]:
        found = PenalisedConfig.problems(self)
        if self.penalty not in PENALTIES:
            found.append(f"sparsifier.penalty={self.penalty}: no such penalty. Choose {' or '.join(PENALTIES)}.")
        elif self.penalty != "tanh" and self.steepness is not None:
            found.append(
                f"sparsifier.steepness={self.steepness:g}: sparsifier.penalty={self.penalty} never reads it. Remove "
                "it, or choose sparsifier.penalty=tanh."
            )
        for key in ("steepness", "threshold", "threshold_rate", "bandwidth"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                found.append(f"sparsifier.{key}={value:g}: must be positive.")
        if self.threshold > LARGEST_THRESHOLD:
            found.append(
                f"sparsifier.threshold={self.threshold:g}: no pre-activation is that large, their unit is the "
                f"activations' root mean square norm. Give at most {LARGEST_THRESHOLD:g}."
            )
        return found


@dataclass(kw_only=True, slots=True)
class GatedConfig(PenalisedConfig):
    """A gate decides whether a feature fires, a magnitude how strongly (arXiv 2404.16014)."""


@dataclass(kw_only=True, slots=True)
class ReLUConfig(PenalisedConfig):
    """A feature fires where its pre-activation is positive; values have a price (L1)."""

    norms: str
    """Of decoder rows: free, and values weigh in with them; or unit."""

    def problems(self) -> list[str]:
        found = PenalisedConfig.problems(self)
        if self.norms not in ("free", "unit"):
            found.append(f"sparsifier.norms={self.norms}: no such norms. Choose free or unit.")
        return found


@dataclass(kw_only=True, slots=True)
class PAnnealConfig(PenalisedConfig):
    """As relu with unit norms; the price is of values to the power p, which falls from 1 (arXiv 2408.00113)."""

    start: float
    """Share of the tokens, 0 to 1, after which p falls."""
    end: float
    """p at the end, above 0 and at most 1."""
    changes: int
    """In how many equal steps it falls."""

    def problems(self) -> list[str]:
        found = PenalisedConfig.problems(self)
        if not 0 <= self.start <= 1:
            found.append(f"sparsifier.start={self.start}: a share of the tokens, 0 to 1.")
        if not 0 < self.end <= 1:
            found.append(f"sparsifier.end={self.end}: must be above 0 and at most 1.")
        if self.changes < 1:
            found.append(f"sparsifier.changes={self.changes}: must be at least 1.")
        return found


@dataclass(kw_only=True, slots=True)
class TemporalMaskConfig(PenalisedConfig):
    """As relu with unit norms; features of little importance so far are left out at random (ATM, arXiv 2510.08855)."""

    deviations: float
    """c: standard deviations, over features, that the threshold of importance lies above the mean importance."""
    strength: float
    """r: a feature of no importance is left out of a step with probability 1 - exp(-r), at most 0.9."""
    half_life: int | None
    """Tokens after which what a feature did counts half in its importance; null is 140k, at most an 8th of the run."""
    warmup: float
    """Share of the tokens, 0 to 1, before any feature is left out."""
    ramp: float
    """Share of the tokens after that, over which r rises from 0."""
    export_mask: bool
    """Whether the exported SAE leaves out for good what would be left out of more than half of the steps."""

    def problems(self) -> list[str]:
        found = PenalisedConfig.problems(self)
        found += [
            f"sparsifier.{key}={getattr(self, key)}: a share of the tokens, 0 to 1."
            for key in ("warmup", "ramp")
            if not 0 <= getattr(self, key) <= 1
        ]
        if not found and self.warmup + self.ramp > 1:
            found.append(
                f"sparsifier.warmup={self.warmup:g} and sparsifier.ramp={self.ramp:g}: together longer than the run. "
                "Lower one."
            )
        elif self.warmup == 1:
            found.append(
                "sparsifier.warmup=1: no feature would ever be left out. Lower it, or choose sparsifier=relu "
                "sparsifier.norms=unit."
            )
        if self.deviations < 0:
            found.append(f"sparsifier.deviations={self.deviations:g}: must not be negative.")
        if self.strength <= 0:
            found.append(f"sparsifier.strength={self.strength:g}: must be positive.")
        elif self.export_mask and 1 - math.exp(-self.strength) <= MASKED_FROM:
            found.append(
                f"sparsifier.export_mask=true: with sparsifier.strength={self.strength:g} no feature is ever left out "
                f"of more than half of the steps. Give a strength above {math.log(2):.3g}, or remove it."
            )
        if self.half_life is not None and self.half_life < 1:
            found.append(f"sparsifier.half_life={self.half_life}: must be at least 1.")
        elif self.half_life is not None and self.half_life > LONGEST_HALF_LIFE:
            found.append(f"sparsifier.half_life={self.half_life}: larger than {LONGEST_HALF_LIFE:.0e}. Lower it.")
        return found

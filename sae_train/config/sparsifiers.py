"""Settings of the sparsifiers."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from sae_train.config.ranges import SHARE, Range, Settings

LARGEST_HALF_LIFE = 10**15
"""Tokens; with a longer half-life the importance of a batch would be lost to rounding."""
MASKED_FROM = 0.5
"""Probability of being left out above which sparsifier=temporal_mask's export_mask removes a feature for good."""


@dataclass(kw_only=True, slots=True)
class SparsifierConfig(Settings):
    """How pre-activations become a code; see the subclasses.

    The class variables state the properties that `RunConfig` checks against other groups.
    """

    splits_budget: ClassVar[bool] = False
    """The budget is split over features (budget=uniform or zipf)."""
    keeps_whole_k: ClassVar[bool] = False
    """Every token keeps k features, so k must be a whole number."""
    leaves_features_out: ClassVar[bool] = False
    """Some steps leave features out, so no auxiliary loss may train these features in such a step."""
    silences_dead: ClassVar[bool] = False
    """A dead feature has no positive pre-activation, so aux_k has nothing to train; a loss of its own revives it."""

    name: str

    @property
    def reads_gradients(self) -> bool:
        """Whether each activation comes with its gradient of the language model's loss."""
        return False

    @property
    def has_unit_norms(self) -> bool:
        """Whether decoder rows have unit norm in training."""
        return True


@dataclass(kw_only=True, slots=True)
class AllocatorConfig(SparsifierConfig):
    """Chooses the matches of a batch, so that there are k a token."""

    revival: Annotated[float, Range(at_least=0, advice="0 is off.")]
    """Bias increase per step of a silent feature, as a multiple of (peak lr - current lr). 0 turns it off."""


@dataclass(kw_only=True, slots=True)
class TopKConfig(AllocatorConfig):
    """Each token keeps its k largest affinities (Gao et al. 2024, arXiv 2406.04093)."""

    keeps_whole_k = True

    multi_weight: Annotated[float, Range(at_least=0, advice="Multi-TopK's is 0.125, 0 is off.")]
    """Weight of a second loss, of a reconstruction from 4 k matches a token (Multi-TopK: 0.125). 0 turns it off."""


@dataclass(kw_only=True, slots=True)
class GradientConfig(TopKConfig):
    """As topk; affinities with more effect on the language model's loss rank higher (arXiv 2411.10397)."""

    beta: Annotated[float, Range(at_least=0, at_most=1e6, advice="1 is the default, 0 is topk.")]
    """Weight of a feature's effect on the loss, relative to the batch's mean effect. 0 is topk, without gradients."""

    @property
    def reads_gradients(self) -> bool:
        return self.beta > 0


@dataclass(kw_only=True, slots=True)
class MutualChoiceConfig(AllocatorConfig):
    """The batch keeps its k x tokens largest affinities (arXiv 2411.02124; BatchTopK, arXiv 2412.06410)."""


@dataclass(kw_only=True, slots=True)
class FeatureChoiceConfig(AllocatorConfig):
    """Each feature keeps its m_j largest affinities of the batch (arXiv 2411.02124)."""

    splits_budget = True

    after: Annotated[float, SHARE]
    """Share of the tokens that is first trained as Mutual Choice. 1 is refused: it leaves none to Feature Choice."""


@dataclass(kw_only=True, slots=True)
class PenalisedConfig(SparsifierConfig):
    """A penalty on activity makes codes sparse; its coefficient is steered so that L0 meets k."""

    coefficient: Annotated[float | None, Range(above=0)]
    """Factor of the penalty; k then has no value. Default: steered so that L0 meets k."""
    settle: Annotated[float, SHARE]
    """Share of the tokens over which L0 moves from its first value to k (or the factor from 0 to coefficient)."""


@dataclass(kw_only=True, slots=True)
class JumpReLUConfig(PenalisedConfig):
    """A feature fires above a threshold that is learned (arXiv 2407.14435)."""

    penalty: Annotated[str, Range(choices=("l0", "tanh"), noun="penalty")]
    """What the penalty is on: l0, the number of matches; or tanh, a smooth approximation of it."""
    steepness: Annotated[float | None, Range(above=0)]
    """c in tanh(c value), for penalty=tanh alone. Default: 4 sqrt(d_model)."""
    threshold: Annotated[float, Range(above=0, at_most=10)]
    """Every threshold at the start, as a share of the activations' root mean square norm."""
    threshold_rate: Annotated[float, Range(above=0)]
    """Learning rate of the logarithms of the thresholds, as a share of the learning rate."""
    bandwidth: Annotated[float, Range(above=0)]
    """Width of the straight-through estimator around a threshold, in the unit of threshold."""

    def conflicts(self) -> list[str]:
        if self.penalty == "l0" and self.steepness is not None:
            return [
                f"sparsifier.steepness={self.steepness:g}: sparsifier.penalty={self.penalty} never reads it. Remove "
                "it, or choose sparsifier.penalty=tanh."
            ]
        return []


@dataclass(kw_only=True, slots=True)
class GatedConfig(PenalisedConfig):
    """A gate decides whether a feature fires, a magnitude how strongly (arXiv 2404.16014)."""

    silences_dead = True


@dataclass(kw_only=True, slots=True)
class ReLUConfig(PenalisedConfig):
    """A feature fires where its pre-activation is positive; the penalty is on values (L1)."""

    silences_dead = True

    norms: Annotated[str, Range(choices=("free", "unit"), noun="norms")]
    """Norms of decoder rows: free, with values weighted by them in the penalty; or unit."""

    @property
    def has_unit_norms(self) -> bool:
        return self.norms == "unit"


@dataclass(kw_only=True, slots=True)
class PAnnealConfig(PenalisedConfig):
    """As relu with unit norms; the penalty is on values to the power p, which falls from 1 (arXiv 2408.00113)."""

    silences_dead = True

    start: Annotated[float, SHARE]
    """Share of the tokens after which p falls."""
    end: Annotated[float, Range(above=0, at_most=1)]
    """p at the end."""
    changes: Annotated[int, Range(at_least=1)]
    """Number of equal steps in which p falls."""


@dataclass(kw_only=True, slots=True)
class TemporalMaskConfig(PenalisedConfig):
    """As relu with unit norms; unimportant features are left out of steps at random (ATM, arXiv 2510.08855)."""

    leaves_features_out = True

    deviations: Annotated[float, Range(at_least=0)]
    """c: the threshold of importance lies c standard deviations over features above the mean importance."""
    strength: Annotated[float, Range(above=0)]
    """r: a feature without importance is left out of a step with probability 1 - exp(-r), at most 0.9."""
    half_life: Annotated[int | None, Range(at_least=1, at_most=LARGEST_HALF_LIFE)]
    """Tokens after which a feature's effect counts half in its importance. Default: 140k, at most an 8th of the run."""
    warmup: Annotated[float, SHARE]
    """Share of the tokens before any feature is left out. 1 is refused."""
    ramp: Annotated[float, SHARE]
    """Share of the tokens after warmup, over which r rises from 0."""
    export_mask: bool
    """Remove from the exported SAE the features that would be left out of more than half of the steps."""

    def conflicts(self) -> list[str]:
        found = []
        if self.warmup == 1:
            found.append(
                "sparsifier.warmup=1: no feature would ever be left out. Lower it, or choose sparsifier=relu "
                "sparsifier.norms=unit."
            )
        elif max(self.warmup, self.ramp) <= 1 < self.warmup + self.ramp:
            found.append(
                f"sparsifier.warmup={self.warmup:g} and sparsifier.ramp={self.ramp:g}: together longer than the run. "
                "Lower one."
            )
        if self.export_mask and self.strength > 0 and 1 - math.exp(-self.strength) <= MASKED_FROM:
            found.append(
                f"sparsifier.export_mask=true: with sparsifier.strength={self.strength:g} no feature is ever left out "
                f"of more than half of the steps. Give a strength above {math.log(2):.3g}, or remove it."
            )
        return found

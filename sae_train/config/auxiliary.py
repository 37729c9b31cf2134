"""Settings of the auxiliary losses, which train features that fire too rarely."""

from dataclasses import dataclass
from typing import Annotated

from sae_train.config.budget import LARGEST_EXPONENT
from sae_train.config.ranges import Range, Settings

WEIGHT = Range(above=0, advice="aux_loss=none leaves the auxiliary loss out.")


@dataclass(kw_only=True, slots=True)
class AuxLossConfig(Settings):
    """A second loss for features that fire too rarely; see the subclasses."""

    name: str


@dataclass(kw_only=True, slots=True)
class NoAuxLossConfig(AuxLossConfig):
    """No auxiliary loss."""


@dataclass(kw_only=True, slots=True)
class AuxKConfig(AuxLossConfig):
    """Dead features model the residual (Gao et al. 2024, arXiv 2406.04093)."""

    weight: Annotated[float, WEIGHT]
    """Factor of the auxiliary loss."""


@dataclass(kw_only=True, slots=True)
class AuxZipfConfig(AuxLossConfig):
    """Underused features model the residual, weighted (our reconstruction of arXiv 2411.02124's aux_zipf_loss)."""

    weight: Annotated[float, WEIGHT]
    """Factor of the auxiliary loss."""
    tau: Annotated[float, Range(at_least=0)]
    """A feature is underused below tau times the density that Zipf's law predicts for its rank. At 0 only dead
    features are."""
    hard: bool
    """Give every underused feature the weight 1, not its degree of underuse."""
    exponent: Annotated[float, Range(at_least=0, at_most=LARGEST_EXPONENT)]
    """Exponent of Zipf's law."""
    shift: Annotated[float | None, Range(at_least=0)]
    """Shift of Zipf's law, in ranks. Default: 0.004 n_features."""

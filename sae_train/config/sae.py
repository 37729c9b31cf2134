"""The settings of one SAE of a run: its size, its sparsifier, its losses and its optimizer."""

from dataclasses import dataclass

from sae_train.config.auxiliary import AuxLossConfig
from sae_train.config.budget import BudgetConfig
from sae_train.config.dictionary import NestingConfig, ParametrisationConfig
from sae_train.config.harvest import LayerConfig
from sae_train.config.optimizer import OptimizerConfig
from sae_train.config.sparsifiers import PenalisedConfig, SparsifierConfig

USUAL_K = 32.0
"""The k that rules assume where `sparsifier.coefficient` takes the place of k."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaeConfig:
    """The settings of one SAE. `RunConfig.sae` makes it; sparsifiers, losses and learners read it.

    Each field is documented at `RunConfig`, where it is checked.
    """

    k: float | None
    expansion: int
    n_features: int | None
    seed: int
    dead_window: int | None
    layer: LayerConfig
    sparsifier: SparsifierConfig
    budget: BudgetConfig
    nesting: NestingConfig
    parametrisation: ParametrisationConfig
    aux_loss: AuxLossConfig
    optimizer: OptimizerConfig

    @property
    def usual_k(self) -> float:
        """`k`, or 32 where a coefficient takes its place."""
        return USUAL_K if self.k is None else self.k

    @property
    def sparsity(self) -> str:
        """The target of sparsity in words: 'k 32' or 'coefficient 0.001'."""
        if self.k is not None:
            return f"k {self.k:g}"
        assert isinstance(self.sparsifier, PenalisedConfig)
        return f"coefficient {self.sparsifier.coefficient:g}"

    def width_problems(self, n_features: int) -> list[str]:
        """Return a problem for each k above the width of the dictionary.

        Args:
            n_features: the width, which the plan computes where only `expansion` is given.
        """
        given = "n_features" if self.n_features else f"expansion={self.expansion} times d_model"
        return [
            f"{key}={k:g}: larger than {given}={n_features}. Lower {key} or raise {given.split('=')[0]}."
            for key, k in (("k", self.k), ("budget.start_k", self.budget.start_k))
            if k is not None and k > n_features
        ]

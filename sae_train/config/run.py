"""All settings of a run, and the checks between its groups."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from sae_train.config.auxiliary import AuxKConfig, AuxLossConfig, AuxZipfConfig, NoAuxLossConfig
from sae_train.config.budget import BudgetConfig, PooledBudgetConfig
from sae_train.config.dictionary import NestingConfig, ParametrisationConfig
from sae_train.config.execution import CheckpointConfig, ParallelConfig, PlanConfig, TrackingConfig
from sae_train.config.harvest import (
    BlockLayerConfig,
    DataConfig,
    HarvestConfig,
    LayerConfig,
    LiveHarvestConfig,
    ModelConfig,
)
from sae_train.config.lanes import LaneSizes, lane_problems
from sae_train.config.naming import name_problem
from sae_train.config.optimizer import OptimizerConfig
from sae_train.config.ranges import COUNT, Range, Settings
from sae_train.config.sae import SaeConfig
from sae_train.config.source import SourceConfig
from sae_train.config.sparsifiers import FeatureChoiceConfig, PenalisedConfig, SparsifierConfig
from sae_train.errors import raise_all

PRECISIONS = ("auto", "bf16", "float32", "float64")


@dataclass(kw_only=True, slots=True)
class RunConfig(Settings):
    """All settings of a run, the dials first. The command line composes it; `training/run.py` splits it up.

    In a run of several SAEs, the settings that belong to an SAE are those of the first one. `variants` and `grid` are
    as they were typed.
    """

    k: Annotated[float | None, Range(above=0, null_with="sparsifier.coefficient")]
    """Mean number of active features a token, for every sparsifier. null where sparsifier.coefficient is given."""
    expansion: Annotated[int, Range(at_least=1)]
    """n_features as a multiple of d_model, where n_features is null."""
    n_features: Annotated[int | None, COUNT]
    """Width of the dictionary, in features. Default: expansion x d_model."""
    tokens: Annotated[int, COUNT]
    """Tokens to train on."""
    batch_tokens: Annotated[int, COUNT]
    """Tokens a step, over all ranks."""
    seed: Annotated[int, Range(at_least=0)]
    """Seed of the SAE's own random numbers. `data.seed` is the stream's."""
    dead_window: Annotated[int | None, COUNT]
    """Tokens without firing after which a feature is dead. Default: 10M, or a 25th of a shorter run."""
    precision: Annotated[str, Range(choices=PRECISIONS, noun="precision")]
    """Number format of matrix products. float64 computes everything in float64. auto takes bf16 where the hardware
    is fast at it, else float32."""
    evaluation_tokens: Annotated[int | None, COUNT]
    """Held-out tokens behind every exported figure; as many again set the thresholds. Default: a 16th of `tokens`, at
    most 50,000 and at least two contexts (harvest=tensors: two blocks of 256 rows)."""
    evaluate_every: Annotated[int, Range(at_least=0)]
    """Tokens between held-out evaluations. 0 evaluates at the end only."""
    log_every: Annotated[int, Range(at_least=1)]
    """Tokens between rows of metrics.jsonl."""
    name: str | None
    """Name of the run's directory. Default: made from the configuration."""
    runs: str
    """Directory that holds the runs."""
    dry_run: bool
    """Print the plan and stop."""
    variants: list[str] | None
    """Train an SAE for each entry, a text of key=value words: ["k=16","sparsifier=topk k=24"]. An entry changes what
    belongs to an SAE. Default: one SAE."""
    grid: Any  # a mapping or null; OmegaConf cannot set a mapping where `dict | None` is null
    """Train an SAE for each combination of values: {layer:[residual,mlp],layer.index:all,k:[16,32]}. With variants,
    each entry takes every combination. Default: none."""
    model: ModelConfig
    data: DataConfig
    harvest: HarvestConfig
    layer: LayerConfig
    sparsifier: SparsifierConfig
    budget: BudgetConfig
    nesting: NestingConfig
    parametrisation: ParametrisationConfig
    aux_loss: AuxLossConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    parallel: ParallelConfig
    plan: PlanConfig
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        groups = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found = self.problems()
        for name, group in groups.items():
            found += group.problems(f"{name}.") if isinstance(group, Settings) else []
        raise_all(found)

    def conflicts(self) -> list[str]:
        """Return a problem for each contradiction between dials and groups that needs no model to be seen."""
        found = self._sparsity_conflicts() + self._loss_conflicts()
        if 0 < self.tokens < self.batch_tokens:
            found.append(f"tokens={self.tokens}: fewer than one batch of batch_tokens={self.batch_tokens}.")
        if self.n_features is not None:
            found += self.sae.width_problems(self.n_features)
        if self.name and (problem := name_problem(self.name)):
            found.append(problem)
        if isinstance(self.harvest, LiveHarvestConfig) and not self.harvest.problems() and self.batch_tokens > 0:
            found += lane_problems(self.harvest, batch_tokens=self.batch_tokens)
        if self.dry_run and self.plan.devices and getattr(self.parallel, "feature_ranks", 0) is None:
            found.append(
                "parallel=mesh: its columns are the ranks of a node, and a plan for plan.devices has no nodes. Type "
                "parallel.feature_ranks."
            )
        return found + self._budget_conflicts() + self._fractional_problems() + self._layer_conflicts()

    def _sparsity_conflicts(self) -> list[str]:
        """Return the problems of a run with both k and a coefficient, or with none of them."""
        coefficient = self.sparsifier.coefficient if isinstance(self.sparsifier, PenalisedConfig) else None
        if coefficient is None:
            missing = f"k=null: sparsifier={self.sparsifier.name} needs a k. Give a number."
            return [missing] if self.k is None else []
        found = []
        if self.k is not None:
            found.append(
                f"k={self.k:g} and sparsifier.coefficient={coefficient:g}: the one follows from the other. Keep one."
            )
        if self.budget.start_k is not None:
            found.append(f"budget.start_k={self.budget.start_k:g}: sparsifier.coefficient leads to no k. Remove one.")
        if isinstance(self.aux_loss, AuxZipfConfig):
            found.append(
                "aux_loss=aux_zipf: its law is of densities that sum to k, and sparsifier.coefficient leads to no k. "
                "Choose another, or give k."
            )
        return found

    def _layer_conflicts(self) -> list[str]:
        """Return the problem of a layer of several blocks that no grid has asked for."""
        layer = self.layer
        if not isinstance(layer, BlockLayerConfig) or layer.stride is None or "layer.index" in (self.grid or {}):
            return []
        value = "all" if layer.stride == 1 else f'"every={layer.stride}"'
        return [
            f"layer.index={layer.index}: several blocks, which only a grid takes. Write 'grid={{layer.index:{value}}}'."
        ]

    def _loss_conflicts(self) -> list[str]:
        """Return the problems of an auxiliary loss or a parametrisation that does not work with the sparsifier."""
        found = []
        if self.sparsifier.leaves_features_out and not isinstance(self.aux_loss, NoAuxLossConfig):
            found.append(
                f"aux_loss={self.aux_loss.name}: would teach features of sparsifier={self.sparsifier.name} in the very "
                "steps that leave them out. Choose aux_loss=none."
            )
        elif self.sparsifier.silences_dead and isinstance(self.aux_loss, AuxKConfig):
            found.append(
                f"aux_loss=aux_k: a dead feature of sparsifier={self.sparsifier.name} has no positive pre-activation "
                "for it to work on (a loss of its own revives it). Choose aux_loss=none or aux_zipf."
            )
        if not self.sparsifier.has_unit_norms and self.parametrisation.name == "aligned":
            found.append(
                "parametrisation=aligned: is made of decoder rows of unit norm, and sparsifier.norms=free leaves them. "
                "Add sparsifier.norms=unit, or choose parametrisation=free."
            )
        return found

    @property
    def source(self) -> SourceConfig:
        """The settings that decide the stream of activations of a run of one SAE."""
        return self.source_for((self.sae,))

    def source_for(self, saes: Sequence[SaeConfig]) -> SourceConfig:
        """Return the settings that decide the stream of activations from which these SAEs learn."""
        layers: list[LayerConfig] = []
        for sae in saes:
            layers += [] if sae.layer in layers else [sae.layer]
        reads_gradients = any(sae.sparsifier.reads_gradients for sae in saes)
        return SourceConfig(**_values(self, SourceConfig), layers=tuple(layers), reads_gradients=reads_gradients)

    @property
    def sae(self) -> SaeConfig:
        """The settings that belong to the SAE."""
        return SaeConfig(**_values(self, SaeConfig))

    @property
    def held_out_tokens(self) -> int:
        """`evaluation_tokens`, or the number that the rule gives where it is null."""
        return self.source.held_out_tokens

    @property
    def usual_k(self) -> float:
        """`k`, or 32 where a coefficient takes its place."""
        return self.sae.usual_k

    @property
    def lane_sizes(self) -> LaneSizes:
        """The sizes of a live harvest, without any null."""
        return self.source.lane_sizes

    @property
    def reads_gradients(self) -> bool:
        """Whether each activation comes with its gradient of the language model's loss."""
        return self.sparsifier.reads_gradients

    @property
    def sparsity(self) -> str:
        """The target of sparsity in words: 'k 32' or 'coefficient 0.001'."""
        return self.sae.sparsity

    def _fractional_problems(self) -> list[str]:
        """Return the problem of a k that is no whole number, where every token keeps k features."""
        if not self.sparsifier.keeps_whole_k:
            return []
        given = {"k": self.k, "budget.start_k": self.budget.start_k}
        return [
            f"{key}={value:g}: every token of sparsifier={self.sparsifier.name} keeps a whole number of features. "
            f"Nearest: {' or '.join(map(str, _nearest_whole(value)))}."
            for key, value in given.items()
            if value is not None and math.isfinite(value) and value > 0 and value != round(value)
        ]

    def _budget_conflicts(self) -> list[str]:
        """Return the problem of a budget that the sparsifier does not split, or must split."""
        split = not isinstance(self.budget, PooledBudgetConfig)
        if self.sparsifier.splits_budget and not split:
            return [
                f"budget=pooled: {self.sparsifier.name} splits its budget over features. Choose budget=uniform or zipf."
            ]
        if split and not self.sparsifier.splits_budget:
            return [f"budget={self.budget.name}: only feature_choice splits its budget over features, so "
                    f"sparsifier={self.sparsifier.name} would never read it. Remove it or choose "
                    "sparsifier=feature_choice."]  # fmt: skip
        after = self.sparsifier.after if isinstance(self.sparsifier, FeatureChoiceConfig) else 0.0
        if after == 1:
            return [f"sparsifier.after=1: leaves no tokens to budget={self.budget.name}, so nothing would read it. "
                    "Lower it, or choose sparsifier=mutual_choice."]  # fmt: skip
        return []


def _values(config: RunConfig, part: type) -> dict[str, Any]:
    """Return the fields of a run's configuration that the class `part` has, too."""
    names = {field.name for field in dataclasses.fields(part)} & {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names}


def _nearest_whole(value: float) -> list[int]:
    """Return the nearest positive whole number, or the two nearest where `value` lies half-way."""
    below = math.floor(value)
    both = [below, below + 1] if value - below == 0.5 else [round(value)]
    return [number for number in both if number >= 1] or [1]

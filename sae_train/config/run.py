"""All settings of a run, the checks between the groups, and what of them is its identity."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from sae_train.config.budget import BudgetConfig, PooledBudgetConfig
from sae_train.config.dictionary import NestingConfig, ParametrisationConfig
from sae_train.config.harvest import (
    DataConfig,
    HarvestConfig,
    LayerConfig,
    LiveHarvestConfig,
    ModelConfig,
    TensorsHarvestConfig,
)
from sae_train.config.lanes import LaneSizes, lane_problems
from sae_train.config.naming import name_problem
from sae_train.config.sae import SaeConfig
from sae_train.config.source import SourceConfig
from sae_train.config.sparsifiers import (
    FeatureChoiceConfig,
    GatedConfig,
    GradientConfig,
    PAnnealConfig,
    PenalisedConfig,
    ReLUConfig,
    SparsifierConfig,
    TemporalMaskConfig,
    TopKConfig,
)
from sae_train.config.training import (
    AuxKConfig,
    AuxLossConfig,
    AuxZipfConfig,
    CheckpointConfig,
    NoAuxLossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrackingConfig,
)
from sae_train.errors import raise_all

PRECISIONS = ("auto", "bf16", "float32", "float64")


LARGEST_NUMBER = 10**15
"""Of tokens and the like: far above any run, far below what 64 bits hold."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything a run is told; the dials first."""

    k: float | None
    """Mean number of active features a token, for every sparsifier; null where sparsifier.coefficient is given."""
    expansion: int
    """n_features over d_model; read when n_features is null."""
    n_features: int | None
    """Width of the dictionary; null is expansion times d_model."""
    tokens: int
    """Tokens to train on."""
    batch_tokens: int
    """Tokens a step, over all ranks."""
    seed: int
    """Draws what belongs to the SAE; data.seed draws the stream."""
    dead_window: int | None
    """Tokens without firing after which a feature is dead; null is 10M, or a 25th of a shorter run."""
    precision: str
    """Of matrix products, sparse ones too: auto, bf16, float32; float64 computes everything in float64."""
    evaluation_tokens: int | None
    """Held-out tokens behind every exported figure; as many again set the thresholds. null is a 16th of `tokens`, at
    most 50,000 and at least two contexts (harvest=tensors: two blocks of 256 rows)."""
    evaluate_every: int
    """Tokens between held-out evaluations; 0 evaluates at the end only."""
    log_every: int
    """Tokens between rows of metrics.jsonl."""
    name: str | None
    """Name of the run's directory; null builds one from the configuration."""
    runs: str
    """Directory that holds the runs."""
    dry_run: bool
    """Print the plan and stop."""
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
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        parts = (self.model, self.data, self.harvest, self.layer, self.sparsifier, self.budget, self.nesting,
                 self.aux_loss, self.optimizer, self.checkpoint)  # fmt: skip
        raise_all(self.problems() + [problem for part in parts for problem in part.problems()])

    def problems(self) -> list[str]:
        """Return what is wrong with the dials, and between the groups, as far as no model is needed."""
        found = []
        coefficient = self.sparsifier.coefficient if isinstance(self.sparsifier, PenalisedConfig) else None
        if self.k is None and coefficient is None:
            found.append(f"k=null: sparsifier={self.sparsifier.name} needs a k. Give a number.")
        elif self.k is not None and coefficient is not None:
            found.append(
                f"k={self.k:g} and sparsifier.coefficient={coefficient:g}: the one follows from the other. Keep one."
            )
        elif self.k is not None and self.k <= 0:
            found.append(f"k={self.k:g}: must be positive.")
        if coefficient is not None and self.budget.start_k is not None:
            found.append(f"budget.start_k={self.budget.start_k:g}: sparsifier.coefficient leads to no k. Remove one.")
        if coefficient is not None and isinstance(self.aux_loss, AuxZipfConfig):
            found.append(
                "aux_loss=aux_zipf: its law is of densities that sum to k, and sparsifier.coefficient leads to no k. "
                "Choose another, or give k."
            )
        if isinstance(self.sparsifier, TemporalMaskConfig) and not isinstance(self.aux_loss, NoAuxLossConfig):
            found.append(
                f"aux_loss={self.aux_loss.name}: would teach features of sparsifier=temporal_mask in the very steps "
                "that leave them out. Choose aux_loss=none."
            )
        elif isinstance(self.aux_loss, AuxKConfig) and isinstance(
            self.sparsifier, GatedConfig | ReLUConfig | PAnnealConfig
        ):
            found.append(
                f"aux_loss=aux_k: a dead feature of sparsifier={self.sparsifier.name} has no positive pre-activation "
                "for it to work on (a loss of its own revives it). Choose aux_loss=none or aux_zipf."
            )
        free = isinstance(self.sparsifier, ReLUConfig) and self.sparsifier.norms == "free"
        if free and self.parametrisation.name == "aligned":
            found.append(
                "parametrisation=aligned: is made of decoder rows of unit norm, and sparsifier.norms=free leaves them. "
                "Add sparsifier.norms=unit, or choose parametrisation=free."
            )
        for key in ("tokens", "batch_tokens", "expansion", "n_features", "evaluation_tokens", "log_every",
                    "dead_window"):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < 1:
                found.append(f"{key}={value}: must be at least 1.")
        for key in ("tokens", "batch_tokens", "n_features", "dead_window", "evaluation_tokens"):
            value = getattr(self, key)
            if value is not None and value > LARGEST_NUMBER:
                found.append(f"{key}={value}: larger than {LARGEST_NUMBER:.0e}. Lower it.")
        for key in ("evaluate_every", "seed"):
            if getattr(self, key) < 0:
                found.append(f"{key}={getattr(self, key)}: must not be negative.")
        if self.data.seed < 0:
            found.append(f"data.seed={self.data.seed}: must not be negative.")
        if 0 < self.tokens < self.batch_tokens:
            found.append(f"tokens={self.tokens}: fewer than one batch of batch_tokens={self.batch_tokens}.")
        if self.precision not in PRECISIONS:
            found.append(f"precision={self.precision}: no such precision. Choose {', '.join(PRECISIONS)}.")
        if self.n_features is not None and self.k is not None and self.k > self.n_features:
            found.append(f"k={self.k:g}: larger than n_features={self.n_features}. Lower k or raise n_features.")
        if self.name and (problem := name_problem(self.name)):
            found.append(problem)
        if isinstance(self.harvest, LiveHarvestConfig) and not self.harvest.problems() and self.batch_tokens > 0:
            found += lane_problems(self.harvest, batch_tokens=self.batch_tokens)
        return found + self._budget_problems() + self._fractional_problems()

    @property
    def source(self) -> SourceConfig:
        """The settings that decide the stream of activations."""
        return SourceConfig(**_values(self, SourceConfig), reads_gradients=self.reads_gradients)

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
        """The numbers of a live harvest, with those that are null decided."""
        return self.source.lane_sizes

    @property
    def reads_gradients(self) -> bool:
        """Whether the gradient of the language model's loss comes with every activation."""
        return isinstance(self.sparsifier, GradientConfig) and self.sparsifier.beta > 0

    @property
    def sparsity(self) -> str:
        """The target of sparsity in words: 'k 32' or 'coefficient 0.001'."""
        return self.sae.sparsity

    def _fractional_problems(self) -> list[str]:
        """Return the problem of a k that is not whole where every token keeps the same number of features."""
        if not isinstance(self.sparsifier, TopKConfig):
            return []
        given = {"k": self.k, "budget.start_k": self.budget.start_k}
        return [
            f"{key}={value:g}: every token of sparsifier={self.sparsifier.name} keeps a whole number of features. "
            f"Nearest: {' or '.join(map(str, _nearest_whole(value)))}."
            for key, value in given.items()
            if value is not None and math.isfinite(value) and value > 0 and value != round(value)
        ]

    def _budget_problems(self) -> list[str]:
        split = not isinstance(self.budget, PooledBudgetConfig)
        if isinstance(self.sparsifier, FeatureChoiceConfig) and not split:
            return ["budget=pooled: feature_choice splits its budget over features. Choose budget=uniform or zipf."]
        if split and not isinstance(self.sparsifier, FeatureChoiceConfig):
            return [f"budget={self.budget.name}: only feature_choice splits its budget over features, so "
                    f"sparsifier={self.sparsifier.name} would never read it. Remove it or choose "
                    "sparsifier=feature_choice."]  # fmt: skip
        after = self.sparsifier.after if isinstance(self.sparsifier, FeatureChoiceConfig) else 0.0
        if after == 1:
            return [f"sparsifier.after=1: leaves no tokens to budget={self.budget.name}, so nothing would read it. "
                    "Lower it, or choose sparsifier=mutual_choice."]  # fmt: skip
        return []


def _values(config: RunConfig, part: type) -> dict[str, Any]:
    """Return those fields of a run's configuration that `part` has too."""
    names = {field.name for field in dataclasses.fields(part)} & {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names}


def _nearest_whole(value: float) -> list[int]:
    """Return the positive whole number next to `value`, or the two where both are as near."""
    below = math.floor(value)
    both = [below, below + 1] if value - below == 0.5 else [round(value)]
    return [number for number in both if number >= 1] or [1]


FREE_KEYS = ("name", "runs", "dry_run", "log_every", "evaluate_every", "checkpoint", "parallel", "tracking")
"""Top-level keys that cannot change the exported SAE: they are not part of a run's identity."""


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries, as it is written to config.yaml."""
    return dataclasses.asdict(config)


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the part of the configuration that can change the exported SAE, before any 'auto' is resolved.

    A model, corpus and layer that a run on ready-made tensors never reads are left out, and so are how far ahead it
    harvests and the run that budgets were taken from: where it lies changes nothing.
    """
    values = {key: value for key, value in as_dict(config).items() if key not in FREE_KEYS}
    if isinstance(config.harvest, TensorsHarvestConfig):
        values = {key: value for key, value in values.items() if key not in ("model", "layer")}
        values["data"] = {"seed": config.data.seed}
    values["harvest"].pop("prefetch")  # when a batch is harvested changes nothing in it
    values["budget"].pop("zipf_from", None)  # what it gave is there
    return values


def identity_digest(values: dict[str, Any]) -> str:
    """Return six hex digits of `identity(config)`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]

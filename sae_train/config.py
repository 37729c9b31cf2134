"""The typed configuration: what can be set, its unit, and the checks that need no model.

Values live in `conf/`; these classes hold types, one line of documentation a field, and cross-field checks.
They are never changed after loading. `null` means: the rule named in the field's line decides.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sae_train.errors import raise_all

PRECISIONS = ("auto", "bf16", "float32", "float64")
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_NUMBER = 10**15
"""Of tokens and the like: far above any run, far below what 64 bits hold."""
LARGEST_EXPONENT = 20.0
"""Of Zipf's law; measured ones are near 1."""
USUAL_K = 32.0
"""What rules in k assume where there is none."""
LARGEST_THRESHOLD = 10.0
"""Of sparsifier=jumprelu at the start."""
PENALTIES = ("l0", "tanh")
"""Of sparsifier=jumprelu."""
ATTENTION_KERNELS = ("eager", "sdpa", "flash_attention_2")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which language model."""

    name: str
    """Short name used in the run's name."""
    id: str
    """Hub id, local directory in Hugging Face layout, or 'bundled'."""
    revision: str | None
    """Hub revision; null is the newest."""
    dtype: str
    """Number format of the forward pass: float32, bfloat16 or float16."""
    attention: str
    """Attention kernel: eager, sdpa or flash_attention_2."""

    def problems(self) -> list[str]:
        found = []
        if self.dtype not in DTYPES:
            found.append(f"model.dtype={self.dtype}: not a number format. Choose {', '.join(DTYPES)}.")
        if self.attention not in ATTENTION_KERNELS:
            found.append(f"model.attention={self.attention}: no such kernel. Choose {', '.join(ATTENTION_KERNELS)}.")
        return found


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which text."""

    name: str
    """Short name."""
    id: str
    """Hub id of a dataset, a local file or directory (.txt, .jsonl, .jsonl.gz, .jsonl.xz, .parquet), or 'bundled'."""
    subset: str | None
    """The dataset's configuration on the hub, where it has several."""
    split: str
    """Split to train on (hub datasets)."""
    held_out_split: str | None
    """Split that is never trained on; null holds out 2% of documents by a hash of their text."""
    text_column: str
    """Column or JSON key that holds the text."""
    seed: int
    """Draws the order of the stream; `seed` draws the SAE."""
    repeat: bool
    """Whether a lane that has read its documents starts its next epoch; false stops the run there (exit 2)."""

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class HarvestConfig:
    """Where activations come from; see the subclasses."""

    source: str
    calibration_tokens: int
    """Tokens from which centre, scale and outlier limit are fixed, once."""

    def problems(self) -> list[str]:
        if self.calibration_tokens < 1:
            return [f"harvest.calibration_tokens={self.calibration_tokens}: must be at least 1."]
        return []


@dataclass(kw_only=True, slots=True)
class LiveHarvestConfig(HarvestConfig):
    """Run the language model while training."""

    context_length: int
    """Tokens a context, the beginning-of-sequence token included."""
    lanes: int
    """Independent readers of the text; the number of ranks divides it, and it divides batch_tokens."""
    contexts_per_forward: int
    """Contexts of one lane that pass the language model together."""
    pool_batches: int
    """Size of the shuffling pool, in batches."""

    def problems(self) -> list[str]:
        found = HarvestConfig.problems(self)
        for key, least in (("context_length", 4), ("lanes", 1), ("contexts_per_forward", 1), ("pool_batches", 2)):
            if getattr(self, key) < least:
                found.append(f"harvest.{key}={getattr(self, key)}: must be at least {least}.")
        return found


@dataclass(kw_only=True, slots=True)
class TensorsHarvestConfig(HarvestConfig):
    """Read activations from `*.safetensors` files with a tensor `activations` [n, d_model]."""

    path: str
    """Directory of the files."""
    held_out: str | None
    """Directory of held-out files; null keeps the last 5% of the rows (at most 100k) out of training."""


@dataclass(kw_only=True, slots=True)
class LayerConfig:
    """At which site the activations are taken; see the subclasses."""

    kind: str

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class BlockLayerConfig(LayerConfig):
    """A site named by its block: residual, mlp or attention."""

    index: Any
    """Block, from 0; negative counts from the end; 'middle' is n_blocks // 2."""

    def problems(self) -> list[str]:
        index = self.index
        if isinstance(index, list | tuple):
            return [f"layer.index={list(index)}: several sites in one run are not built yet. Give one block."]
        if index != "middle" and (isinstance(index, bool) or not isinstance(index, int)):
            return [f"layer.index={index}: not a block. Give an integer (negative counts from the end) or 'middle'."]
        return []


@dataclass(kw_only=True, slots=True)
class ModuleLayerConfig(LayerConfig):
    """Any module of the language model, by its dotted name."""

    path: str
    """Dotted name as in `model.named_modules()`."""
    side: str
    """Which tensor of the module: output or input."""

    def problems(self) -> list[str]:
        return (
            []
            if self.side in ("output", "input")
            else [f"layer.side={self.side}: not a side of a module. Choose output or input."]
        )


@dataclass(kw_only=True, slots=True)
class SparsifierConfig:
    """How pre-activations become a code; see the subclasses."""

    name: str

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class TopKConfig(SparsifierConfig):
    """Each token keeps its k largest affinities (Gao et al. 2024, arXiv 2406.04093)."""


@dataclass(kw_only=True, slots=True)
class MutualChoiceConfig(SparsifierConfig):
    """The batch keeps its k x tokens largest affinities (arXiv 2411.02124; BatchTopK, arXiv 2412.06410)."""


@dataclass(kw_only=True, slots=True)
class FeatureChoiceConfig(SparsifierConfig):
    """Each feature keeps its m_j largest affinities of the batch (arXiv 2411.02124)."""

    after: float
    """Share of the tokens, 0 to 1, that is trained as Mutual Choice first."""

    def problems(self) -> list[str]:
        return [] if 0 <= self.after <= 1 else [f"sparsifier.after={self.after}: a share of the tokens, 0 to 1."]


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

    exponent: float
    shift: float | None
    """null is 0.004 n_features."""
    cap: float | None
    """Largest share of a batch's tokens that a feature may fire on; null is max(0.10, 4 k / n_features)."""
    floor: float | None
    """Smallest mean number of matches a feature may have in a batch; null is min(1, k batch_tokens / n_features)."""

    def problems(self) -> list[str]:
        found = BudgetConfig.problems(self)
        if not 0 <= self.exponent <= LARGEST_EXPONENT:
            found.append(f"budget.exponent={self.exponent:g}: must be 0 to {LARGEST_EXPONENT:g}.")
        if self.shift is not None and self.shift < 0:
            found.append(f"budget.shift={self.shift:g}: must not be negative.")
        if self.cap is not None and not 0 < self.cap <= 1:
            found.append(f"budget.cap={self.cap:g}: a share of the batch's tokens, above 0 and at most 1.")
        if self.floor is not None and self.floor < 0:
            found.append(f"budget.floor={self.floor:g}: must not be negative.")
        return found


@dataclass(kw_only=True, slots=True)
class NestingConfig:
    """Whether prefixes of the dictionary must reconstruct by themselves; see the subclass."""

    name: str

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class MatryoshkaConfig(NestingConfig):
    """The first features reconstruct alone, too, and with more and more of the rest (arXiv 2503.17547)."""

    prefixes: list[float]
    """Shares of the features in each prefix, ascending; the last is 1."""

    def problems(self) -> list[str]:
        given = f"nesting.prefixes={[float(f'{share:g}') for share in self.prefixes]}"
        if not self.prefixes or self.prefixes[-1] != 1:
            return [f"{given}: the last prefix must be 1, the whole dictionary."]
        if self.prefixes[0] <= 0 or any(a >= b for a, b in pairwise(self.prefixes)):
            return [f"{given}: must be above 0 and ascend."]
        if len(self.prefixes) == 1:
            return [f"{given}: one prefix nests nothing. Add smaller ones or choose nesting=none."]
        return []


@dataclass(kw_only=True, slots=True)
class ParametrisationConfig:
    """What is trained of the encoder: `free` rows, or `aligned` ones, whose product with the decoder's row is 1."""

    name: str


@dataclass(kw_only=True, slots=True)
class AuxLossConfig:
    """A second loss for features that fire too rarely; see the subclasses."""

    name: str

    def problems(self) -> list[str]:
        return []


@dataclass(kw_only=True, slots=True)
class NoAuxLossConfig(AuxLossConfig):
    """None."""


@dataclass(kw_only=True, slots=True)
class AuxKConfig(AuxLossConfig):
    """Dead features model the residual (Gao et al. 2024, arXiv 2406.04093)."""

    weight: float
    """Factor of the auxiliary loss."""

    def problems(self) -> list[str]:
        return _weight_problems(self.weight)


@dataclass(kw_only=True, slots=True)
class AuxZipfConfig(AuxLossConfig):
    """Underused features model the residual, weighted (our reconstruction of arXiv 2411.02124's aux_zipf_loss)."""

    weight: float
    """Factor of the auxiliary loss."""
    tau: float
    """A feature is underused below tau times the density that Zipf's law gives its rank; 0 leaves the dead ones."""
    hard: bool
    """Whether every underused feature weighs 1 instead of its degree of underuse."""
    exponent: float
    shift: float | None
    """null is 0.004 n_features."""

    def problems(self) -> list[str]:
        found = _weight_problems(self.weight)
        if self.tau < 0:
            found.append(f"aux_loss.tau={self.tau:g}: must not be negative.")
        if not 0 <= self.exponent <= LARGEST_EXPONENT:
            found.append(f"aux_loss.exponent={self.exponent:g}: must be 0 to {LARGEST_EXPONENT:g}.")
        if self.shift is not None and self.shift < 0:
            found.append(f"aux_loss.shift={self.shift:g}: must not be negative.")
        return found


def _weight_problems(weight: float) -> list[str]:
    if weight > 0:
        return []
    return [f"aux_loss.weight={weight:g}: must be positive. aux_loss=none leaves the auxiliary loss out."]


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """Adam (arXiv 1412.6980)."""

    name: str
    lr: float | None
    """Peak learning rate; null is the rule in width and tokens of training/schedule.py."""
    bias_rate: float | None
    """Of the encoder's bias, as a share of the learning rate; null is a rule in firings, see training/schedule.py."""
    beta1: float
    beta2: float
    eps: float
    clip: float
    """Largest global gradient norm; 0 does not clip."""
    warmup_tokens: int | None
    """Tokens of linear warm-up; null is a share of the run, see training/schedule.py."""
    decay_tokens: int | None
    """Tokens of linear decay to 0 at the end; null is a share of the run, see training/schedule.py."""

    def problems(self) -> list[str]:
        found = []
        if self.lr is not None and self.lr <= 0:
            found.append(f"optimizer.lr={self.lr:g}: must be positive.")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                found.append(f"optimizer.{key}={getattr(self, key):g}: must be at least 0 and below 1.")
        if self.eps <= 0:
            found.append(f"optimizer.eps={self.eps:g}: must be positive.")
        for key in ("bias_rate", "clip", "warmup_tokens", "decay_tokens"):
            value = getattr(self, key)
            if value is not None and value < 0:
                found.append(f"optimizer.{key}={value:g}: must not be negative.")
        return found


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every_tokens: int | None
    """Tokens between checkpoints; null is a quarter of the run, at most 50M. 0 keeps none but the end."""
    keep: int
    """How many checkpoints to keep; 0 keeps all."""

    def problems(self) -> list[str]:
        return [
            f"checkpoint.{key}={value}: must not be negative."
            for key, value in (("every_tokens", self.every_tokens), ("keep", self.keep))
            if value is not None and value < 0
        ]


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    layout: str
    """Who owns what: 'data' gives each rank all features and its own tokens, 'features' a share of the features and all
    tokens, 'mesh' both."""


@dataclass(kw_only=True, slots=True)
class MeshConfig(ParallelConfig):
    feature_ranks: int | None
    """How many ranks share the features of one copy; null: the ranks of one node."""

    def problems(self) -> list[str]:
        if self.feature_ranks is not None and self.feature_ranks < 1:
            return [f"parallel.feature_ranks={self.feature_ranks}: must be at least 1."]
        return []


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where curves go besides metrics.jsonl."""

    name: str


@dataclass(kw_only=True, slots=True)
class WandbConfig(TrackingConfig):
    project: str
    entity: str | None
    """null is the account's default."""


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
    """Of matrix products: auto, bf16, float32; float64 computes everything in float64."""
    evaluation_tokens: int
    """Held-out tokens behind every exported figure; as many again set the thresholds."""
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
        if isinstance(self.aux_loss, AuxKConfig) and isinstance(
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
        if isinstance(self.harvest, LiveHarvestConfig) and self.harvest.lanes > 0:
            found += self._lane_problems(self.harvest)
        return found + self._budget_problems()

    @property
    def usual_k(self) -> float:
        """k, or what rules that need one assume where a coefficient takes its place."""
        return USUAL_K if self.k is None else self.k

    @property
    def sparsity(self) -> str:
        """How sparse the codes are to be, as it was told: 'k 32' or 'coefficient 0.001'."""
        if self.k is not None:
            return f"k {self.k:g}"
        assert isinstance(self.sparsifier, PenalisedConfig)
        return f"coefficient {self.sparsifier.coefficient:g}"

    def _lane_problems(self, harvest: LiveHarvestConfig) -> list[str]:
        batch, lanes = self.batch_tokens, harvest.lanes
        if batch % lanes == 0:
            return []
        nearest = sorted({max(1, batch // lanes) * lanes, (batch // lanes + 1) * lanes})
        return [f"batch_tokens={batch} over harvest.lanes={lanes}: not divisible. "
                f"Nearest batch_tokens: {' or '.join(map(str, nearest))}."]  # fmt: skip

    def _budget_problems(self) -> list[str]:
        split = not isinstance(self.budget, PooledBudgetConfig)
        if isinstance(self.sparsifier, FeatureChoiceConfig) and not split:
            return ["budget=pooled: feature_choice splits its budget over features. Choose budget=uniform or zipf."]
        if split and not isinstance(self.sparsifier, FeatureChoiceConfig):
            return [f"budget={self.budget.name}: only feature_choice splits its budget over features, so "
                    f"sparsifier={self.sparsifier.name} would never read it. Remove it or choose "
                    "sparsifier=feature_choice."]  # fmt: skip
        return []


FREE_KEYS = ("name", "runs", "dry_run", "log_every", "evaluate_every", "checkpoint", "parallel", "tracking")
"""Top-level keys that cannot change the exported SAE: they are not part of a run's identity."""


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries, as it is written to config.yaml."""
    return dataclasses.asdict(config)


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the part of the configuration that can change the exported SAE, before any 'auto' is resolved.

    A model, corpus and layer that a run on ready-made tensors never reads are left out.
    """
    values = {key: value for key, value in as_dict(config).items() if key not in FREE_KEYS}
    if isinstance(config.harvest, TensorsHarvestConfig):
        values = {key: value for key, value in values.items() if key not in ("model", "layer")}
        values["data"] = {"seed": config.data.seed}
    return values


def identity_digest(values: dict[str, Any]) -> str:
    """Return six hex digits of `identity(config)`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]

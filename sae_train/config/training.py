"""Settings of auxiliary losses, the optimizer, checkpoints, ranks and tracking."""

from dataclasses import dataclass

from sae_train.config.budget import LARGEST_EXPONENT


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
        for key in ("clip", "warmup_tokens", "decay_tokens"):
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
    beside: bool | None
    """Written by a thread beside the step from a copy in the host's memory, and there from the first row of metrics on
    that finds it written, or from the next checkpoint, stop or end, which wait; null: on a GPU (not measured yet)."""

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

"""Settings of how a run is carried out: checkpoints, ranks, plan, tracking. None of them changes the exported SAE."""

from dataclasses import dataclass
from typing import Annotated

from sae_train.config.ranges import Range, Settings


@dataclass(kw_only=True, slots=True)
class CheckpointConfig(Settings):
    """When checkpoints are written, how, and how many are kept."""

    every_tokens: Annotated[int | None, Range(at_least=0)]
    """Tokens between checkpoints. 0 writes one at the end only. Default: a quarter of the run, at most 50M."""
    keep: Annotated[int, Range(at_least=0)]
    """Newest checkpoints that are kept. 0 keeps all."""
    beside: bool | None
    """Write checkpoints in a background thread, from a copy in memory. Default: only on a GPU (not measured yet)."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig(Settings):
    """How features, tokens and SAEs are spread over ranks."""

    layout: str
    """'data': each rank has all features and its own tokens. 'features': a share of the features and all tokens.
    'mesh': both. 'saes': each rank trains some of the run's SAEs."""


@dataclass(kw_only=True, slots=True)
class MeshConfig(ParallelConfig):
    """Rows of ranks share the features of one copy of the dictionary; the tokens are split over the rows."""

    feature_ranks: Annotated[int | None, Range(at_least=1)]
    """Ranks that share the features of one copy. Default: the ranks of one node."""


@dataclass(kw_only=True, slots=True)
class PlanConfig(Settings):
    """The hardware whose time and cost the plan of `dry_run=true` predicts."""

    hardware: str | None
    """Name of the hardware, or path of a YAML file with its rates. Default: no prediction."""
    devices: Annotated[int | None, Range(at_least=1)]
    """Devices that the plan is for. Default: the ranks of the run."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig(Settings):
    """Where metrics go besides metrics.jsonl."""

    name: str


@dataclass(kw_only=True, slots=True)
class WandbConfig(TrackingConfig):
    """Metrics also go to Weights & Biases."""

    project: str
    """Project on wandb."""
    entity: str | None
    """User or team on wandb. Default: the account's own."""

"""The numbers of a run, decided before anything heavy happens: sizes, steps, schedule, memory, disk, operations."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from sae_train.config import CheckpointConfig, LaneSizes, OptimizerConfig, ParallelConfig, SaeConfig, SourceConfig
from sae_train.errors import raise_all
from sae_train.harvest.build import StreamFacts
from sae_train.ranks.layout import feature_columns
from sae_train.sae.sizes import SaeSizes
from sae_train.training.memory import Holding, check_memory, copies_in_host_memory, holdings
from sae_train.training.operations import HeldOutCost, held_out_cost, step_operations
from sae_train.training.schedule import DECAY_SHARE, WARMUP_SHARE, peak_learning_rate

LARGEST_DEAD_WINDOW = 10_000_000
DEAD_WINDOWS_A_RUN = 25
"""A shorter run's dead window is this part of it. With an eighth more features ended dead (docs/reports/quality.md)."""
RULED = ("n_features", "dead_window", "peak_lr", "warmup_tokens", "decay_tokens")
"""Fields of an SAE's plan that a rule decides where the configuration does not."""
LARGEST_CHECKPOINT_INTERVAL = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SaePlan:
    """The numbers of one SAE. `make_plan` creates it; the learner reads it."""

    site: str
    """Model and site, as in the SAE's name."""
    d_model: int
    n_features: int
    batch_tokens: int
    total_tokens: int
    """Tokens of all steps."""
    dead_window: int
    peak_lr: float
    warmup_tokens: int
    decay_tokens: int

    @property
    def sizes(self) -> SaeSizes:
        """The sizes that sparsifiers and losses read."""
        return SaeSizes(
            d_model=self.d_model,
            n_features=self.n_features,
            batch_tokens=self.batch_tokens,
            dead_window=self.dead_window,
        )

    @property
    def parameters(self) -> int:
        """Weights of encoder and decoder, and their biases."""
        return 2 * self.n_features * self.d_model + self.n_features + self.d_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a run that follow from its settings and its stream."""

    sae: SaePlan
    steps: int
    n_ranks: int
    layout: str
    """Name of the layout of ranks."""
    columns: int
    """Ranks that share the features of one copy of the dictionary. rank = row * columns + column."""
    checkpoint_every: int
    """Tokens between checkpoints; 0 keeps none but the end."""
    holdings: tuple[Holding, ...]
    """Memory of one rank, estimated."""
    prefetch: int
    """Batches that are harvested before their step, at most."""
    checkpoint_bytes: int
    disk_bytes: int
    """Disk space of the run's directory, estimated."""
    lane_sizes: LaneSizes | None
    """Lanes, contexts a forward pass and pools of a live harvest."""
    notices: tuple[str, ...]
    """Lines for the user about the schedule and the language model."""
    data_notices: tuple[str, ...]
    """Lines for the user about the data. The stream repeats them once it has begun."""
    operations: float
    """Floating-point operations of all steps, estimated: language model up to the site (with gradients: to its loss and
    back), encoder product, matches."""
    held_out: HeldOutCost

    def resolved(self) -> dict[str, float]:
        """Return the numbers that rules of this version decided, as config.yaml holds them."""
        return {name: getattr(self.sae, name) for name in RULED}

    def as_begun(self, resolved: dict[str, Any]) -> "Plan":
        """Return this plan with the numbers that rules decided when the run began. A resumed run keeps them."""
        sae = dataclasses.replace(self.sae, **{name: resolved[name] for name in RULED})
        return dataclasses.replace(self, sae=sae)

    @property
    def held_out_share(self) -> float:
        """Share of the run's estimated operations that thresholds and evaluations take."""
        return self.held_out.operations / (self.held_out.operations + self.operations)

    @property
    def memory_bytes(self) -> int:
        """Memory of one rank, estimated."""
        return sum(each.n_bytes for each in self.holdings)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.sae.batch_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of all steps."""
        return self.sae.total_tokens


def make_plan(
    source: SourceConfig,
    sae: SaeConfig,
    facts: StreamFacts,
    *,
    checkpoint: CheckpointConfig,
    parallel: ParallelConfig,
    n_ranks: int,
) -> Plan:
    """Return the plan of a run.

    Raises:
        ConfigError: settings contradict each other once the width of the activations is known, or memory is too small.
    """
    n_features = sae.n_features or sae.expansion * facts.d_model
    raise_all(sae.width_problems(n_features))
    steps = -(-source.tokens // source.batch_tokens)
    total = steps * source.batch_tokens
    numbers = _sae_plan(sae, facts, n_features=n_features, batch_tokens=source.batch_tokens, total=total)
    columns = feature_columns(parallel, n_ranks=n_ranks, n_features=n_features)
    size = {"d_model": facts.d_model, "n_features": n_features}
    held = holdings(
        source,
        sae,
        facts,
        **size,
        parameters=numbers.parameters,
        n_ranks=n_ranks,
        columns=columns,
        copies_checkpoints=copies_in_host_memory(checkpoint),
    )
    copies = 2 if copies_in_host_memory(checkpoint) else 1
    check_memory(held, source, facts, n_features=n_features, n_ranks=n_ranks, pool_copies=copies)
    every = _checkpoint_every(checkpoint.every_tokens, total)
    kept = checkpoint.keep or max(1, total // max(every, 1))
    checkpoint_bytes = 3 * source.element_size * numbers.parameters + facts.pool_bytes
    return Plan(
        sae=numbers,
        steps=steps,
        n_ranks=n_ranks,
        layout=parallel.layout,
        columns=columns,
        checkpoint_every=every,
        holdings=held,
        prefetch=facts.prefetch,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=2 * 4 * numbers.parameters + (kept + 1) * checkpoint_bytes,
        lane_sizes=facts.sizes,
        notices=(*_schedule_notices(sae.optimizer, tokens=source.tokens), *([facts.note] if facts.note else [])),
        data_notices=facts.notices,
        operations=total * (facts.flops_per_token + step_operations(sae, source, **size)),
        held_out=held_out_cost(source, facts, n_features=n_features, total=total),
    )


def _sae_plan(config: SaeConfig, facts: StreamFacts, *, n_features: int, batch_tokens: int, total: int) -> SaePlan:
    optimizer = config.optimizer
    warmup, decay = optimizer.warmup_tokens, optimizer.decay_tokens
    return SaePlan(
        site=facts.label,
        d_model=facts.d_model,
        n_features=n_features,
        batch_tokens=batch_tokens,
        total_tokens=total,
        dead_window=config.dead_window or max(1, min(LARGEST_DEAD_WINDOW, total // DEAD_WINDOWS_A_RUN)),
        peak_lr=peak_learning_rate(optimizer, n_features=n_features, tokens=total, k=config.usual_k),
        warmup_tokens=round(WARMUP_SHARE * total) if warmup is None else warmup,
        decay_tokens=round(DECAY_SHARE * total) if decay is None else decay,
    )


def _schedule_notices(optimizer: OptimizerConfig, *, tokens: int) -> list[str]:
    """Return a line for a warm-up or decay that is longer than the run."""
    lengths = {"warmup_tokens": optimizer.warmup_tokens, "decay_tokens": optimizer.decay_tokens}
    return [
        f"optimizer.{key}={value}: longer than the run of tokens={tokens}, so the learning rate never reaches its peak"
        for key, value in lengths.items()
        if value is not None and value > tokens
    ]


def _checkpoint_every(every: int | None, total: int) -> int:
    return max(1, min(LARGEST_CHECKPOINT_INTERVAL, total // 4)) if every is None else every

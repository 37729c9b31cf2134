"""The numbers of a run, decided before anything heavy happens: sizes, steps, schedule, memory, disk, operations."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sae_train.config import CheckpointConfig, LaneSizes, ParallelConfig, SaeConfig, SourceConfig
from sae_train.errors import CheckpointError
from sae_train.harvest.build import StreamFacts
from sae_train.ranks.layout import feature_columns, owners
from sae_train.training.hardware import Hardware
from sae_train.training.holdings import MemoryModel, copies_in_host_memory, rounds_weights
from sae_train.training.memory import Holding, available_bytes, needed_bytes
from sae_train.training.operations import HeldOutCost, held_out_cost, step_operations
from sae_train.training.sae_plan import RULED, SaePlan, sae_plans

LARGEST_CHECKPOINT_INTERVAL = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a run that follow from its settings and its stream."""

    saes: dict[str, SaePlan]
    """The SAEs by name, in the order in which they were asked for."""
    steps: int
    batch_tokens: int
    total_tokens: int
    """Tokens of all steps."""
    n_ranks: int
    layout: str
    """Name of the layout of ranks."""
    columns: int
    """Ranks that share the features of one copy of the dictionary. rank = row * columns + column."""
    owners: dict[str, int]
    """The rank of each SAE, where every SAE lives on one rank (`parallel=saes`). Empty in other layouts."""
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

    def resolved(self) -> dict[str, dict[str, float]]:
        """Return the numbers that rules of this version decided, by SAE, as config.yaml holds them."""
        return {name: {key: getattr(sae, key) for key in RULED} for name, sae in self.saes.items()}

    def as_begun(self, resolved: dict[str, Any]) -> "Plan":
        """Return this plan with the numbers that rules decided when the run began. A resumed run keeps them.

        Raises:
            CheckpointError: they are in the form of an older version.
        """
        try:
            saes = {
                name: dataclasses.replace(sae, **{key: resolved[name][key] for key in RULED})
                for name, sae in self.saes.items()
            }
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                "config.yaml: written by another version of sae-train, whose runs this one cannot continue. Finish "
                "the run with that version (config.yaml names its commit), or choose another name=."
            ) from error
        return dataclasses.replace(self, saes=saes)

    @property
    def held_out_share(self) -> float:
        """Share of the run's estimated operations that thresholds and evaluations take."""
        return self.held_out.operations / (self.held_out.operations + self.operations)

    @property
    def memory_bytes(self) -> int:
        """Memory of one rank, estimated."""
        return needed_bytes(self.holdings)


def make_plan(
    source: SourceConfig,
    saes: Sequence[SaeConfig],
    facts: StreamFacts,
    *,
    checkpoint: CheckpointConfig,
    parallel: ParallelConfig,
    n_ranks: int,
    hardware: Hardware | None = None,
) -> Plan:
    """Return the plan of a run.

    Args:
        saes: the settings of each SAE, all of them at sites that `facts` lists.
        hardware: the hardware whose memory counts; None: this machine's.

    Raises:
        ConfigError: settings contradict each other once the widths of the activations are known, two SAEs are equal,
            or memory is too small.
    """
    steps = -(-source.tokens // source.batch_tokens)
    total = steps * source.batch_tokens
    planned = sae_plans(source, saes, facts, total=total)
    columns = feature_columns(parallel, n_ranks=n_ranks, n_features=min(sae.n_features for sae in planned.values()))
    where = owners({name: sae.parameters for name, sae in planned.items()}, parallel=parallel, n_ranks=n_ranks)
    memory = MemoryModel(
        source=source,
        facts=facts,
        parallel=parallel,
        n_ranks=n_ranks,
        columns=columns,
        copies_checkpoints=copies_in_host_memory(checkpoint),
        rounds=rounds_weights(source.precision if hardware is None else hardware.resolved(source.precision)),
    )
    available = available_bytes() if hardware is None else int(hardware.memory_bytes)
    place = "for each" if hardware is None else f"on one {hardware.name}"
    memory.check(list(planned.values()), available=available, where=place)
    every = _checkpoint_every(checkpoint.every_tokens, total)
    kept = checkpoint.keep or max(1, total // max(every, 1))
    parameters = sum(sae.parameters for sae in planned.values())
    checkpoint_bytes = 3 * source.element_size * parameters + facts.pool_bytes
    return Plan(
        saes=planned,
        steps=steps,
        batch_tokens=source.batch_tokens,
        total_tokens=total,
        n_ranks=n_ranks,
        layout=parallel.layout,
        columns=columns,
        owners=where,
        checkpoint_every=every,
        holdings=memory.holdings(list(planned.values())),
        prefetch=facts.prefetch,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=2 * 4 * parameters + (kept + 1) * checkpoint_bytes,
        lane_sizes=facts.sizes,
        notices=(*_schedule_notices(planned.values(), tokens=source.tokens), *([facts.note] if facts.note else [])),
        data_notices=facts.notices,
        operations=total * (facts.flops_per_token + sum(step_operations(sae, source) for sae in planned.values())),
        held_out=held_out_cost(source, facts, planned.values(), total=total),
    )


def _schedule_notices(saes: Iterable[SaePlan], *, tokens: int) -> list[str]:
    """Return a line for each warm-up or decay that is longer than the run."""
    typed = [(key, getattr(sae.config.optimizer, key)) for sae in saes for key in ("warmup_tokens", "decay_tokens")]
    return [
        f"optimizer.{key}={value}: longer than the run of tokens={tokens}, so the learning rate never reaches its peak"
        for key, value in dict.fromkeys(typed)
        if value is not None and value > tokens
    ]


def _checkpoint_every(every: int | None, total: int) -> int:
    return max(1, min(LARGEST_CHECKPOINT_INTERVAL, total // 4)) if every is None else every

"""What a run will do, worked out before anything heavy happens: sizes, steps, schedule, memory, disk, operations."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from sae_train.config import (
    LaneSizes,
    NoAuxLossConfig,
    RunConfig,
    TopKConfig,
    ZipfBudgetConfig,
)
from sae_train.errors import ConfigError, raise_all
from sae_train.evaluation.language_model import PASSES_OF_A_BATCH
from sae_train.harvest.build import StreamFacts
from sae_train.kernels import backend
from sae_train.ranks.layout import feature_columns
from sae_train.sae.zipf_budget import law_of
from sae_train.sparsifiers.topk import MULTIPLE
from sae_train.training.memory import Holding, available_bytes, gigabytes, largest, largest_pool
from sae_train.training.schedule import DECAY_SHARE, WARMUP_SHARE, peak_learning_rate

LARGEST_DEAD_WINDOW = 10_000_000
DEAD_WINDOWS_A_RUN = 25
"""A shorter run's dead window is this part of it. With an eighth more features ended dead (docs/quality.md, which also
says what else changed in that comparison)."""
RULED = ("n_features", "dead_window", "peak_lr", "warmup_tokens", "decay_tokens")
"""Fields of a plan that a rule decides where the configuration does not."""
HELD = {"relu": 6, "temporal_mask": 8, "jumprelu": 10, "gated": 10, "p_anneal": 12}
HELD_OTHERWISE, HELD_WITH_SLOPES = 2, 4
"""Matrices as large as a batch's pre-activations that a step holds at most: by sparsifier, where it may begin dense
(temporal_mask: and decode twice); by any other; and where it reads gradients. Of fp32 steps on a CPU, as
measured by tests/training/test_memory.py, rounded up."""
GRADIENTS = "of the language model's loss come with the activations: pools take twice the memory"
"""What the plan says where they are harvested."""
LARGEST_CHECKPOINT_INTERVAL = 50_000_000


ENCODES_FOR_THRESHOLDS = 2
"""Products of the encoder and a held-out token that setting thresholds takes, about; a sample is looked at first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutCost:
    """What thresholds and evaluations of a run cost."""

    tokens: int
    """Of each half, each time."""
    passes: int
    """Forward passes of the language model over an evaluated token: whole ones where there are several."""
    times: int
    """How often they are made."""
    flops: float
    """Estimated, of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers that a configuration and its stream imply."""

    d_model: int
    n_features: int
    label: str
    """Model and site, as in the run's name."""
    steps: int
    batch_tokens: int
    n_ranks: int
    columns: int
    """Ranks that share the features of one copy of the dictionary; rank = row * columns + column."""
    dead_window: int
    peak_lr: float
    warmup_tokens: int
    decay_tokens: int
    checkpoint_every: int
    holdings: tuple[Holding, ...]
    """What one rank holds, estimated: SAE, gradients, moments, its share of the pool and of what is harvested ahead,
    and of a step's matrices as large as its pre-activations and the logits of a loss whose gradient is harvested the
    larger, where both come one after the other; where the one is harvested beside the other, both."""
    prefetch: int
    """Batches that are harvested ahead of the step at most."""
    checkpoint_bytes: int
    sizes: LaneSizes | None
    """Lanes, contexts a forward pass and pools of a live harvest."""
    notes: tuple[str, ...]
    """What the user should be told of the schedule and the language model."""
    data_notices: tuple[str, ...]
    """What the user should be told of the data; the stream says it again once it has begun."""
    flops: float
    """Estimated, of all steps: language model up to the site (gradients: to its loss and back), encoder product,
    matches."""
    held_out: "HeldOutCost"

    def resolved(self) -> dict[str, float]:
        """Return what the rules of this version decided, as config.yaml keeps it."""
        return {name: getattr(self, name) for name in RULED}

    def as_begun(self, resolved: dict[str, Any]) -> "Plan":
        """Return this plan with what the rules decided when the run began: a resume holds to it."""
        return dataclasses.replace(self, **{name: resolved[name] for name in RULED})

    @property
    def held_out_share(self) -> float:
        """Share of the run's estimated operations that thresholds and evaluations take."""
        return self.held_out.flops / (self.held_out.flops + self.flops)

    @property
    def memory_bytes(self) -> int:
        return sum(each.n_bytes for each in self.holdings)

    @property
    def total_tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def parameters(self) -> int:
        return 2 * self.n_features * self.d_model + self.n_features + self.d_model


def make_plan(config: RunConfig, facts: StreamFacts, *, n_ranks: int) -> Plan:
    """Work out the plan.

    Raises:
        ConfigError: settings that contradict each other once the width of the activations is known.
    """
    n_features = config.n_features or config.expansion * facts.d_model
    raise_all(config.width_problems(n_features))
    steps = -(-config.tokens // config.batch_tokens)
    total = steps * config.batch_tokens
    element = 8 if config.precision == "float64" else 4
    parameters = 2 * n_features * facts.d_model + n_features + facts.d_model
    columns = feature_columns(config.parallel, n_ranks=n_ranks, n_features=n_features)
    optimizer = config.optimizer
    plan = Plan(
        d_model=facts.d_model,
        n_features=n_features,
        label=facts.label,
        steps=steps,
        batch_tokens=config.batch_tokens,
        n_ranks=n_ranks,
        columns=columns,
        dead_window=config.dead_window or max(1, min(LARGEST_DEAD_WINDOW, total // DEAD_WINDOWS_A_RUN)),
        peak_lr=peak_learning_rate(optimizer, n_features=n_features, tokens=total, k=config.usual_k),
        warmup_tokens=round(WARMUP_SHARE * total) if optimizer.warmup_tokens is None else optimizer.warmup_tokens,
        decay_tokens=round(DECAY_SHARE * total) if optimizer.decay_tokens is None else optimizer.decay_tokens,
        checkpoint_every=_checkpoint_every(config.checkpoint.every_tokens, total),
        holdings=_holdings(config, facts, n_features=n_features, n_ranks=n_ranks, columns=columns),
        prefetch=facts.prefetch,
        sizes=facts.sizes,
        notes=(*_schedule_notes(config), *([facts.note] if facts.note else [])),
        data_notices=facts.notices,
        checkpoint_bytes=3 * element * parameters + facts.pool_bytes,
        flops=total * (facts.flops_per_token + _sae_flops(config, facts.d_model, n_features)),
        held_out=_held_out_cost(config, facts, n_features=n_features, total=total),
    )
    _check_memory(plan, config, facts)
    return plan


def describe(plan: Plan, config: RunConfig, *, path: str) -> str:
    """Return the plan as `dry_run=true` prints it."""
    kept = config.checkpoint.keep or max(1, plan.total_tokens // max(plan.checkpoint_every, 1))
    disk = 2 * 4 * plan.parameters + (kept + 1) * plan.checkpoint_bytes
    model = "the language model but for its logits" if config.reads_gradients else "the language model"
    rows = [
        ("site", f"{plan.label}, d_model {plan.d_model}"),
        ("SAE", f"{config.sparsifier.name}, {config.sparsity}, {plan.n_features} features"),
        ("parameters", f"{plan.parameters:,}"),
        *([("gradients", GRADIENTS)] if config.reads_gradients else []),
        *([("text", _lanes_text(plan.sizes))] if plan.sizes is not None else []),
        ("budget", _budget_text(config, n_features=plan.n_features)),
        ("auxiliary loss", f"{config.aux_loss.name}; dead is {plan.dead_window:,} tokens without firing"),
        ("tokens", f"{plan.total_tokens:,} in {plan.steps:,} steps of {plan.batch_tokens:,}"),
        ("ranks", _ranks_text(plan, config)),
        ("harvest ahead", f"up to {plan.prefetch} batches beside the step" if plan.prefetch else "none, in the step"),
        ("learning rate", f"{plan.peak_lr:.2e}, warm-up {plan.warmup_tokens:,} tokens, decay {plan.decay_tokens:,}"),
        ("memory a rank", f"{plan.memory_bytes / 1e9:.2f} GB without {model} (estimated)"),
        ("disk", f"{disk / 1e9:.2f} GB, of which {plan.checkpoint_bytes / 1e9:.2f} a checkpoint (estimated)"),
        ("thresholds", _thresholds_text(plan)),
        ("evaluation", _evaluation_text(plan)),
        ("operations", f"{plan.flops + plan.held_out.flops:.2e} floating-point, of which {plan.held_out_share:.0%} for "
                       "thresholds and evaluation (estimated)"),
        ("directory", path),
        *(("note", note) for note in (*plan.notes, *plan.data_notices)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _thresholds_text(plan: Plan) -> str:
    cost = plan.held_out
    model = ", 1 forward pass of the language model up to the site" if cost.passes else ""
    return f"{cost.tokens:,} held-out tokens{model}"


def _evaluation_text(plan: Plan) -> str:
    """Return the text about evaluations: tokens and passes of one, and how often the run makes one."""
    cost = plan.held_out
    passes = ", 1 forward pass of the language model up to the site" if cost.passes else ""
    if cost.passes > 1:
        passes = f", {cost.passes} whole forward passes of the language model: clean, spliced, zero-ablated"
    often = "once, at the end" if cost.times == 1 else f"{cost.times} times, each with its thresholds"
    return f"{cost.tokens:,} other held-out tokens{passes}; {often}"


def _budget_text(config: RunConfig, *, n_features: int) -> str:
    """Return the budget's name, and for Zipf's law where its numbers come from."""
    budget, after = config.budget, getattr(config.sparsifier, "after", 0.0)
    if not isinstance(budget, ZipfBudgetConfig):
        return budget.name
    if budget.is_open and after > 0:
        return f"{budget.name}, fitted to the densities after {after:.0%} of the tokens"
    exponent, shift = law_of(budget, n_features=n_features)
    source = "" if budget.zipf_from is None else f", of {budget.zipf_from}"
    return f"{budget.name}, exponent {exponent:g}, shift {shift:g}{source}"


def _lanes_text(sizes: LaneSizes) -> str:
    return (
        f"{sizes.lanes} lanes, {sizes.share} tokens of each a step; {sizes.contexts_per_forward} contexts of "
        f"{sizes.context_length} tokens a forward pass; pools of {sizes.pool_batches} batches"
    )


def _ranks_text(plan: Plan, config: RunConfig) -> str:
    rows = plan.n_ranks // plan.columns
    text = f"{plan.n_ranks}, layout {config.parallel.layout}"
    if plan.n_ranks > 1:
        text += f": {rows} of tokens x {plan.columns} of features; {plan.batch_tokens // plan.n_ranks:,} tokens a rank"
    return text


def _schedule_notes(config: RunConfig) -> list[str]:
    """Return a line for a warm-up or decay that is longer than the run."""
    lengths = {"warmup_tokens": config.optimizer.warmup_tokens, "decay_tokens": config.optimizer.decay_tokens}
    return [
        f"optimizer.{key}={value}: longer than the run of tokens={config.tokens}, so the learning rate never reaches "
        "its peak"
        for key, value in lengths.items()
        if value is not None and value > config.tokens
    ]


def _checkpoint_every(every: int | None, total: int) -> int:
    return max(1, min(LARGEST_CHECKPOINT_INTERVAL, total // 4)) if every is None else every


def _sae_flops(config: RunConfig, d_model: int, n_features: int) -> float:
    """Return operations a token: the encoder product, and per match decode, gradient to value, two weight gradients.

    Gradients take a second product of the encoder's size.
    """
    k = config.usual_k
    if isinstance(config.sparsifier, TopKConfig) and config.sparsifier.multi_weight > 0:
        k *= 1 + MULTIPLE
    matches = k if isinstance(config.aux_loss, NoAuxLossConfig) else 2 * k  # the auxiliary loss's share is a guess
    products = 2 if config.reads_gradients else 1
    return 2 * products * d_model * n_features + 8 * d_model * matches


def _held_out_cost(config: RunConfig, facts: StreamFacts, *, n_features: int, total: int) -> HeldOutCost:
    """Return the estimated cost of thresholds and evaluations."""
    tokens, encodes = config.held_out_tokens, 2 * facts.d_model * n_features
    passes = (PASSES_OF_A_BATCH if facts.whole_flops_per_token else 1) if config.harvest.runs_model else 0
    whole = facts.whole_flops_per_token
    before_site = min(facts.flops_per_token, whole or facts.flops_per_token)  # with gradients the first has more in it
    evaluation = passes * whole or before_site
    every, batch = config.evaluate_every, config.batch_tokens
    times = 1 + (min((total - batch) // every, total // batch - 1) if every else 0)
    flops = times * tokens * (before_site + ENCODES_FOR_THRESHOLDS * encodes + evaluation + encodes)
    return HeldOutCost(tokens=tokens, passes=passes, times=times, flops=flops)


def _holdings(
    config: RunConfig, facts: StreamFacts, *, n_features: int, n_ranks: int, columns: int
) -> tuple[Holding, ...]:
    element = 8 if config.precision == "float64" else 4
    width = "n_features" if config.n_features else "expansion"
    parameters = 2 * n_features * facts.d_model + n_features + facts.d_model
    pre_activations = config.batch_tokens * n_features // n_ranks  # a row's tokens times a column's features
    held = HELD_WITH_SLOPES if config.reads_gradients else HELD.get(config.sparsifier.name, HELD_OTHERWISE)
    step, logits = held * element * pre_activations, facts.logit_bytes
    if not facts.prefetch:  # never there together
        step, logits = (step, 0) if step >= logits else (0, logits)
    name = f"[{n_features}, {facts.d_model}]"
    copied = (3 * element * parameters + facts.pool_bytes) // n_ranks
    copied = copied if _copies_in_host_memory(config) else 0
    rounds = config.precision == "bf16" or (config.precision == "auto" and _has_bf16())
    return (
        Holding(f"weights, gradients and two moments, 8 of {name}", 4 * element * parameters // columns,
                (f"lower {width}", "parallel=features over several ranks")),
        Holding(f"weights rounded to bf16, 2 of {name}", 4 * n_features * facts.d_model // columns * rounds,
                (f"lower {width}",)),
        Holding(f"copies of weights and moments, 6 of {name}, and of pools while a checkpoint is written", copied,
                ("checkpoint.beside=false",)),
        Holding(f"pre-activations and what is as large, {held} of [{config.batch_tokens}, {n_features}]"
                + (f" over {n_ranks} ranks" if n_ranks > 1 else ""), step,
                ("lower batch_tokens", f"lower {width}")),
        Holding("logits of the language model and the way back through them", logits,
                ("lower harvest.contexts_per_forward",)),
        Holding("pools", facts.pool_bytes // n_ranks, ("lower harvest.pool_batches", "lower batch_tokens")),
        Holding("activations harvested ahead", facts.ahead_bytes // n_ranks, ("lower harvest.prefetch",)),
    )  # fmt: skip


def _copies_in_host_memory(config: RunConfig) -> bool:
    """Return whether a checkpoint's copy takes this rank's memory. A GPU's state is copied to the host's memory."""
    return bool(config.checkpoint.beside) and not torch.cuda.is_available()


def _has_bf16() -> bool:
    return backend.has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _check_memory(plan: Plan, config: RunConfig, facts: StreamFacts) -> None:
    """Refuse a plan that cannot fit in this rank's memory, and name the largest pools that would fit."""
    available, sizes = available_bytes(), facts.sizes
    if plan.memory_bytes <= available:
        return
    given, way_out = f"n_features={plan.n_features}, batch_tokens={plan.batch_tokens}:", ""
    copies = 2 if _copies_in_host_memory(config) else 1
    batch_bytes = copies * facts.pool_batch_bytes // plan.n_ranks
    fits = sizes and largest_pool(sizes, batch_bytes=batch_bytes, too_much=plan.memory_bytes - available)
    if sizes and fits:
        pools = gigabytes(facts.pool_bytes // plan.n_ranks)
        given = f"harvest.pool_batches={sizes.pool_batches}: with pools of {pools} this"
        way_out = f"Largest that fits: {fits}. "
    raise ConfigError(
        f"{given} needs about {gigabytes(plan.memory_bytes)} a rank, and there are {gigabytes(available)} for each. "
        f"{way_out}{largest(plan.holdings)}"
    )

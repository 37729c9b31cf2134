"""The plan of a run as `dry_run=true` prints it."""

from sae_train.config import LaneSizes, SaeConfig, SourceConfig, ZipfBudgetConfig
from sae_train.sae.zipf_budget import law_of
from sae_train.training.plan import Plan

GRADIENTS = "harvested with the activations, of the language model's loss; they double what a batch holds"


def describe(plan: Plan, source: SourceConfig, *, path: str) -> str:
    """Return the plan as lines of text.

    Args:
        path: directory of the run.
    """
    numbers, cost = next(iter(plan.saes.values())), plan.held_out
    sae = numbers.config
    model = "the language model but for its logits" if source.reads_gradients else "the language model"
    operations = f"{plan.operations + cost.operations:.2e} floating-point"
    rows = [
        ("site", f"{numbers.site}, d_model {numbers.d_model}"),
        ("SAE", f"{sae.sparsifier.name}, {sae.sparsity}, {numbers.n_features} features"),
        ("parameters", f"{numbers.parameters:,}"),
        *([("gradients", GRADIENTS)] if source.reads_gradients else []),
        *([("text", _lanes_text(plan.lane_sizes))] if plan.lane_sizes is not None else []),
        ("budget", _budget_text(sae, n_features=numbers.n_features)),
        ("auxiliary loss", f"{sae.aux_loss.name}; dead is {numbers.dead_window:,} tokens without firing"),
        ("tokens", f"{plan.total_tokens:,} in {plan.steps:,} steps of {plan.batch_tokens:,}"),
        ("ranks", _ranks_text(plan)),
        ("prefetch", f"up to {plan.prefetch} batches in a background thread" if plan.prefetch else "none"),
        ("learning rate", f"{numbers.peak_lr:.2e}, warm-up {numbers.warmup_tokens:,} tokens, decay "
                          f"{numbers.decay_tokens:,}"),
        ("memory a rank", f"{plan.memory_bytes / 1e9:.2f} GB without {model} (estimated)"),
        ("disk", f"{plan.disk_bytes / 1e9:.2f} GB, of which {plan.checkpoint_bytes / 1e9:.2f} a checkpoint "
                 "(estimated)"),
        ("thresholds", _thresholds_text(plan)),
        ("evaluation", _evaluation_text(plan)),
        ("operations", f"{operations}, of which {plan.held_out_share:.0%} for thresholds and evaluation (estimated)"),
        ("directory", path),
        *(("note", line) for line in (*plan.notices, *plan.data_notices)),
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


def _budget_text(config: SaeConfig, *, n_features: int) -> str:
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


def _ranks_text(plan: Plan) -> str:
    rows = plan.n_ranks // plan.columns
    text = f"{plan.n_ranks}, layout {plan.layout}"
    if plan.n_ranks > 1:
        text += f": {rows} of tokens x {plan.columns} of features; {plan.batch_tokens // plan.n_ranks:,} tokens a rank"
    return text

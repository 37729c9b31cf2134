"""The plan of a run as `dry_run=true` prints it."""

from sae_train.config import LaneSizes, SaeConfig, SourceConfig, ZipfBudgetConfig
from sae_train.sae.zipf_budget import law_of
from sae_train.training.memory import gigabytes
from sae_train.training.plan import Plan
from sae_train.training.plan_tables import prediction_rows, sae_table
from sae_train.training.prediction import Prediction

GRADIENTS = "harvested with the activations, of the language model's loss; they double what a batch holds"


def describe(plan: Plan, source: SourceConfig, *, path: str, prediction: Prediction | None = None) -> str:
    """Return the plan as lines of text. Several SAEs come as a table.

    Args:
        path: directory of the run.
        prediction: time and cost on the hardware that was asked for.
    """
    cost = plan.held_out
    operations = f"{plan.operations + cost.operations:.2e} floating-point"
    several = len(plan.saes) > 1
    rows = [
        *(_suite_rows(plan) if several else _sae_rows(plan)),
        *([("gradients", GRADIENTS)] if source.reads_gradients else []),
        *([("text", _lanes_text(plan.lane_sizes))] if plan.lane_sizes is not None else []),
        ("tokens", f"{plan.total_tokens:,} in {plan.steps:,} steps of {plan.batch_tokens:,}"),
        ("ranks", _ranks_text(plan)),
        ("prefetch", _prefetch_text(plan, prediction)),
        *_memory_rows(plan),
        ("disk", f"{plan.disk_bytes / 1e9:.2f} GB, of which {plan.checkpoint_bytes / 1e9:.2f} a checkpoint "
                 "(estimated)"),
        ("thresholds", _thresholds_text(plan)),
        ("evaluation", _evaluation_text(plan)),
        ("operations", f"{operations}, of which {plan.held_out_share:.0%} for thresholds and evaluation (estimated)"),
        *([] if prediction is None else prediction_rows(prediction)),
        ("directory", path),
        *(("note", line) for line in (*plan.notices, *plan.data_notices)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([*lines, "", *sae_table(plan, prediction)] if several else lines)


def _prefetch_text(plan: Plan, prediction: Prediction | None) -> str:
    if plan.prefetch:
        return f"up to {plan.prefetch} batches in a background thread"
    if prediction is not None and prediction.overlaps:  # of a GPU, while this machine has none
        return f"none here; on {prediction.hardware.name} in a background thread"
    return "none"


def _sae_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the rows about the one SAE of a run."""
    (numbers,) = plan.saes.values()
    sae = numbers.config
    return [
        ("site", f"{numbers.site}, d_model {numbers.d_model}"),
        ("SAE", f"{sae.sparsifier.name}, {sae.sparsity}, {numbers.n_features} features"),
        ("parameters", f"{numbers.parameters:,}"),
        ("budget", _budget_text(sae, n_features=numbers.n_features)),
        ("auxiliary loss", f"{sae.aux_loss.name}; dead is {numbers.dead_window:,} tokens without firing"),
        ("learning rate", f"{numbers.peak_lr:.2e}, warm-up {numbers.warmup_tokens:,} tokens, decay "
                          f"{numbers.decay_tokens:,}"),
    ]  # fmt: skip


def _suite_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the rows about all SAEs of a run; the table below has one line for each."""
    saes = plan.saes.values()
    sites = dict.fromkeys(sae.site for sae in saes)
    rates = sorted({sae.peak_lr for sae in saes})
    spread = f"{rates[0]:.2e}" if len(rates) == 1 else f"{rates[0]:.2e} to {rates[-1]:.2e}"
    return [
        ("SAEs", f"{len(saes)}, at {len(sites)} site{'s' if len(sites) > 1 else ''}"),
        ("parameters", f"{sum(sae.parameters for sae in saes):,}"),
        ("learning rate", spread),
    ]


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the memory of a rank, and a row for each owner that holds some."""
    held = sorted((each for each in plan.holdings if each.n_bytes), key=lambda each: -each.n_bytes)
    note = " (estimated; without what passes through the language model)" if plan.lane_sizes else " (estimated)"
    own = [("", f"{gigabytes(each.n_bytes):>9}  {each.what}") for each in held]
    return [("memory a rank", f"{plan.memory_bytes / 1e9:.2f} GB{note}"), *own]


def _thresholds_text(plan: Plan) -> str:
    cost = plan.held_out
    model = ", 1 forward pass of the language model up to the site" if cost.passes else ""
    return f"{cost.tokens:,} held-out tokens{model}"


def _evaluation_text(plan: Plan) -> str:
    """Return the text about evaluations: tokens and passes of one, and how often the run makes one."""
    cost = plan.held_out
    passes = ", 1 forward pass of the language model up to the site" if cost.passes else ""
    if cost.passes > 1:
        each = "clean, spliced, zero-ablated" if len(plan.saes) == 1 else "clean; zero-ablated by site; spliced by SAE"
        passes = f", {cost.passes} whole forward passes of the language model: {each}"
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
    if plan.owners:
        counts = [list(plan.owners.values()).count(rank) for rank in range(plan.n_ranks)]
        return f"{text}: at most {max(counts)} SAEs on a rank"
    if plan.n_ranks > 1:
        text += f": {rows} of tokens x {plan.columns} of features; {plan.batch_tokens // plan.n_ranks:,} tokens a rank"
    return text

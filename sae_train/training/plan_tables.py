"""The tables of the plan's text: the SAEs of a run, and its predicted time and cost."""

from sae_train.config import differing
from sae_train.training.plan import Plan
from sae_train.training.prediction import Prediction
from sae_train.training.work import DEAD_SHARE

LONGEST_SITE = 30
"""Characters of a site's label in the table, which is at most 100 characters wide."""
UNCHECKED = "a prediction: no GPU has been measured"
CHECKED = "a prediction; docs/plan.md compares such predictions with measured steps"

PARTS = {
    "encode": "encoder product",
    "select": "selection over pre-activations",
    "decode": "decoding and gradients of matches",
    "update": "Adam, norms and renormalisation",
    "rest": "errors, counters and totals",
    "auxiliary": f"auxiliary loss, if {DEAD_SHARE:.1%} of the features are dead",
}
"""The parts of a step in words, where their names are short."""


def sae_table(plan: Plan, prediction: Prediction | None) -> list[str]:
    """Return a line for each SAE: site, sparsifier, sparsity, width, parameters, rank, predicted ms a step.

    Other settings in which the SAEs differ come last.
    """
    heads = ["site", "sparsifier", "sparsity", "features", "parameters"]
    heads += (["rank"] if plan.owners else []) + ([] if prediction is None else ["ms a step"])
    settings = differing({name: sae.config for name, sae in plan.saes.items()})
    heads += ["settings"] if any(settings.values()) else []
    rows = []
    for name, sae in plan.saes.items():
        config = sae.config
        cells = [_shortened(sae.site), config.sparsifier.name, config.sparsity, f"{sae.n_features:,}"]
        cells.append(f"{sae.parameters:,}")
        cells += [str(plan.owners[name])] if plan.owners else []
        cells += [] if prediction is None else [f"{1e3 * prediction.saes[name]:.3g}"]
        cells += [" ".join(f"{key}={value}" for key, value in settings[name].items())] if any(settings.values()) else []
        rows.append(cells)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return [_line(row, widths) for row in [heads, *rows]]


def prediction_rows(prediction: Prediction) -> list[tuple[str, str]]:
    """Return the rows about time and cost: names and texts."""
    hardware, devices = prediction.hardware, prediction.devices
    training = (prediction.start_seconds + prediction.steps * prediction.step_seconds) / 3600
    held_out = prediction.held_out_seconds / 3600
    harvest = "at the same time" if prediction.overlaps else "before it"
    return [
        ("predicted for", f"{devices} x {hardware.name}; {UNCHECKED if hardware.overlaps else CHECKED}"),
        ("step", f"{_ms(prediction.step_seconds)} ms: training {_ms(prediction.training_seconds)}, harvest "
                 f"{_ms(sum(prediction.harvest.values()))} {harvest}"),
        *(("", f"{_ms(seconds):>9} ms  {PARTS.get(name, name)}") for name, seconds in prediction.training.items()),
        *(("", f"{_ms(seconds):>9} ms  harvest: {name}") for name, seconds in prediction.harvest.items()),
        ("speed", f"{prediction.tokens_per_second:,.0f} tokens/s"),
        ("time", f"{_hours(prediction.hours)} hours: training {_hours(training)}, thresholds and evaluation "
                 f"{_hours(held_out)}"),
        ("cost", f"{_dollars(prediction.cost)}, {_dollars(prediction.cost_of_an_sae)} an SAE, at "
                 f"{_dollars(hardware.price)} an hour of one {hardware.name}"),
        ("not counted", "reading and tokenising text, writing checkpoints, starting the program"),
    ]  # fmt: skip


def _line(cells: list[str], widths: list[int]) -> str:
    """Return the cells in columns: the first three to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if i < 3 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _shortened(label: str) -> str:
    """Return a site's label, cut in the middle where it is too long for the table."""
    if len(label) <= LONGEST_SITE:
        return label
    half = (LONGEST_SITE - 3) // 2
    return f"{label[:half]}...{label[-(LONGEST_SITE - 3 - half) :]}"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}" if hours >= 1 else f"{hours:.2g}"


def _dollars(amount: float) -> str:
    if amount >= 100:
        return f"${amount:,.0f}"
    return f"${amount:.2f}" if amount >= 0.01 or amount == 0 else f"${amount:.1g}"

"""The results of a finished run as text and as entries of suite.json."""

from pathlib import Path
from typing import Any

from sae_train.formats.suite import suite_entry, suite_table
from sae_train.harvest.build import StreamFacts
from sae_train.training.plan import Plan

ALL_OF_IT = 0.999
"""Share of the budget above which it counts as used up."""


def suite_of(summary: dict[str, Any], plan: Plan, facts: StreamFacts) -> list[dict[str, Any]]:
    """Return the entry of each SAE in suite.json.

    Args:
        summary: content of summary.json.
        plan: of the run.
        facts: of the run's stream.
    """
    return [
        suite_entry(
            name,
            figures,
            plan.saes[name].config,
            site=plan.saes[name].site,
            d_model=plan.saes[name].d_model,
            n_features=plan.saes[name].n_features,
            tokens=summary["tokens"],
            source=facts.record,
        )
        for name, figures in summary["saes"].items()
    ]


def results_text(summary: dict[str, Any], plan: Plan, facts: StreamFacts, *, path: Path) -> str:
    """Return the last lines of a run: the quality of its SAEs, its speed and its directory."""
    saes = summary["saes"]
    speed = f"{summary['tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s; {path}"
    if len(saes) == 1:
        ((name, figures),) = saes.items()
        return f"{summary['run']}: {verdict(figures, sparsity=plan.saes[name].config.sparsity)}; {speed}"
    n_stopped = sum("stopped" in figures for figures in saes.values())
    stopped = f", {n_stopped} of them stopped" if n_stopped else ""
    return f"{suite_table(suite_of(summary, plan, facts))}\n{summary['run']}: {len(saes)} SAEs{stopped}; {speed}"


def verdict(figures: dict[str, Any], *, sparsity: str) -> str:
    """Return the quality of an SAE in words, or the reason why it was stopped.

    Args:
        figures: entry of the SAE in summary.json.
        sparsity: target of sparsity in words, `SaeConfig.sparsity`.
    """
    if "stopped" in figures:
        return f"stopped: {figures['stopped']}"
    aim = f"target {figures['target_l0']:.4g}" if sparsity.startswith("k") else sparsity
    if figures.get("correction") == {}:
        aim += ", missed: thresholds are exported as training left them"
    if figures["used_share"] < ALL_OF_IT:
        aim += f" of {sparsity}: positive affinities ran out"
    parts = [f"L0 {figures['l0']:.1f} ({aim})", f"FVU {figures['fvu']:.3f}", f"dead {figures['dead_fraction']:.1%}"]
    if "ce_recovered" in figures:
        parts.append(f"CE recovered {figures['ce_recovered']:.1%}")
    return ", ".join(parts)

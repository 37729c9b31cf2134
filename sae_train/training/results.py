"""The results of a finished run: its exported SAEs, summary.json and suite.json, and the last lines that it prints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_train.config import differing
from sae_train.errors import UserError
from sae_train.formats.durable import write_text
from sae_train.formats.suite import suite_entry, suite_table
from sae_train.harvest.build import StreamFacts
from sae_train.phases import Phases
from sae_train.training.console import say
from sae_train.training.export import Exported, write_export
from sae_train.training.plan import Plan
from sae_train.training.run_directory import RunDirectory
from sae_train.training.trainer import Trainer

ALL_OF_IT = 0.999
"""Share of the budget above which it counts as used up."""


def write_saes(
    made: Sequence[Exported], trainer: Trainer, directory: RunDirectory, facts: StreamFacts, *, phases: Phases
) -> dict[str, dict[str, Any]]:
    """Write `saes/NAME/` of each SAE; return its entry of the summary by name. Collective.

    Args:
        made: the SAEs of this rank.
        trainer: of the run.
        directory: of the run.
        facts: of the run's stream.
        phases: shows the progress.

    Raises:
        UserError: on every rank, if an SAE cannot be written.
    """
    filtered, found = trainer.stream.dropped_shares(), dict[str, dict[str, Any]]()
    problem: UserError | None = None
    for learner, sae, figures in made:
        found[learner.name] = figures | {
            "filtered_share": filtered[learner.plan.site],
            "dead_fraction_training": learner.dead_fraction(),
        }
        path, own = directory.path / "saes" / learner.name, found[learner.name]
        try:
            write_export(sae, path, trainer=trainer, learner=learner, facts=facts, figures=own, phases=phases)
        except UserError as error:  # every rank that holds this SAE raises; the others come to the end of their list
            problem = error
            break
        if len(trainer.plan.saes) > 1 and learner.ranks.is_first:  # the verdict on a single SAE is the run's last line
            say(f"{learner.name}: {verdict(own, sparsity=learner.config.sparsity)}")
    trainer.ranks.raise_together(problem)
    return found


def write_results(summary: dict[str, Any], plan: Plan, facts: StreamFacts, directory: RunDirectory) -> None:
    """Write suite.json where there are several SAEs, then summary.json, whose presence means finished."""
    if len(plan.saes) > 1:
        write_text(directory.suite, json.dumps(suite_of(summary, plan, facts), indent=2) + "\n")
    write_text(directory.summary, json.dumps(summary, indent=2) + "\n")


def suite_of(summary: dict[str, Any], plan: Plan, facts: StreamFacts) -> list[dict[str, Any]]:
    """Return the entry of each SAE in suite.json.

    Args:
        summary: content of summary.json.
        plan: of the run.
        facts: of the run's stream.
    """
    settings = differing({name: sae.config for name, sae in plan.saes.items()})
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
            settings=settings[name],
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
    reasons = [f"{name} was stopped: {figures['stopped']}" for name, figures in saes.items() if "stopped" in figures]
    last = f"{summary['run']}: {len(saes)} SAEs{stopped}; {speed}"
    return "\n".join([suite_table(suite_of(summary, plan, facts)), *reasons, last])


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

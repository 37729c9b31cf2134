"""The console output of a run: lines on stdout, and a progress bar for each long phase on stderr."""

import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

TRAINING = "training"
"""The phase whose bar stays on the screen."""
SECONDS_TO_THE_FIRST, SECONDS_INSIDE, SECONDS_ON_A_TERMINAL, SECONDS_IN_A_FILE = 0.5, 5.0, 0.5, 15.0
"""Seconds until a bar is shown, until one inside another phase is, and between two updates after that."""
ALL_OF_IT = 0.999
"""Share of the budget above which it counts as used up."""


def say(text: str) -> None:
    """Write a line to stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def warn(text: str) -> None:
    """Write a line to stderr, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class ProgressBar:
    """The bar of one phase on stderr: units done, rate, time left. Silent on ranks after the first.

    `Phases` makes one for each phase. Training shows it at once, other phases after half a second, or after five inside
    another phase. A terminal shows it as long as the phase lasts; a file gets a line every 15 seconds and one at the
    end.
    """

    def __init__(self, name: str, *, total: int, unit: str, done: int, is_nested: bool, is_first: bool) -> None:
        is_terminal = sys.stderr.isatty()
        self._later = SECONDS_ON_A_TERMINAL if is_terminal else SECONDS_IN_A_FILE
        self._bar = tqdm(
            desc=name,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            disable=not is_first,
            delay=0.0 if name == TRAINING else SECONDS_INSIDE if is_nested else SECONDS_TO_THE_FIRST,
            mininterval=SECONDS_TO_THE_FIRST,
            miniters=0,
            leave=name == TRAINING or not is_terminal,
            position=None if is_terminal else 0,  # in a file nothing is moved up or down
            file=sys.stderr,
            **_room(),
        )

    def advance(self, n: int) -> None:
        if self._bar.update(n):  # it was shown
            self._bar.mininterval = self._later

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._bar.close()


def _room() -> dict[str, Any]:
    """Return tqdm's options for the size of the screen. tqdm shows nothing on a screen that reports no lines."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return {"dynamic_ncols": True}  # no terminal
    return {"dynamic_ncols": True} if size.lines and size.columns else {"ncols": 80, "nrows": 24}


def progress_text(rows: list[dict[str, Any]]) -> str:
    """Return the text behind the bar of the training, from the newest row of each SAE."""
    worst = max(rows, key=lambda row: float(row["train/fvu"]))
    slowest = f"; slowest: {worst['perf/slowest']}" if "perf/slowest" in worst else ""
    if len(rows) > 1:
        return f"highest FVU {worst['train/fvu']:.3f} ({worst['sae']}){slowest}"
    return f"FVU {worst['train/fvu']:.3f}, L0 {worst['train/l0']:.1f}, dead {worst['train/dead_features']}{slowest}"


def verdict(figures: dict[str, Any], *, sparsity: str) -> str:
    """Return the quality of an SAE in words, or why it was stopped.

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


def results_of(summary: dict[str, Any], *, path: Path, sparsities: dict[str, str]) -> str:
    """Return the last lines of a run: the quality of its SAEs, its speed and its directory.

    Args:
        summary: content of summary.json.
        path: directory of the run.
        sparsities: target of sparsity in words of each SAE, by name.
    """
    speed = f"{summary['tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s; {path}"
    if len(sparsities) == 1:
        ((name, sparsity),) = sparsities.items()
        return f"{summary['run']}: {verdict(summary['saes'][name], sparsity=sparsity)}; {speed}"
    lines = [f"{name}: {verdict(figures, sparsity=sparsities[name])}" for name, figures in summary["saes"].items()]
    n_stopped = sum("stopped" in figures for figures in summary["saes"].values())
    stopped = f", {n_stopped} of them stopped" if n_stopped else ""
    return "\n".join([*lines, f"{summary['run']}: {len(lines)} SAEs{stopped}; {speed}"])

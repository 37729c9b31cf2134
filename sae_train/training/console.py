"""What a run says to the person who started it: lines on stdout, a progress bar on stderr."""

import sys
from typing import Any

from tqdm import tqdm

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


class Progress:
    """A bar with tokens, tokens/s, time left and the newest figures; silent on ranks after the first."""

    def __init__(self, *, total_tokens: int, done_tokens: int, is_first: bool) -> None:
        self._bar = tqdm(
            total=total_tokens,
            initial=done_tokens,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not is_first,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            file=sys.stderr,
        )

    def advance(self, tokens: int) -> None:
        self._bar.update(tokens)

    def show(self, row: dict[str, Any]) -> None:
        """Put a row's figures beside the bar."""
        self._bar.set_postfix_str(
            f"FVU {row['train/fvu']:.3f}, L0 {row['train/l0']:.1f}, dead {row['train/dead_features']}", refresh=False
        )

    def close(self) -> None:
        self._bar.close()


def verdict(
    *, name: str, figures: dict[str, Any], tokens: int, tokens_per_second: float, sparsity: str, path: str
) -> str:
    """Return the last line of a run: what was trained, how good it is, where it lies."""
    aim = f"target {figures['target_l0']:.4g}" if sparsity.startswith("k") else sparsity
    if figures.get("correction") == {}:
        aim += ", missed: thresholds are exported as training left them"
    if figures["used_share"] < ALL_OF_IT:
        aim += f" of {sparsity}: positive affinities ran out"
    parts = [f"L0 {figures['l0']:.1f} ({aim})", f"FVU {figures['fvu']:.3f}", f"dead {figures['dead_fraction']:.1%}"]
    if "ce_recovered" in figures:
        parts.append(f"CE recovered {figures['ce_recovered']:.1%}")
    return f"{name}: {', '.join(parts)}; {tokens:,} tokens at {tokens_per_second:,.0f} tokens/s; {path}"

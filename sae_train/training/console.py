"""The console output of a run: lines on stdout, and a progress bar for each long phase on stderr."""

import os
import sys
from typing import Any

from tqdm import tqdm

from sae_train.harvest.meter import slowest_part

TRAINING = "training"
"""The phase whose bar stays on the screen."""
SECONDS_TO_THE_FIRST, SECONDS_INSIDE, SECONDS_ON_A_TERMINAL, SECONDS_IN_A_FILE = 0.5, 5.0, 0.5, 15.0
"""Seconds until a bar is shown, until one inside another phase is, and between two updates after that."""


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
    end. A notebook with ipywidgets shows a widget.
    """

    def __init__(self, name: str, *, total: int, unit: str, done: int, is_nested: bool, is_first: bool) -> None:
        is_notebook = _is_notebook()
        is_terminal = sys.stderr.isatty()
        is_live = is_terminal or is_notebook
        self._later = SECONDS_ON_A_TERMINAL if is_live else SECONDS_IN_A_FILE
        self._bar = (_widget() if is_notebook else tqdm)(
            desc=name,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            disable=not is_first,
            delay=0.0 if name == TRAINING else SECONDS_INSIDE if is_nested else SECONDS_TO_THE_FIRST,
            mininterval=SECONDS_TO_THE_FIRST,
            miniters=0,
            leave=name == TRAINING or not is_live,
            position=None if is_terminal else 0,  # in a file nothing is moved up or down
            file=sys.stderr,
            **({"dynamic_ncols": True} if is_notebook else _room()),
        )

    def advance(self, n: int) -> None:
        if self._bar.update(n):  # it was shown
            self._bar.mininterval = self._later

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        self._bar.close()


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    if "ipykernel.zmqshell" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _widget() -> Any:
    """Return tqdm's widget for notebooks, or its text bar where ipywidgets is not installed."""
    from tqdm import notebook

    return tqdm if notebook.IProgress is None else notebook.tqdm


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
    slowest = f"; slowest: {slowest_part(worst)}" if slowest_part(worst) else ""
    if len(rows) > 1:
        return f"highest FVU {worst['train/fvu']:.3f} ({worst['sae']}){slowest}"
    return f"FVU {worst['train/fvu']:.3f}, L0 {worst['train/l0']:.1f}, dead {worst['train/dead_features']}{slowest}"

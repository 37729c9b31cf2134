"""What earlier batches' selection tells the next: where to look, never what to keep."""

import torch
from torch import Tensor

LATEST = 0.3
"""Weight of the latest step from one cut to the next, against those before it."""
FADING = 0.9
"""Of an error that is larger than usual, what the next batch still reckons with."""
MARGIN = 2.0
"""Errors like the largest of late that a guess stays below the foretold cut."""
LEAST_MARGIN, MOST_MARGIN = 0.005, 0.5
"""Shares of the foretold cut."""


class Hint:
    """Where the next cut may be, after those of earlier batches, the same on all ranks.

    Cuts of successive batches differ by a percent or so, and rise or fall in training. Results do not depend on it, so
    no checkpoint holds it. It lives on the host, with selection on a CPU.
    """

    def __init__(self) -> None:
        self._cut: float | None = None
        self._step, self._error = 1.0, 0.025

    def guess(self, dtype: torch.dtype) -> Tensor | None:
        """Return what is likely a little less than the next cut, a scalar; None where nothing is known."""
        if self._cut is None:
            return None
        margin = min(max(MARGIN * self._error, LEAST_MARGIN), MOST_MARGIN)
        return torch.tensor(self._cut * self._step * (1 - margin), dtype=dtype)

    def learn(self, cut: Tensor) -> None:
        """Take a batch's cut, a scalar."""
        found = float(cut)
        if not 0 < found < float("inf"):  # too few entries to cut, or none kept
            self._cut = None
            return
        if self._cut is not None:
            step = found / self._cut
            error = min(abs(step / self._step - 1), 1.0)
            self._error = max(error, FADING * self._error + (1 - FADING) * error)
            self._step += LATEST * (min(step, 2.0) - self._step)
        self._cut = found

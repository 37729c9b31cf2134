"""How long steps take, and what of it they wait."""

import time

import torch


class Clock:
    """Wall time of an interval's steps: the whole, what they waited for activations, what was harvested beside them."""

    def __init__(self) -> None:
        self._waited, self._busy, self._tokens, self._steps = 0.0, 0.0, 0, 0
        self._beside = 0.0

    def start(self, tokens: int) -> None:
        """Begin a step over so many tokens, which waits for its activations first."""
        self._mark = time.perf_counter()
        self._tokens += tokens
        self._steps += 1

    def harvested(self) -> None:
        """The activations are there."""
        now = time.perf_counter()
        self._waited += now - self._mark
        self._busy += now - self._mark
        self._mark = now

    def stop(self) -> None:
        """The step is over."""
        self._busy += time.perf_counter() - self._mark

    def row(self, *, beside: float) -> dict[str, float]:
        """Return the interval's `perf/` figures and start the next.

        `beside`: seconds of harvest so far that no step waited for. On the step's own thread all of it is waited for.
        """
        busy = max(self._busy, 1e-9)
        row = {
            "perf/tokens_per_second": self._tokens / busy,
            "perf/harvest_fraction": (self._waited + beside - self._beside) / busy,
            "perf/wait_fraction": self._waited / busy,
            "perf/step_ms": 1e3 * (busy - self._waited) / max(self._steps, 1),
            "perf/peak_memory_gb": peak_memory_bytes() / 1e9,
        }
        self._waited, self._busy, self._tokens, self._steps = 0.0, 0.0, 0, 0
        self._beside = beside
        return row


def peak_memory_bytes() -> int:
    """Return the most memory this process has held: of the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

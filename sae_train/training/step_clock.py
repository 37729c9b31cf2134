"""Wall time of training steps, and the part of it that they wait for activations."""

import time

import torch


class StepClock:
    """Times the steps of an interval between rows of metrics. The trainer makes one."""

    def __init__(self) -> None:
        self._waited, self._busy, self._tokens, self._steps = 0.0, 0.0, 0, 0
        self._harvested_before = 0.0

    def start(self, tokens: int) -> None:
        """Begin a step over `tokens` tokens, which waits for its activations first."""
        self._mark = time.perf_counter()
        self._tokens += tokens
        self._steps += 1

    def harvested(self) -> None:
        """End the step's wait for activations."""
        now = time.perf_counter()
        self._waited += now - self._mark
        self._busy += now - self._mark
        self._mark = now

    def stop(self) -> None:
        """End the step."""
        self._busy += time.perf_counter() - self._mark

    def row(self, *, harvested_in_background: float) -> dict[str, float]:
        """Return the interval's `perf/` figures, and start the next interval.

        Args:
            harvested_in_background: seconds of harvest so far, since the run's start, for which no step waited.
        """
        busy = max(self._busy, 1e-9)
        harvested = self._waited + harvested_in_background - self._harvested_before
        row = {
            "perf/tokens_per_second": self._tokens / busy,
            "perf/harvest_fraction": harvested / busy,
            "perf/wait_fraction": self._waited / busy,
            "perf/step_ms": 1e3 * (busy - self._waited) / max(self._steps, 1),
            "perf/peak_memory_gb": peak_memory_bytes() / 1e9,
        }
        self._waited, self._busy, self._tokens, self._steps = 0.0, 0.0, 0, 0
        self._harvested_before = harvested_in_background
        return row


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held: of the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

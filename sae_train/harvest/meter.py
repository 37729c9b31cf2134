"""Seconds and tokens of each part of a run, from the text to the step. Clocks alone: nothing waits for a device."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PARTS = {
    "read": "reading",
    "tokenised": "tokenising",
    "harvested": "the language model",
    "pooled": "the pool",
    "trained": "training",
}
"""Parts in the order in which a token passes them, with their names for the user. Files are only read."""
SUFFIX = "_tokens_per_second"
"""End of the names of their speeds in a row of metrics, such as `perf/harvested_tokens_per_second`."""


class Meter:
    """Adds up seconds and tokens by part. A stream makes one; its lanes and the trainer report to it.

    The background thread of a stream reports, too. No part runs in two threads at a time.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.tokens = dict.fromkeys(PARTS, 0)

    @contextmanager
    def timed(self, part: str, n_tokens: int = 0) -> Iterator[None]:
        """Count the seconds inside the block, and `n_tokens`, to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began
            self.tokens[part] += n_tokens

    def count(self, part: str, n_tokens: int) -> None:
        """Count tokens to a part whose block did not show their number beforehand."""
        self.tokens[part] += n_tokens


def slowest_part(row: Mapping[str, Any]) -> str:
    """Return the user's name of the slowest part of a row's interval, or '' where none was timed."""
    timed = {part: row[f"perf/{part}{SUFFIX}"] for part in PARTS if f"perf/{part}{SUFFIX}" in row}
    return PARTS[min(timed, key=lambda part: float(timed[part]))] if timed else ""

"""Tokens a second of each part of a run, and which part is the slowest."""

from typing import Any

import torch
from torch import Tensor

from sae_train.harvest.meter import PARTS, SUFFIX, Meter
from sae_train.ranks.interface import Ranks


class Throughput:
    """The speeds of the parts over all ranks, since the last row and since the run's start. The trainer makes one.

    The speed of a part is its tokens over the seconds that ranks spent in it, mean over ranks. Parts that run at the
    same time are measured apart, so the slowest one limits the run. On a GPU a part's seconds are those of the host.
    """

    def __init__(self, meter: Meter, *, ranks: Ranks) -> None:
        self._meter, self._ranks = meter, ranks
        self._before = torch.zeros(2, len(PARTS), dtype=torch.float64)  # of processes before a resume
        self._told = self._before.clone()  # at the last row

    def row(self) -> dict[str, float]:
        """Return the interval's speeds as figures of a row, and start the next interval. Collective."""
        now = self.totals()
        speeds, self._told = _speeds(now - self._told), now
        return {f"perf/{part}{SUFFIX}": speed for part, speed in speeds.items()}

    def summary(self) -> dict[str, Any]:
        """Return the speeds of the whole run, and the slowest part. Collective."""
        speeds = _speeds(self.totals())
        return speeds | ({"slowest": min(speeds, key=lambda part: speeds[part])} if speeds else {})

    def totals(self) -> Tensor:
        """Return tokens and seconds of each part since the run's start, [2, parts] float64. Collective."""
        own = torch.tensor([list(self._meter.tokens.values()), list(self._meter.seconds.values())], dtype=torch.float64)
        over_ranks = self._ranks.sum(own.to(self._ranks.device)).cpu()
        over_ranks[1] /= self._ranks.size
        return self._before + over_ranks

    def load_totals(self, totals: list[list[float]]) -> None:
        """Continue from the `totals` of an earlier process, as JSON holds them."""
        self._before = torch.tensor(totals, dtype=torch.float64)
        self._told = self._before.clone()


def _speeds(totals: Tensor) -> dict[str, float]:
    tokens, seconds = totals.tolist()
    both = zip(PARTS, tokens, seconds, strict=True)
    return {part: n / own for part, n, own in both if n > 0 and own > 0}

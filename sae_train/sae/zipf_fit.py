"""Zipf's law fitted to how often features fire: density(rank) ~ (rank + shift)^-exponent (arXiv 2411.02124).

The paper says that densities follow the law for most ranks and fall below it at the low end. It does not say how it
fits the law: range, weights and search are ours. Everything runs on the host in float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HEAD, BODY = 0.01, 0.8
"""First and last fitted rank, as shares of the features that fire. The densest features follow no law, and the rarest
fall below it."""
LEAST_FEATURES = 8
"""Smallest number of densities to which a law of two numbers is fitted."""
GRID, SECTIONS = 32, 40
"""Steps of the search over log(1 + shift): of the grid, and of the golden section between two points of it."""
MOST_RANKS = 4096
"""Largest number of fitted ranks. Of more ranks evenly spaced ones are fitted, as each row of metrics has a fit."""
DIGITS = 6
"""Significant digits of the result. Its last bits mean nothing, and a number that is typed gives the same budgets."""


class ZipfFit(NamedTuple):
    """density(rank) ~ (rank + shift)^-exponent, the densest feature having rank 1."""

    exponent: float
    """Exponent, at least 0."""
    shift: float
    """Shift in ranks, 0 to n_features."""
    r2: float
    """1 - residual / total sum of squares of log density over the fitted ranks, weighted by density."""


def fit_zipf(density_F: Tensor) -> ZipfFit | None:
    """Return the law of the ranks from 1% to 80% of the features that fire.

    Least squares of log density on log(rank + shift), by regression for a shift and a search over shifts from 0 to F.
    A feature weighs as its density: the variance of a log count is one over the count.

    Args:
        density_F: share of tokens (or count) of every feature, at least 0, in any order.

    Returns:
        The fit; None where fewer than 8 ranks are left or all are equally dense.
    """
    ordered_F = density_F.detach().double().cpu().sort(descending=True).values
    ordered_F = ordered_F[ordered_F > 0]
    first, last = max(1, math.ceil(HEAD * len(ordered_F))), int(BODY * len(ordered_F))
    density_R = ordered_F[first - 1 : last]
    if len(density_R) < LEAST_FEATURES or density_R[0] == density_R[-1]:
        return None
    every = -(-len(density_R) // MOST_RANKS)
    line = _Line(density_R[::every], first=first, every=every)
    span = math.log1p(len(density_F))
    grid = [span * step / GRID for step in range(GRID + 1)]
    best = min(range(GRID + 1), key=lambda place: line(math.expm1(grid[place]))[1])
    found = _golden_section(lambda place: line(math.expm1(place))[1], grid[max(best - 1, 0)], grid[min(best + 1, GRID)])
    place = min((grid[best], found), key=lambda place: line(math.expm1(place))[1])
    exponent, missed = line(math.expm1(place))
    return ZipfFit(
        *(round(float(f"{value:.{DIGITS}g}"), DIGITS) for value in (exponent, math.expm1(place), 1 - missed))
    )


class _Line:
    """The weighted regression of log density on log(rank + shift) for a shift."""

    def __init__(self, density_R: Tensor, *, first: int, every: int) -> None:
        self._rank_R = first + every * torch.arange(len(density_R), dtype=torch.float64)
        self._weight_R = density_R / density_R.sum()
        log_R = density_R.log()
        self._log_R = log_R - self._weight_R @ log_R
        self._total = float(self._weight_R @ self._log_R.square())

    def __call__(self, shift: float) -> tuple[float, float]:
        """Return the exponent, and the residual share of the sum of squares."""
        x_R = (self._rank_R + shift).log()
        x_R -= self._weight_R @ x_R
        slope = (self._weight_R @ (x_R * self._log_R)) / (self._weight_R @ x_R.square())
        missed = self._weight_R @ (self._log_R - slope * x_R).square()
        return -float(slope), float(missed) / self._total


def _golden_section(loss: Callable[[float], float], low: float, high: float) -> float:
    """Return the minimum of `loss` between `low` and `high`, if it falls and then rises there."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(SECTIONS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return (low + high) / 2

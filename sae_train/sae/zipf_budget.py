"""The split of a batch's budget over features by their rank: Zipf's law, cap and floor, and rounding.

arXiv 2411.02124 sets Feature Choice's budgets by a Zipf distribution without publishing its details. Shift, cap, floor
and rounding are our reconstruction. Everything runs on the host in float64, so every rank computes the same numbers.
"""

import torch
from torch import Tensor

from sae_train.config import ZipfBudgetConfig

BISECTIONS = 200
DEFAULT_EXPONENT = 1.0
"""Exponent of Zipf's law where none is given."""


def default_shift(n_features: int) -> float:
    """Return the shift of Zipf's law where none is given."""
    return 0.004 * n_features


def law_of(budget: ZipfBudgetConfig, *, n_features: int) -> tuple[float, float]:
    """Return exponent and shift, each as given or by default."""
    exponent = DEFAULT_EXPONENT if budget.exponent is None else budget.exponent
    return exponent, default_shift(n_features) if budget.shift is None else budget.shift


def zipf_mass(n_features: int, *, exponent: float, shift: float) -> Tensor:
    """Return (rank + shift)^-exponent for ranks 1 to n_features, scaled to sum 1 [F], float64.

    Example: 3 features, exponent 1 and shift 0 give [6/11, 3/11, 2/11].
    """
    rank_F = torch.arange(1, n_features + 1, dtype=torch.float64)
    mass_F = ((rank_F + shift) / (1 + shift)) ** -exponent
    return mass_F / mass_F.sum()


def water_fill(weight_F: Tensor, *, total: float, floor: float, cap: float) -> Tensor:
    """Return shares [F], float64, that sum to `total`: proportional to `weight_F`, but clamped to [floor, cap].

    Example: weights [6, 3, 1], total 10, floor 2 and cap 5 give [5, 3, 2].

    Args:
        weight_F: positive, descending weights, float64.
        total: a number between floor * F and cap * F.
        floor: smallest share.
        cap: largest share.
    """
    ascending_F = weight_F.flip(0).contiguous()
    sums = torch.cat([weight_F.new_zeros(1), weight_F.cumsum(0)])
    n_features = len(weight_F)
    low, high = floor / float(weight_F[0]), cap / float(weight_F[-1])
    capped, floored = 0, 0
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        bounds = torch.tensor([floor / level, cap / level], dtype=torch.float64)
        floored = int(torch.searchsorted(ascending_F, bounds[0]))
        capped = n_features - int(torch.searchsorted(ascending_F, bounds[1]))
        between = float(sums[n_features - floored] - sums[capped])
        spent = floored * floor + capped * cap + level * between
        if high - level <= 0 or level - low <= 0:
            break
        low, high = (level, high) if spent < total else (low, level)
    if between > 0:
        level = (total - floored * floor - capped * cap) / between
    return (weight_F * level).clamp(floor, cap)


def round_systematically(share_F: Tensor, *, total: int, u: float) -> Tensor:
    """Return integers m_j = floor(C_j + u) - floor(C_{j-1} + u) that sum to `total`, C the running sum of shares.

    Each m_j is its share rounded down or up. Over a uniform `u` of [0, 1) the mean of m_j is the share.

    Example: shares [1.5, 0.25, 1.25], total 3 and u 0.5 give [2, 0, 1].

    Args:
        share_F: shares on the host, float64, that sum to `total` up to rounding.
        total: sum of the integers.
        u: a number from `keyed_uniform`, the same on every rank.
    """
    upper_F = share_F.cumsum(0).clamp(max=total)
    upper_F[-1] = total
    steps_F = torch.floor(upper_F + u).long()
    return torch.diff(steps_F, prepend=steps_F.new_zeros(1))

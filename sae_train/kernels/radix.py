"""The K-th largest number of a set that is spread over ranks, exactly, by histograms over its bits.

The bits of positive floats, read as integers, are ordered like the floats. Each pass counts the numbers by one
digit, from the highest down, among those that agree with the digits found so far: a few all-reduces of 16 KB,
whatever the size of the set, and no wait for the device.
"""

import torch
from torch import Tensor

from sae_train.ranks import Ranks

DIGIT_BITS = 11
INTEGER = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


def kth_largest(values: Tensor, k: int, ranks: Ranks) -> Tensor:
    """Return the k-th largest positive of all ranks' `values` [any shape], a scalar of their dtype.

    It is 0 where fewer than k are positive, and all of them are to be kept. NaN counts as not positive.
    """
    values = values.reshape(-1)
    if k < 1:
        return values.new_full((), torch.inf)
    if ranks.size == 1 and values.device.type == "cpu":
        return _kth_largest_here(values, k)
    integer, top = INTEGER[values.dtype]
    bits = torch.where(values > 0, values, 0).view(integer)
    prefix = torch.zeros((), dtype=integer, device=values.device)
    missing = torch.full((), k, dtype=torch.int64, device=values.device)
    active = bits > 0
    enough = None
    for low in reversed(range(0, top, DIGIT_BITS)):
        digit = ((bits >> low) & ((1 << DIGIT_BITS) - 1)).long()
        counts = _histogram(digit, active)
        from_top = ranks.sum(counts).flip(0).cumsum(0)
        if enough is None:
            enough = from_top[-1] >= k
        skipped = (from_top < missing).sum().clamp(max=(1 << DIGIT_BITS) - 1)
        missing = missing - torch.where(skipped > 0, from_top[(skipped - 1).clamp(min=0)], 0)
        found = (1 << DIGIT_BITS) - 1 - skipped
        active = active & (digit == found)
        prefix = prefix | (found.to(integer) << low)
    return torch.where(torch.as_tensor(enough), prefix.view(values.dtype), 0)


def _kth_largest_here(values: Tensor, k: int) -> Tensor:
    if k > len(values):
        return values.new_zeros(())
    positive = torch.where(values > 0, values, 0)
    return positive.topk(k, sorted=False).values.min()


def _histogram(digit: Tensor, active: Tensor) -> Tensor:
    """[2^DIGIT_BITS] int64: how many active numbers have each digit."""
    counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=digit.device)
    return counts.scatter_add_(0, digit, active.long())

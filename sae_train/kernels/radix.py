"""The K-th largest of a set that is spread over ranks, exactly, by histograms over its bits.

The bits of positive floats, read as integers, are ordered like the floats. Each pass counts the keys by one
digit, from the highest down, among those that agree with the digits found so far: a few all-reduces of 16 KB,
whatever the size of the set, and no wait for the device. Values find their cut this way, and what equals the cut
goes on by its place in the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sae_train.ranks.interface import Ranks

DIGIT_BITS = 11
INTEGER = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


def positive(bound: Tensor) -> Tensor:
    """Return the bound, or the least positive number where it is not positive."""
    return torch.maximum(bound, torch.nextafter(bound.new_zeros(()), bound.new_ones(())))


def kth_largest(values: Tensor, k: int, ranks: Ranks) -> Tensor:
    """Return the k-th largest positive of all ranks' `values` [any shape], a scalar of their dtype.

    It is 0 where fewer than k are positive, and all of them are to be kept. NaN counts as not positive.
    """
    values = values.reshape(-1)
    if k < 1:
        return values.new_full((), torch.inf)
    values = torch.where(values > 0, values, 0)
    if ranks.size == 1:
        return values.topk(k, sorted=False).values.min() if k <= len(values) else values.new_zeros(())
    integer, n_bits = INTEGER[values.dtype]
    bits = values.view(integer)
    rank_of_cut = torch.full((), k, dtype=torch.int64, device=values.device)
    key, is_there = _kth_largest_key(bits, bits > 0, rank_of_cut, n_bits=n_bits, ranks=ranks)
    return torch.where(is_there, key.view(values.dtype), 0)


def ties_kept(
    n_above: Tensor, n_tied: Tensor, find_tied: Callable[[], Tensor], *, budget: int, shape: tuple[int, int],
    n_features: int, ranks: Ranks,
) -> Tensor:  # fmt: skip
    """Return the number of this rank's entries at the cut that are kept, its first in flat order; it may be too large.

    Args:
        n_above: this rank's entries above the cut, a scalar.
        n_tied: this rank's entries that equal it, a scalar.
        find_tied: returns their flat indices here, the first `budget` at least; negative in slots without one.
        budget: entries that all ranks keep together.
        shape: tokens and features of this rank.
        n_features: features of the grid's row.
        ranks: the whole grid.
    """
    above_R, tied_R = ranks.gather(torch.stack([n_above, n_tied])).unbind(1)
    left = budget - above_R.sum()
    if ranks.features.size == 1:
        return left - tied_R[: ranks.rank].sum()
    if n_tied.device.type == "cpu" and bool(left >= tied_R.sum()):
        return n_tied
    n_tokens, width = shape
    here = find_tied()
    token = torch.div(here, max(1, width), rounding_mode="floor")
    first_token, first_feature = ranks.data.rank * n_tokens, ranks.features.slice(n_features)[0]
    index = (token + first_token) * n_features + first_feature + (here - token * width)
    n_bits = (n_tokens * ranks.data.size * n_features).bit_length()
    highest = (1 << n_bits) - 1  # the lowest index has the largest key
    key, _ = _kth_largest_key(highest - index, here >= 0, left, n_bits=n_bits, ranks=ranks)
    return ((here >= 0) & (index <= highest - key) & (left > 0)).sum()


def _kth_largest_key(key: Tensor, active: Tensor, k: Tensor, *, n_bits: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the k-th largest of all ranks' integers `key` that are `active`, and whether there are that many.

    It is the least key of `n_bits` where there are not.
    """
    found, missing = torch.zeros((), dtype=key.dtype, device=key.device), k
    is_there = torch.ones((), dtype=torch.bool, device=key.device)
    for low in reversed(range(0, n_bits, DIGIT_BITS)):
        digit = ((key >> low) & ((1 << DIGIT_BITS) - 1)).long()
        counts = digit.new_zeros(1 << DIGIT_BITS).scatter_add_(0, digit, active.long())
        from_top = ranks.sum(counts).flip(0).cumsum(0)
        is_there = is_there & (from_top[-1] >= missing)
        skipped = (from_top < missing).sum().clamp(max=(1 << DIGIT_BITS) - 1)
        before = from_top.index_select(0, (skipped - 1).clamp(min=0).view(1)).squeeze(0)  # [scalar] would read it
        missing = missing - torch.where(skipped > 0, before, 0)
        found_digit = (1 << DIGIT_BITS) - 1 - skipped
        active = active & (digit == found_digit)
        found = found | (found_digit.to(key.dtype) << low)
    return found, is_there

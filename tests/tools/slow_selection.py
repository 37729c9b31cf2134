"""Selection by dense passes of fixed shape: what the product's backends are held against.

Each selector finds per batch, row or column a cut and how many of the values that equal it are kept; one function
turns both into matches. Ties at the cut go to the lower token, then the lower feature.
"""

import torch
from torch import Tensor

from sae_train.kernels.matches import Matches, no_matches
from sae_train.kernels.owners import column_cuts, row_cuts, row_slots
from sae_train.kernels.radix import kth_largest, ties_kept
from sae_train.ranks.interface import Ranks

CHUNK_ELEMENTS = 1 << 26
"""Pre-activations that pass together where a temporary as large as they are is made."""


def select_batch(pre_NF: Tensor, *, budget: int, capacity: int, n_features: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest positive entries of the whole grid; see selection.select_batch."""
    largest = torch.cat([_largest(rows, budget) for rows in _row_chunks(pre_NF)])
    cut = kth_largest(largest, budget, ranks)
    tied_N = torch.cat([(rows == cut).sum(1) for rows in _row_chunks(pre_NF)])

    def find_tied() -> Tensor:
        token, feature = torch.nonzero_static(pre_NF == cut, size=min(budget, pre_NF.numel()), fill_value=-1).unbind(1)
        return token * pre_NF.shape[1] + feature

    left = ties_kept(
        (largest > cut).sum(),
        tied_N.sum(),
        find_tied,
        budget=budget,
        shape=(pre_NF.shape[0], pre_NF.shape[1]),
        n_features=n_features,
        ranks=ranks,
    )
    left_N = left - (tied_N.cumsum(0) - tied_N)
    return _matches(pre_NF, cut.view(1, 1), left_N.clamp(min=0).unsqueeze(1), dim=1, capacity=capacity)


def select_rows(
    pre_NF: Tensor, *, k: int, capacity: int, n_features: int, ranks: Ranks, allowed_F: Tensor | None = None
) -> Matches:
    """Keep each row's `k` largest positive entries; see selection.select_rows."""
    if allowed_F is not None:
        pre_NF = torch.where(allowed_F, pre_NF, 0)
    slots = min(row_slots(k, n_features, ranks.features), pre_NF.shape[1])
    largest_NK = torch.cat([_positive(rows).topk(slots, dim=1).values for rows in _row_chunks(pre_NF)])
    if ranks.features.size == 1:
        cut_N1 = largest_NK[:, -1:]
        left_N1 = k - (largest_NK > cut_N1).sum(1, keepdim=True)
    else:
        padding = row_slots(k, n_features, ranks.features) - slots
        sent_NK = torch.nn.functional.pad(largest_NK, (0, padding))
        cut_N1, left_N1 = (each_N.unsqueeze(1) for each_N in row_cuts(sent_NK, k=k, ranks=ranks.features))
    return _matches(pre_NF, cut_N1, left_N1, dim=1, capacity=capacity)


def select_columns(pre_NF: Tensor, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep each column's `budget_F[j]` largest positive entries of all tokens; see selection.select_columns."""
    local_F = budget_F.clamp(max=len(pre_NF))
    value_C = _column_candidates(pre_NF, local_F)
    cut_F, left_F = column_cuts(value_C, local_F=local_F, budget_F=budget_F, ranks=ranks.data)
    return _matches(pre_NF, cut_F.unsqueeze(0), left_F.unsqueeze(0), dim=0, capacity=capacity)


def _largest(pre: Tensor, n: int) -> Tensor:
    """Return the `n` largest, or all, zeros for those that are not positive."""
    return _positive(pre).reshape(-1).topk(min(n, pre.numel()), sorted=False).values


def _positive(pre: Tensor) -> Tensor:
    """Return zeros where `pre` is not positive, NaN among it: topk takes NaN for the largest."""
    return torch.fmax(pre, pre.new_zeros(()))


def _column_candidates(pre_NF: Tensor, local_F: Tensor) -> Tensor:
    """Return the local_F[j] (host integers) largest positive values of each column, 0 in want of one, by column."""
    values, columns = [pre_NF.new_zeros(0)], [torch.zeros(0, dtype=torch.int64)]
    for low, high in _octaves(int(local_F.max()) if len(local_F) > 0 else 0):
        members = ((local_F > low) & (local_F <= high)).nonzero().squeeze(1)
        if len(members) == 0:
            continue
        chosen = _positive(pre_NF.index_select(1, members.to(pre_NF.device, non_blocking=True)))
        largest = chosen.topk(min(high, len(pre_NF)), dim=0).values
        keep = torch.arange(len(largest)).unsqueeze(0) < local_F[members].unsqueeze(1)
        where = keep.reshape(-1).nonzero().squeeze(1).to(pre_NF.device, non_blocking=True)
        values.append(largest.t().reshape(-1)[where])
        columns.append(members.repeat_interleave(local_F[members]))
    order = torch.cat(columns).argsort(stable=True)
    return torch.cat(values)[order.to(pre_NF.device, non_blocking=True)]


def _octaves(largest: int) -> list[tuple[int, int]]:
    """Return (low, high] ranges of doubling size that cover 1 to `largest`."""
    ranges: list[tuple[int, int]] = []
    high = 1
    while not ranges or ranges[-1][1] < largest:
        ranges.append((high // 2, high))
        high *= 2
    return ranges


def _matches(pre_NF: Tensor, cut: Tensor, left: Tensor, *, dim: int, capacity: int) -> Matches:
    """Keep what is positive and above `cut`, and along `dim` the first `left` of what equals it."""
    across = 1 - dim
    step = max(1, CHUNK_ELEMENTS // max(1, pre_NF.shape[dim]))
    one_each = [pre_NF.shape[across] if each == across else 1 for each in (0, 1)]
    parts = (torch.split(each, step, dim=across) for each in (pre_NF, cut.expand(one_each), left.expand(one_each)))
    keep = [_keep(*part, dim=dim) for part in zip(*parts, strict=True)]
    return compact(pre_NF, torch.cat(keep, dim=across), capacity=capacity)


def _keep(pre: Tensor, cut: Tensor, left: Tensor, *, dim: int) -> Tensor:
    tied = pre == cut
    return (pre > 0) & ((pre > cut) | (tied & (tied.cumsum(dim, dtype=torch.int32) <= left)))


def compact(pre_NF: Tensor, keep_NF: Tensor, *, capacity: int) -> Matches:
    """Lay out the entries where `keep_NF` holds in `capacity` slots, without reading their number."""
    if pre_NF.numel() == 0:
        return no_matches(pre_NF, n_tokens=len(pre_NF), capacity=capacity)
    where = torch.nonzero_static(keep_NF, size=capacity, fill_value=0)
    token, feature = where.unbind(1)
    start = torch.zeros(len(pre_NF) + 1, dtype=torch.int32, device=pre_NF.device)
    torch.cumsum(keep_NF.sum(1), 0, dtype=torch.int32, out=start[1:])
    is_used = torch.arange(capacity, device=pre_NF.device) < start[-1]
    value = torch.where(is_used, pre_NF[token, feature], 0)
    return Matches(value, feature.int(), token.int(), start)


def _row_chunks(pre_NF: Tensor) -> tuple[Tensor, ...]:
    return torch.split(pre_NF, max(1, CHUNK_ELEMENTS // max(1, pre_NF.shape[1])))

"""Selection by dense passes of fixed shape: any device, no wait for it, and the twin that others are held against.

Each selector finds per batch, row or column a cut and how many of the values that equal it are kept; one function
turns both into matches. Ties at the cut go to the lower token, then the lower feature.
"""

import torch
from torch import Tensor

from sae_train.kernels.matches import Matches
from sae_train.kernels.radix import kth_largest
from sae_train.ranks import Ranks

CHUNK_ELEMENTS = 1 << 26
"""Pre-activations that pass together where a temporary as large as they are is made."""


def select_batch(pre_NF: Tensor, *, budget: int, capacity: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest positive entries of all ranks' rows; see selection.select_batch."""
    flat = pre_NF.reshape(-1)
    largest = flat.topk(min(budget, len(flat)), sorted=False).values
    cut = kth_largest(largest, budget, ranks)
    tied_N = torch.cat([(rows == cut).sum(1) for rows in _row_chunks(pre_NF)])
    here = torch.stack([(largest > cut).sum(), tied_N.sum()])
    above_R, tied_R = ranks.gather(here).unbind(1)
    left = budget - above_R.sum() - tied_R[: ranks.rank].sum()
    left_N = left - (tied_N.cumsum(0) - tied_N)
    return _matches(pre_NF, cut.view(1, 1), left_N.clamp(min=0).unsqueeze(1), dim=1, capacity=capacity)


def select_rows(pre_NF: Tensor, *, k: int, capacity: int) -> Matches:
    """Keep each row's `k` largest positive entries; see selection.select_rows."""
    largest = pre_NF.topk(min(k, pre_NF.shape[1]), dim=1).values
    cut_N1 = largest[:, -1:]
    left_N1 = k - (largest > cut_N1).sum(1, keepdim=True)
    return _matches(pre_NF, cut_N1, left_N1, dim=1, capacity=capacity)


def select_columns(pre_NF: Tensor, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep each column's `budget_F[j]` largest positive entries of all ranks' rows; see selection.select_columns."""
    local_F = budget_F.clamp(max=len(pre_NF))
    value, column = _column_candidates(pre_NF, local_F)
    cut_F, left_F = column_cuts(value, column, budget_F.to(pre_NF.device, non_blocking=True), ranks)
    return _matches(pre_NF, cut_F.unsqueeze(0), left_F.unsqueeze(0), dim=0, capacity=capacity)


def column_cuts(value_C: Tensor, column_C: Tensor, budget_F: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return each column's cut, and how many of this rank's values that equal it are kept.

    `value_C` holds at least min(budget, rows) largest values of every column of this rank, 0 where one is not
    positive, in equal number on every rank; `column_C` (ascending) names their columns and is the same everywhere.
    """
    n_features = len(budget_F)
    if len(value_C) == 0:
        return value_C.new_full((n_features,), torch.inf), torch.zeros_like(budget_F)
    value_RC = ranks.gather(value_C)
    column_RC = column_C.expand_as(value_RC)
    value, order = value_RC.reshape(-1).sort(descending=True, stable=True)
    column, by_column = column_RC.reshape(-1)[order].sort(stable=True)
    value = value[by_column]
    first_F = torch.searchsorted(column, torch.arange(n_features, device=column.device))
    at_cut = (first_F + budget_F - 1).clamp(min=0, max=len(value) - 1)
    has_cut = (budget_F > 0) & (column[at_cut] == torch.arange(n_features, device=column.device))
    cut_F = torch.where(has_cut, value[at_cut], 0)
    cut_F = torch.where(budget_F > 0, cut_F, torch.inf)
    above_F = _count(column_RC.reshape(-1), value_RC.reshape(-1) > cut_F[column_RC.reshape(-1)], n_features)
    tied_before_F = torch.zeros_like(above_F)
    for other in range(ranks.rank):
        tied_before_F += _count(column_C, value_RC[other] == cut_F[column_C], n_features)
    return cut_F, (budget_F - above_F - tied_before_F).clamp(min=0)


def _count(column: Tensor, flag: Tensor, n_features: int) -> Tensor:
    return torch.zeros(n_features, dtype=torch.int64, device=column.device).index_add_(0, column, flag.long())


def _column_candidates(pre_NF: Tensor, local_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return the local_F[j] (host integers) largest values of each column, and their columns, ascending."""
    values, columns = [], []
    for low, high in _octaves(int(local_F.max())):
        members = ((local_F > low) & (local_F <= high)).nonzero().squeeze(1)
        if len(members) == 0:
            continue
        on_device = members.to(pre_NF.device, non_blocking=True)
        largest = pre_NF.index_select(1, on_device).topk(min(high, len(pre_NF)), dim=0).values
        keep = torch.arange(len(largest)).unsqueeze(0) < local_F[members].unsqueeze(1)
        where = keep.reshape(-1).nonzero().squeeze(1).to(pre_NF.device, non_blocking=True)
        values.append(largest.t().reshape(-1)[where])
        columns.append(members.repeat_interleave(local_F[members]).to(pre_NF.device, non_blocking=True))
    if not values:
        return pre_NF.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=pre_NF.device)
    value, column = torch.cat(values), torch.cat(columns)
    column, order = column.sort(stable=True)
    return torch.where(value[order] > 0, value[order], 0), column


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
    where = torch.nonzero_static(keep_NF, size=capacity, fill_value=0)
    token, feature = where.unbind(1)
    start = torch.zeros(len(pre_NF) + 1, dtype=torch.int32, device=pre_NF.device)
    torch.cumsum(keep_NF.sum(1), 0, dtype=torch.int32, out=start[1:])
    start.clamp_(max=capacity)  # only NaN among the pre-activations can bring more
    is_used = torch.arange(capacity, device=pre_NF.device) < start[-1]
    value = torch.where(is_used, pre_NF[token, feature], 0)
    return Matches(value, feature.int(), token.int(), start)


def _row_chunks(pre_NF: Tensor) -> tuple[Tensor, ...]:
    return torch.split(pre_NF, max(1, CHUNK_ELEMENTS // max(1, pre_NF.shape[1])))

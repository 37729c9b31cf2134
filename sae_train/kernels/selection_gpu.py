"""Selection on a GPU: shapes do not depend on values, and the host waits for nothing.

The K largest entries of a row lie in the K groups of neighbours with the largest maxima, ties to the lower index. So a
row is narrowed to K groups of 64, then to K groups of 8 of those, and its cut is found among these 8 K entries. A batch
is one long row. Columns are rows of tokens. On several ranks each narrows its own entries before the exact cut. A group
with a NaN counts as empty, because a step with a NaN changes nothing.

Letters: R rows, W width, G groups, L or S neighbours of a group, E entries, K groups that are kept, M columns.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.cuts import cut_batch, cut_columns, cut_rows
from sae_train.kernels.matches import Matches, fp32, pack
from sae_train.kernels.owners import row_slots
from sae_train.ranks.interface import Ranks

SIZES = (64, 8)  # neighbours of a group, first and second
GATHERED = 1 << 24  # entries of columns that are gathered together


class _Entries(NamedTuple):
    """What may still be kept of each row, in order; 0 in places without an entry."""

    value_RGL: Tensor
    """[rows, groups, neighbours]"""
    first_RG: Tensor
    """[rows, groups] int64: index in its row of each group's first entry."""

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return value and index in the row [rows, groups * neighbours]."""
        neighbour = torch.arange(self.value_RGL.shape[2], device=self.value_RGL.device)
        return fp32(self.value_RGL).flatten(1), (self.first_RG.unsqueeze(2) + neighbour).flatten(1)


def _whole_rows(rows_RW: Tensor) -> _Entries:
    return _Entries(rows_RW.unsqueeze(1), torch.zeros(len(rows_RW), 1, dtype=torch.int64, device=rows_RW.device))


def select_batch(pre_NF: Tensor, *, budget: int, capacity: int, n_features: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest positive entries of the whole grid; see selection.select_batch."""
    shape = pre_NF.shape[0], pre_NF.shape[1]
    value, index = (each.squeeze(0) for each in _narrow(_whole_rows(pre_NF.reshape(1, -1)), budget).flat())
    keep = cut_batch(index, value, budget=budget, shape=shape, n_features=n_features, ranks=ranks)
    return pack(index, value, keep, shape=shape, capacity=capacity)


def select_rows(
    pre_NF: Tensor, *, k: int, capacity: int, n_features: int, ranks: Ranks, allowed_F: Tensor | None = None
) -> Matches:
    """Keep each row's `k` largest positive entries; see selection.select_rows."""
    if allowed_F is not None:
        pre_NF = torch.where(allowed_F, pre_NF, 0)
    shape = pre_NF.shape[0], pre_NF.shape[1]
    slots = min(row_slots(k, n_features, ranks.features), shape[1])
    value_NE, index_NE = _narrow(_whole_rows(pre_NF), slots).flat()
    index = (index_NE + torch.arange(shape[0], device=pre_NF.device).unsqueeze(1) * shape[1]).flatten()
    value, most = value_NE.flatten(), value_NE.shape[1]
    keep = cut_rows(index, value, k=k, most=most, shape=shape, n_features=n_features, ranks=ranks)
    return pack(index, value, keep, shape=shape, capacity=capacity)


def select_columns(pre_NF: Tensor, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep each column's `budget_F[j]` largest positive entries of all tokens; see selection.select_columns."""
    shape = n_tokens, n_features = pre_NF.shape[0], pre_NF.shape[1]
    maxima_GF, parts = _column_maxima(pre_NF), []
    for members, most in _columns_by_budget(budget_F.clamp(max=n_tokens), n_tokens):
        member_M1 = members.to(pre_NF.device, non_blocking=True).unsqueeze(1)
        value_ME, token_ME = _narrow_columns(pre_NF, maxima_GF, member_M1, most).flat()
        parts.append((value_ME.flatten(), (token_ME * n_features + member_M1).flatten()))
    value = torch.cat([fp32(pre_NF.new_zeros(0)), *(value for value, _ in parts)])
    index = torch.cat([torch.zeros(0, dtype=torch.int64, device=pre_NF.device), *(index for _, index in parts)])
    index, order = torch.where(value > 0, index, n_tokens * n_features).sort()
    value = value[order]
    keep = cut_columns(index, value, budget_F=budget_F, shape=shape, ranks=ranks)
    return pack(index, value, keep, shape=shape, capacity=capacity)


def _columns_by_budget(budget_F: Tensor, n_tokens: int) -> Iterator[tuple[Tensor, int]]:
    """Yield columns whose budgets differ by less than a factor of two, as many as fit into memory, and the largest."""
    high = 1
    while high < 2 * int(budget_F.max() if len(budget_F) else 0):
        members = ((budget_F > high // 2) & (budget_F <= high)).nonzero().squeeze(1)
        entries = min(n_tokens, high * SIZES[0])
        for some in members.split(max(1, GATHERED // max(1, entries))):
            if len(some):
                yield some, int(budget_F[some].max())
        high *= 2


def _column_maxima(pre_NF: Tensor) -> Tensor:
    """Return the maxima [groups, F] of groups of tokens, the last one perhaps short: the one pass over all entries."""
    whole = len(pre_NF) // SIZES[0] * SIZES[0]
    maxima_GF = pre_NF[:whole].reshape(whole // SIZES[0], SIZES[0], pre_NF.shape[1]).amax(1)
    return torch.cat([maxima_GF, pre_NF[whole:].amax(0, keepdim=True)]) if whole < len(pre_NF) else maxima_GF


def _narrow_columns(pre_NF: Tensor, maxima_GF: Tensor, member_M1: Tensor, k: int) -> _Entries:
    """Return entries of each of some columns among which are its k largest positive ones."""
    member_M, n_tokens = member_M1.squeeze(1), len(pre_NF)
    if len(maxima_GF) <= k:
        value_MN = pre_NF.index_select(1, member_M).t()
        return _narrow(_whole_rows(torch.nn.functional.pad(value_MN, (0, -n_tokens % SIZES[0]))), k)
    group_MK, is_there = _largest_groups(maxima_GF.index_select(1, member_M).t(), k)
    first_MK = group_MK * SIZES[0]
    token_MKS = first_MK.unsqueeze(2) + torch.arange(SIZES[0], device=first_MK.device)
    value_MKS = pre_NF[token_MKS.clamp(max=n_tokens - 1), member_M1.unsqueeze(2)]
    value_MKS = torch.where(is_there.unsqueeze(2) & (token_MKS < n_tokens), value_MKS, 0)
    return _narrow(_Entries(value_MKS, first_MK), k)


def _narrow(found: _Entries, k: int) -> _Entries:
    """Return entries of each row among which are its k largest positive ones."""
    for size in SIZES:
        n_groups, length = found.value_RGL.shape[1:]
        if length % size == 0 and n_groups * length // size > k > 0:
            found = _k_groups(found, size, k)
    return found


def _k_groups(found: _Entries, size: int, k: int) -> _Entries:
    """Return the k groups of `size` neighbours with the largest positive maxima of each row, in order."""
    value_RGL, first_RG = found
    n_rows, _, length = value_RGL.shape
    groups_RGS = value_RGL.reshape(n_rows, first_RG.shape[1] * length // size, size)
    start = torch.arange(0, length, size, device=first_RG.device)
    first_RG = (first_RG.unsqueeze(2) + start).flatten(1)
    group_RK, is_there = _largest_groups(groups_RGS.amax(2), k)
    value_RKS = groups_RGS.gather(1, group_RK.unsqueeze(2).expand(-1, -1, size))
    return _Entries(torch.where(is_there.unsqueeze(2), value_RKS, 0), first_RG.gather(1, group_RK))


def _largest_groups(maxima_RG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k groups of each row with the largest positive maxima [R, k], in order, and which of them exist."""
    maxima_RG = torch.where(maxima_RG > 0, maxima_RG, 0)  # nor where one is NaN
    bound_R1 = maxima_RG.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, tied = maxima_RG > bound_R1, (maxima_RG == bound_R1) & (maxima_RG > 0)
    keep = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    place = torch.where(keep, keep.cumsum(1) - 1, k)
    each = torch.arange(place.shape[1], device=place.device).expand_as(place)
    empty = torch.full((len(place), k + 1), -1, dtype=torch.int64, device=place.device)
    group_RK = empty.scatter_(1, place, each)[:, :k]
    return group_RK.clamp(min=0), group_RK >= 0

"""Selection on a device that nobody waits for: every shape is known before, and pre-activations are read once.

The K largest entries of a row, ties to the lower index, lie in the K groups of neighbours with the largest maxima, ties
likewise to the lower: before an entry elsewhere go K groups, each with an entry that goes before it. So K groups of 64
are left of a row, then K of 8 of those, and its cut is looked for among 8 K entries. A batch is one long row. Columns
are rows of tokens, of which no more than K groups of 64 are gathered. On several ranks each keeps what could be kept of
its own. A group with a NaN counts as empty: a step with one is void.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.matches import Matches, no_matches
from sae_train.kernels.owners import column_cuts, row_cuts, row_slots
from sae_train.kernels.radix import kth_largest, ties_kept
from sae_train.ranks.interface import Ranks

SIZES = (64, 8)
"""Of groups, one after the other."""
GATHERED = 1 << 24
"""Entries of columns that are gathered together."""


class _Entries(NamedTuple):
    """What may still be kept of each row, in order; 0 in places without an entry."""

    value_RGL: Tensor
    """[rows, groups, neighbours]"""
    first_RG: Tensor
    """[rows, groups] int64: index in its row of each group's first entry."""

    @classmethod
    def of(cls, rows_RW: Tensor) -> "_Entries":
        """Return all entries of rows."""
        return cls(rows_RW.unsqueeze(1), torch.zeros(len(rows_RW), 1, dtype=torch.int64, device=rows_RW.device))

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return value and index in the row [rows, groups * neighbours]."""
        neighbour = torch.arange(self.value_RGL.shape[2], device=self.value_RGL.device)
        return self.value_RGL.flatten(1), (self.first_RG.unsqueeze(2) + neighbour).flatten(1)


def select_batch(pre_NF: Tensor, *, budget: int, capacity: int, n_features: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest positive entries of the whole grid; see selection.select_batch."""
    shape = pre_NF.shape[0], pre_NF.shape[1]
    value, index = (each.squeeze(0) for each in _narrowed(_Entries.of(pre_NF.reshape(1, -1)), budget).flat())
    cut = kth_largest(value, budget, ranks)
    above, tied = value > cut, (value == cut) & (value > 0)
    left = ties_kept(
        above.sum(),
        tied.sum(),
        lambda: torch.where(tied, index, -1),
        budget=budget,
        shape=shape,
        n_features=n_features,
        ranks=ranks,
    )
    return _packed(value, index, above | (tied & (tied.cumsum(0) <= left)), shape=shape, capacity=capacity)


def select_rows(
    pre_NF: Tensor, *, k: int, capacity: int, n_features: int, ranks: Ranks, allowed_F: Tensor | None = None
) -> Matches:
    """Keep each row's `k` largest positive entries; see selection.select_rows."""
    if allowed_F is not None:
        pre_NF = torch.where(allowed_F, pre_NF, 0)
    n_tokens, width = pre_NF.shape
    most = row_slots(k, n_features, ranks.features)
    slots = min(most, width)
    value_NE, index_NE = _narrowed(_Entries.of(pre_NF), slots).flat()
    largest_NK = torch.fmax(value_NE, value_NE.new_zeros(())).topk(slots, dim=1).values
    if ranks.features.size == 1:
        cut_N1 = largest_NK[:, -1:]
        left_N1 = k - (largest_NK > cut_N1).sum(1, keepdim=True)
    else:
        sent_NK = torch.nn.functional.pad(largest_NK, (0, most - slots))
        cut_N1, left_N1 = (each_N.unsqueeze(1) for each_N in row_cuts(sent_NK, k=k, ranks=ranks.features))
    keep = _up_to(value_NE, cut_N1, left_N1)
    row_N1 = torch.arange(n_tokens, device=pre_NF.device).unsqueeze(1)
    parts = (each.flatten() for each in (value_NE, row_N1 * width + index_NE, keep))
    return _packed(*parts, shape=(n_tokens, width), capacity=capacity)


def select_columns(pre_NF: Tensor, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep each column's `budget_F[j]` largest positive entries of all tokens; see selection.select_columns."""
    n_tokens, n_features = pre_NF.shape
    local_F = budget_F.clamp(max=n_tokens)
    maxima_GF = _column_maxima(pre_NF)
    parts = [_Columns.found(pre_NF, maxima_GF, *part) for part in _alike(local_F, n_tokens)]
    cuts = [part.cuts() for part in parts]
    if ranks.data.size > 1:
        order = _order_by_column(parts, local_F).to(pre_NF.device, non_blocking=True)
        by_column = torch.cat([pre_NF.new_zeros(0), *(part.largest() for part in parts)])[order]
        cut_F, left_F = column_cuts(by_column, local_F=local_F, budget_F=budget_F, ranks=ranks.data)
        cuts = [(cut_F[part.member_M1], left_F[part.member_M1]) for part in parts]
    if not parts:
        return no_matches(pre_NF, n_tokens=n_tokens, capacity=capacity)
    value = torch.cat([part.value_ME.flatten() for part in parts])
    index = torch.cat([(part.token_ME * n_features + part.member_M1).flatten() for part in parts])
    keep = torch.cat([_up_to(part.value_ME, *cut).flatten() for part, cut in zip(parts, cuts, strict=True)])
    where = torch.nonzero_static(keep, size=capacity, fill_value=-1).squeeze(1)
    last = n_tokens * n_features
    index, order = torch.where(where >= 0, index[where.clamp(min=0)], last).sort()  # the kept ones alone
    value = value[where.clamp(min=0)][order]
    return _packed(value, index, index < last, shape=(n_tokens, n_features), capacity=capacity)


class _Columns(NamedTuple):
    """Entries of some columns among which are those that could be kept, in order of tokens."""

    members: Tensor
    """[M] int64 on the host."""
    budget_M: Tensor
    """[M] int64 on the host."""
    member_M1: Tensor
    """`members` on the device."""
    value_ME: Tensor
    token_ME: Tensor
    largest_MK: Tensor
    """As many as the largest budget, descending."""

    @classmethod
    def found(cls, pre_NF: Tensor, maxima_GF: Tensor, members: Tensor, budget_M: Tensor) -> "_Columns":
        most = int(budget_M.max())
        member_M1 = members.to(pre_NF.device, non_blocking=True).unsqueeze(1)
        value_ME, token_ME = _narrowed_columns(pre_NF, maxima_GF, member_M1, most).flat()
        largest_MK = torch.fmax(value_ME, value_ME.new_zeros(())).topk(most, dim=1).values
        return cls(members, budget_M, member_M1, value_ME, token_ME, largest_MK)

    def cuts(self) -> tuple[Tensor, Tensor]:
        """Return each column's cut [M, 1], and how many of the entries that equal it are kept [M, 1]."""
        budget_M1 = self.budget_M.to(self.value_ME.device, non_blocking=True).unsqueeze(1)
        cut_M1 = self.largest_MK.gather(1, budget_M1 - 1)
        return cut_M1, budget_M1 - (self.largest_MK > cut_M1).sum(1, keepdim=True)

    def largest(self) -> Tensor:
        """Return the columns' largest values, of each as many as its budget, column by column."""
        is_within = torch.arange(self.largest_MK.shape[1]) < self.budget_M.unsqueeze(1)
        where = is_within.flatten().nonzero().squeeze(1)
        return self.largest_MK.flatten()[where.to(self.value_ME.device, non_blocking=True)]


def _alike(budget_F: Tensor, n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield columns whose budgets are alike within a factor of two, and those budgets; as many as fit into memory."""
    high = 1
    while high < 2 * int(budget_F.max() if len(budget_F) else 0):
        members = ((budget_F > high // 2) & (budget_F <= high)).nonzero().squeeze(1)
        entries = min(n_tokens, high * SIZES[0])
        for some in members.split(max(1, GATHERED // max(1, entries))):
            if len(some):
                yield some, budget_F[some]
        high *= 2


def _order_by_column(parts: list[_Columns], local_F: Tensor) -> Tensor:
    """Return where in the parts' largest values, one after another, each column's stand, column by column."""
    columns = [part.members.repeat_interleave(local_F[part.members]) for part in parts]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *columns]).argsort(stable=True)


def _column_maxima(pre_NF: Tensor) -> Tensor:
    """Return the maxima [groups, F] of groups of tokens, the last one perhaps short: the one pass over all entries."""
    whole = len(pre_NF) // SIZES[0] * SIZES[0]
    maxima_GF = pre_NF[:whole].reshape(whole // SIZES[0], SIZES[0], pre_NF.shape[1]).amax(1)
    return torch.cat([maxima_GF, pre_NF[whole:].amax(0, keepdim=True)]) if whole < len(pre_NF) else maxima_GF


def _narrowed_columns(pre_NF: Tensor, maxima_GF: Tensor, member_M1: Tensor, k: int) -> _Entries:
    """Return entries of each of some columns among which are its k largest positive ones."""
    member_M, n_tokens = member_M1.squeeze(1), len(pre_NF)
    if len(maxima_GF) <= k:
        value_MN = pre_NF.index_select(1, member_M).t()
        return _narrowed(_Entries.of(torch.nn.functional.pad(value_MN, (0, -n_tokens % SIZES[0]))), k)
    group_MK, is_there = _largest_groups(maxima_GF.index_select(1, member_M).t(), k)
    first_MK = group_MK * SIZES[0]
    token_MKS = first_MK.unsqueeze(2) + torch.arange(SIZES[0], device=first_MK.device)
    value_MKS = pre_NF[token_MKS.clamp(max=n_tokens - 1), member_M1.unsqueeze(2)]
    value_MKS = torch.where(is_there.unsqueeze(2) & (token_MKS < n_tokens), value_MKS, 0)
    return _narrowed(_Entries(value_MKS, first_MK), k)


def _up_to(value: Tensor, cut: Tensor, left: Tensor) -> Tensor:
    """Return which entries of a row are above its cut, or among the first `left` of those that equal it."""
    tied = (value == cut) & (value > 0)
    return ((value > cut) & (value > 0)) | (tied & (tied.cumsum(1) <= left))


def _narrowed(found: _Entries, k: int) -> _Entries:
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


def _packed(value_C: Tensor, index_C: Tensor, keep_C: Tensor, *, shape: tuple[int, int], capacity: int) -> Matches:
    """Lay out the entries where `keep_C` holds, given by ascending flat index, without reading their number."""
    n_tokens, width = shape
    if len(keep_C) == 0:
        return no_matches(value_C, n_tokens=n_tokens, capacity=capacity)
    where = torch.nonzero_static(keep_C, size=capacity, fill_value=0).squeeze(1)
    is_used = torch.arange(capacity, device=where.device) < keep_C.sum()
    index = index_C[where]
    token = torch.div(index, max(1, width), rounding_mode="floor")
    bounds = torch.arange(n_tokens + 1, device=where.device)
    start = torch.searchsorted(torch.where(is_used, token, n_tokens), bounds, out_int32=True)
    parts = (value_C[where], (index - token * width).int(), token.int())
    value, feature, token = (torch.where(is_used, part, 0) for part in parts)
    return Matches(value, feature, token, start)

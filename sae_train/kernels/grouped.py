"""Selection on a device that nobody waits for: every shape is known before, and pre-activations are read once.

The K largest entries of a row, ties to the lower index, lie in the K groups of neighbours with the largest maxima, ties
likewise to the lower: before an entry elsewhere go K groups, each with an entry that goes before it. So K groups of 64
are left of a row, then K of 8 of those, and its cut is looked for among 8 K entries. A batch is one long row. On
several ranks each keeps what could be kept of its own. A group with a NaN counts as empty: a step with one is void.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels import reference
from sae_train.kernels.matches import Matches, no_matches
from sae_train.kernels.owners import row_cuts, row_slots
from sae_train.kernels.radix import kth_largest, ties_kept
from sae_train.ranks import Ranks

SIZES = (64, 8)
"""Of groups, one after the other."""

select_columns = reference.select_columns


class _Entries(NamedTuple):
    """What may still be kept of each row, in order; 0 in places without an entry."""

    value_RGL: Tensor
    """[rows, groups, neighbours]"""
    first_RG: Tensor
    """[rows, groups] int64: index in its row of each group's first entry."""

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return value and index in the row [rows, groups * neighbours]."""
        neighbour = torch.arange(self.value_RGL.shape[2], device=self.value_RGL.device)
        return self.value_RGL.flatten(1), (self.first_RG.unsqueeze(2) + neighbour).flatten(1)


def select_batch(pre_NF: Tensor, *, budget: int, capacity: int, n_features: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest positive entries of the whole grid; see selection.select_batch."""
    shape = pre_NF.shape[0], pre_NF.shape[1]
    value, index = (each.squeeze(0) for each in _narrowed(pre_NF.reshape(1, -1), budget).flat())
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
    value_NE, index_NE = _narrowed(pre_NF, slots).flat()
    largest_NK = torch.fmax(value_NE, value_NE.new_zeros(())).topk(slots, dim=1).values
    if ranks.features.size == 1:
        cut_N1 = largest_NK[:, -1:]
        left_N1 = k - (largest_NK > cut_N1).sum(1, keepdim=True)
    else:
        sent_NK = torch.nn.functional.pad(largest_NK, (0, most - slots))
        cut_N1, left_N1 = (each_N.unsqueeze(1) for each_N in row_cuts(sent_NK, k=k, ranks=ranks.features))
    tied = (value_NE == cut_N1) & (value_NE > 0)
    keep = ((value_NE > cut_N1) & (value_NE > 0)) | (tied & (tied.cumsum(1) <= left_N1))
    row_N1 = torch.arange(n_tokens, device=pre_NF.device).unsqueeze(1)
    parts = (each.flatten() for each in (value_NE, row_N1 * width + index_NE, keep))
    return _packed(*parts, shape=(n_tokens, width), capacity=capacity)


def _narrowed(rows_RW: Tensor, k: int) -> _Entries:
    """Return entries of each row among which are its k largest positive ones."""
    first_R1 = torch.zeros(len(rows_RW), 1, dtype=torch.int64, device=rows_RW.device)
    found = _Entries(rows_RW.unsqueeze(1), first_R1)
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
    maxima_RG = groups_RGS.amax(2)
    maxima_RG = torch.where(maxima_RG > 0, maxima_RG, 0)  # nor where one is NaN
    bound_R1 = maxima_RG.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, tied = maxima_RG > bound_R1, (maxima_RG == bound_R1) & (maxima_RG > 0)
    keep = above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))
    place = torch.where(keep, keep.cumsum(1) - 1, k)
    each = torch.arange(groups_RGS.shape[1], device=place.device).expand_as(place)
    empty = torch.full((n_rows, k + 1), -1, dtype=torch.int64, device=place.device)
    group_RK = empty.scatter_(1, place, each)[:, :k]
    is_there, group_RK = group_RK >= 0, group_RK.clamp(min=0)
    value_RKS = groups_RGS.gather(1, group_RK.unsqueeze(2).expand(-1, -1, size))
    return _Entries(torch.where(is_there.unsqueeze(2), value_RKS, 0), first_RG.gather(1, group_RK))


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

"""Selection on a CPU: pre-activations are read once, and the host reads how many of them matter.

Maxima over groups of 8 entries bound a cut from below: at least k entries reach the k-th largest of any maxima. The
groups that reach the bound are gathered, and of their entries those that reach it are the candidates of an exact cut.
Results never depend on the grouping. It also selects among approximate pre-activations in bf16.

Letters: G groups of a row.
"""

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from sae_train.kernels.cuts import cut_batch, cut_columns, cut_rows
from sae_train.kernels.matches import Matches, fp32, pack
from sae_train.kernels.owners import row_slots
from sae_train.kernels.radix import kth_largest, positive
from sae_train.ranks.interface import Ranks

GROUP = 8
"""Neighbouring entries of which only the maximum is read at first."""
LARGEST_GROUP = 256
"""Entries whose maximum serves for a bound."""
ROWS_TOGETHER = 128
"""Rows that are converted or compared at once, so that the results stay in the cache and cause no page faults."""


def select_batch(pre_NF: Tensor, *, budget: int, capacity: int, n_features: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest positive entries of the whole grid; see selection.select_batch."""
    shape = n_tokens, width = pre_NF.shape[0], pre_NF.shape[1]
    maxima_NG = _maxima(pre_NF)
    coarse_NG = _coarser(maxima_NG, budget / max(1, n_tokens * width * ranks.size))
    index, value = _reaching(pre_NF, maxima_NG, kth_largest(coarse_NG, budget, ranks))
    keep = cut_batch(index, value, budget=budget, shape=shape, n_features=n_features, ranks=ranks)
    return pack(index, value, keep, shape=shape, capacity=capacity)


def select_rows(
    pre_NF: Tensor, *, k: int, capacity: int, n_features: int, ranks: Ranks, allowed_F: Tensor | None = None
) -> Matches:
    """Keep each row's `k` largest positive entries; see selection.select_rows."""
    if allowed_F is not None:
        members = allowed_F.nonzero().squeeze(1)
        few_NF = pre_NF.index_select(1, members)
        few = select_rows(few_NF, k=k, capacity=capacity, n_features=n_features, ranks=ranks)
        used = int(few.start[-1])
        feature = torch.zeros_like(few.feature)
        feature[:used] = members.index_select(0, few.feature[:used]).int()
        return few._replace(feature=feature)
    shape = _, width = pre_NF.shape[0], pre_NF.shape[1]
    slots = row_slots(k, n_features, ranks.features)
    maxima_NG = _maxima(pre_NF)
    index, value = _reaching(pre_NF, maxima_NG, _kth_of_rows(_coarser(maxima_NG, slots / max(1, width)), slots))
    most = int(torch.div(index, max(1, width), rounding_mode="floor").bincount(minlength=1).max())
    keep = cut_rows(index, value, k=k, most=most, shape=shape, n_features=n_features, ranks=ranks)
    return pack(index, value, keep, shape=shape, capacity=capacity)


def select_columns(pre_NF: Tensor, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep each column's `budget_F[j]` largest positive entries of all tokens; see selection.select_columns."""
    shape = n_tokens, width = pre_NF.shape[0], pre_NF.shape[1]
    bound_1F = _column_bounds(_column_maxima(pre_NF), budget_F.clamp(max=n_tokens))
    bound_1F, parts = positive(bound_1F), pre_NF.split(ROWS_TOGETHER)
    index = torch.cat([flat_nonzero(part >= bound_1F) + i * ROWS_TOGETHER * width for i, part in enumerate(parts)])
    value = fp32(pre_NF.reshape(-1).index_select(0, index))
    keep = cut_columns(index, value, budget_F=budget_F, shape=shape, ranks=ranks)
    return pack(index, value, keep, shape=shape, capacity=capacity)


def _maxima(pre_NF: Tensor) -> Tensor:
    """Return the maxima [N, G] of groups of 8 neighbours of each row, the last one perhaps short; fp32 of bf16 ones."""
    if pre_NF.numel() == 0:
        return fp32(pre_NF.new_zeros(len(pre_NF), 0))
    if pre_NF.dtype == torch.bfloat16:
        return torch.cat([_maxima(rows.float()) for rows in pre_NF.split(ROWS_TOGETHER)])
    whole = pre_NF.shape[1] // GROUP * GROUP
    maxima = [max_pool1d(pre_NF[:, :whole], GROUP)] if whole else []
    if whole < pre_NF.shape[1]:
        maxima.append(pre_NF[:, whole:].amax(1, keepdim=True))
    return torch.cat(maxima, dim=1) if len(maxima) > 1 else maxima[0]


def _coarser(maxima_NG: Tensor, density: float) -> Tensor:
    """Return maxima over larger groups, such that about a third of them reach the cut; none where too many would.

    Args:
        density: share of the entries that are kept.
    """
    size, length = GROUP, GROUP * maxima_NG.shape[1]
    if size * density > 1 or length == 0:
        return maxima_NG[:, :0]
    while size < LARGEST_GROUP and size * 2 * 3 * density <= 1 and size * 2 <= length:
        size *= 2
    return max_pool1d(maxima_NG, size // GROUP) if size > GROUP else maxima_NG


def _reaching(pre_NF: Tensor, maxima_NG: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return flat index (ascending) and value of the positive entries that reach `bound`, a scalar or [N, 1].

    Groups whose maximum is NaN are gathered, too.
    """
    padding = -pre_NF.shape[1] % GROUP
    if padding:
        pre_NF = pad(pre_NF, (0, padding))  # with zeros, which are never kept
    width, bound = pre_NF.shape[1], positive(bound)
    group = torch.lt(maxima_NG, bound).logical_not_().view(-1).nonzero().squeeze(1)
    if bound.dim() > 0:
        bound = bound.index_select(0, torch.div(group, max(1, width // GROUP), rounding_mode="floor"))
    member_CG = fp32(pre_NF.reshape(-1, GROUP).index_select(0, group))
    inside = (member_CG >= bound).view(-1).nonzero().squeeze(1)
    index = group.index_select(0, inside >> 3) * GROUP + (inside & (GROUP - 1))
    if padding:
        index -= torch.div(index, width, rounding_mode="floor") * padding
    return index, member_CG.view(-1).index_select(0, inside)


def _kth_of_rows(rows_NL: Tensor, k: int) -> Tensor:
    """Return the k-th largest of each row [N, 1], 0 where it is not positive or there are fewer."""
    if k > rows_NL.shape[1]:
        return rows_NL.new_zeros(len(rows_NL), 1)
    known_NL = torch.where(rows_NL > 0, rows_NL, 0)  # topk takes NaN for the largest
    return known_NL.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def _column_bounds(by_eight: Tensor, local_F: Tensor) -> Tensor:
    """Return for each column a bound [1, F] that at least local_F[j] of its entries reach, or 0.

    Groups are of 64 tokens where half as many groups as that have room for the budget, else of 8.

    Args:
        by_eight: the largest entry of each column's groups of 8 [groups, F].
    """
    bound_F = torch.where(local_F == 0, torch.inf, by_eight.new_zeros(by_eight.shape[1])).to(by_eight.dtype)
    by_sixty_four = _column_maxima(by_eight)
    is_small_F = local_F * 2 <= len(by_sixty_four)
    is_medium_F = ~is_small_F & (local_F * 6 <= len(by_eight) * 5)
    for maxima, is_member_F in ((by_sixty_four, is_small_F), (by_eight, is_medium_F)):
        members = (is_member_F & (local_F > 0)).nonzero().squeeze(1)
        if len(members) > 0:
            place = local_F.index_select(0, members) - 1
            known = maxima.index_select(1, members).t().contiguous()
            largest = torch.where(known > 0, known, 0).topk(int(place.max()) + 1, dim=1).values  # NaN is not positive
            bound_F[members] = largest.gather(1, place.unsqueeze(1)).squeeze(1)
    return bound_F.unsqueeze(0)


def _column_maxima(rows_NF: Tensor) -> Tensor:
    """Return the maxima of groups of 8 rows [N // 8 + rest, F]; the rest stay single."""
    n_groups, n_features = len(rows_NF) // GROUP, rows_NF.shape[1]
    grouped = rows_NF[: n_groups * GROUP].reshape(n_groups, GROUP, n_features).amax(1)
    return grouped if n_groups * GROUP == len(rows_NF) else torch.cat([grouped, rows_NF[n_groups * GROUP :]])


def flat_nonzero(flag: Tensor) -> Tensor:
    """Return the ascending flat indices where `flag` holds, eight flags at a time, as few of them hold."""
    flat = (flag.clone() if flag.storage_offset() % 8 else flag).reshape(-1)  # words must be aligned in memory
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64).nonzero().squeeze(1)
    inside = flat[:whole].view(-1, 8).index_select(0, words).view(-1).nonzero().squeeze(1)
    index = words.index_select(0, inside >> 3) * 8 + (inside & 7)
    if whole == len(flat):
        return index
    return torch.cat([index, flat[whole:].nonzero().squeeze(1) + whole])

"""Selection on a CPU: a bound that is surely low enough, a short list of what reaches it, and an exact cut.

Maxima over groups of entries bound a cut from below: at least k entries reach the k-th largest of the maxima. All
entries are held against it once. That leaves a list little longer than the budget, in order of token, then feature, in
which the cut is looked for.
Nothing here is an estimate, so results never depend on the grouping. Of screened pre-activations (screened.py) a
group's maximum says what an exact one reaches at least, and the list has exact ones.
"""

import torch
from torch import Tensor

from sae_train.kernels.backend import has_numba, uses_numba
from sae_train.kernels.hint import Hint
from sae_train.kernels.matches import Matches, flat_reaching, kept, pack
from sae_train.kernels.owners import column_cuts, row_cuts, row_slots
from sae_train.kernels.radix import INTEGER, kth_largest, positive, ties_kept
from sae_train.kernels.screened import PreActivations, Screened
from sae_train.ranks.interface import Ranks

_INFINITE_BITS = int(torch.tensor(torch.inf, dtype=torch.bfloat16).view(torch.int16))
_NONE = -(1 << 48)
"""What a rank counts that has found nothing: all ranks' then count as too few."""


def select_batch(
    pre_NF: PreActivations, *, budget: int, capacity: int, n_features: int, ranks: Ranks, hint: Hint | None = None
) -> Matches:
    """Keep the `budget` largest positive entries of the whole grid; see selection.select_batch."""
    hint, (n_tokens, width) = hint or Hint(), pre_NF.shape
    guess = hint.guess(torch.float32 if isinstance(pre_NF, Screened) else pre_NF.dtype)
    found = None if guess is None else _few_reaching(pre_NF, guess)
    if _of_all(_NONE if found is None else len(found[0]), ranks) < budget or found is None:
        low = _low(pre_NF, budget / max(1, n_tokens * width * ranks.size))
        found = _largest(pre_NF, budget, kth_largest(low, budget, ranks))
    index, value = found
    cut = kth_largest(value, budget, ranks)
    hint.learn(cut)
    keep = value >= cut
    if _of_all(int(keep.count_nonzero()), ranks) > budget:
        above, tied = value > cut, value == cut
        left = ties_kept(
            above.count_nonzero(),
            tied.count_nonzero(),
            lambda: index[tied],
            budget=budget,
            shape=(n_tokens, width),
            n_features=n_features,
            ranks=ranks,
        )
        keep = above | (tied & (tied.cumsum(0) <= left))
    return pack(index, value, keep, shape=(n_tokens, width), capacity=capacity)


def _of_all(count: int, ranks: Ranks) -> int:
    """Return the sum of all ranks' counts."""
    return count if ranks.size == 1 else int(ranks.sum(torch.tensor(count)))


def select_rows(
    pre_NF: PreActivations, *, k: int, capacity: int, n_features: int, ranks: Ranks, allowed_F: Tensor | None = None
) -> Matches:
    """Keep each row's `k` largest positive entries; see selection.select_rows."""
    if allowed_F is not None:
        members = allowed_F.nonzero().squeeze(1)
        few_NF = pre_NF.columns(members) if isinstance(pre_NF, Screened) else pre_NF.index_select(1, members)
        few = select_rows(few_NF, k=k, capacity=capacity, n_features=n_features, ranks=ranks)
        used = int(few.start[-1])
        feature = torch.zeros_like(few.feature)
        feature[:used] = members[few.feature[:used].long()].int()
        return few._replace(feature=feature)
    slots = row_slots(k, n_features, ranks.features)
    n_tokens, width = pre_NF.shape
    if isinstance(pre_NF, Screened) and uses_numba(pre_NF.b_F):
        index, value = pre_NF.leading(slots, size=_group_size_screened(slots / max(1, width), width))
    else:
        index, value = _reaching(pre_NF, _kth_of_rows(_low(pre_NF, slots / max(1, width)), slots))
    token = torch.div(index, max(1, width), rounding_mode="floor")
    keep = _leading(value, token, torch.full((n_tokens,), slots))
    if ranks.features.size > 1:
        token = token[keep]
        index, value = kept(index, value, keep)
        sent_NK = value.new_zeros(n_tokens, slots)
        sent_NK[token, _place_in_group(token, n_tokens)] = value
        keep = _at_least(value, token, *row_cuts(sent_NK, k=k, ranks=ranks.features))
    return pack(index, value, keep, shape=(n_tokens, width), capacity=capacity)


def select_columns(pre_NF: PreActivations, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep each column's `budget_F[j]` largest positive entries of all tokens; see selection.select_columns."""
    n_tokens, n_features = pre_NF.shape
    local_F = budget_F.clamp(max=n_tokens)
    if isinstance(pre_NF, Screened):
        by_eight = _column_maxima(pre_NF.bits_NF)
        low_1F = pre_NF.lows(_column_bounds_of_bits(by_eight, local_F), pre_NF.error_1F)
        bound_1F = torch.fmax(low_1F, low_1F.new_zeros(()))
        index, value = pre_NF.reaching(bound_1F, pre_NF.error_1F)
    else:
        index, value = _reaching(pre_NF, _column_bounds(_column_maxima(pre_NF), local_F))
    column = index.remainder(max(1, n_features))
    keep = _leading(value, column, local_F)
    if ranks.data.size > 1:
        column = column[keep]
        index, value = kept(index, value, keep)
        slot_F = local_F.cumsum(0) - local_F
        sent_C = value.new_zeros(int(local_F.sum()))
        sent_C[slot_F[column] + _place_in_group(column, n_features)] = value
        cuts = column_cuts(sent_C, local_F=local_F, budget_F=budget_F, ranks=ranks.data)
        keep = _at_least(value, column, *cuts)
    return pack(index, value, keep, shape=(n_tokens, n_features), capacity=capacity)


def _at_least(value: Tensor, group: Tensor, cut_G: Tensor, left_G: Tensor) -> Tensor:
    """Return which entries are above their group's cut, or among the first left_G[g] of those that equal it."""
    keep = value > cut_G[group]
    ties = (value == cut_G[group]).nonzero().squeeze(1)
    keep[ties] = _place_in_group(group[ties], len(cut_G)) < left_G[group[ties]]
    return keep


def _low(pre_NF: PreActivations, density: float) -> Tensor:
    """Return a number that the largest entry of each group of a row reaches [N, groups]."""
    if isinstance(pre_NF, Screened):
        size = _group_size_screened(density, pre_NF.shape[1])
        return pre_NF.lows(_group_maxima(pre_NF.bits_NF, size), pre_NF.error_N1)
    return _group_maxima(pre_NF, _group_size(density, pre_NF.shape[1]))


def _reaching(pre_NF: PreActivations, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return flat index (ascending) and value of the positive entries that reach `bound`.

    Args:
        bound: scalar or [N, 1]; for entries that are not screened also [1, F].
    """
    if isinstance(pre_NF, Screened):
        return pre_NF.reaching(bound, pre_NF.error_N1)
    index = flat_reaching(pre_NF, positive(bound))
    return index, pre_NF.reshape(-1)[index]


def _few_reaching(pre_NF: PreActivations, guess: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what `_reaching` does for a scalar; None where that is more work than finding a better one."""
    return pre_NF.few_reaching(guess) if isinstance(pre_NF, Screened) else _reaching(pre_NF, guess)


def _largest(pre_NF: PreActivations, k: int, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_reaching` does for a scalar that k entries reach, the k largest among it."""
    return pre_NF.largest(k, bound) if isinstance(pre_NF, Screened) else _reaching(pre_NF, bound)


def _leading(value: Tensor, group: Tensor, budget_G: Tensor) -> Tensor:
    """Return which of the positive entries are among their group's budget_G[g] largest; ties to the earlier entry."""
    if uses_numba(value):
        from sae_train.kernels import numba_groups

        return numba_groups.leading(value, group, budget_G)
    integer, n_bits = INTEGER[value.dtype]
    descending = (1 << n_bits) - 1 - value.view(integer)  # ordered like the values; torch sorts integers by radix
    order = descending.sort(stable=True).indices
    by_group = group[order].sort(stable=True)
    start_G = torch.searchsorted(by_group.values, torch.arange(len(budget_G)))
    place = torch.arange(len(value)) - start_G[by_group.values]
    keep = torch.zeros(len(value), dtype=torch.bool)
    keep[order[by_group.indices]] = place < budget_G[by_group.values]
    return keep


def _place_in_group(group: Tensor, n_groups: int) -> Tensor:
    """Return for each entry how many earlier entries are of its group."""
    by_group = group.sort(stable=True)
    start_G = torch.searchsorted(by_group.values, torch.arange(n_groups))
    place = torch.empty_like(group)
    place[by_group.indices] = torch.arange(len(group)) - start_G[by_group.values]
    return place


def _group_size(density: float, length: int) -> int:
    """Return how many entries a group holds: about a third of the groups then reach the cut."""
    size = 1
    while size < 256 and size * 2 * 3 * density <= 1 and size * 2 <= length:
        size *= 2
    return size


def _group_size_screened(density: float, length: int) -> int:
    """Return the same for screened ones, whose candidates cost products."""
    return _group_size(2 * density, length)


def _group_maxima(rows_NL: Tensor, size: int) -> Tensor:
    """Return the maxima [N, L // size + rest] of groups of `size` entries of each row; the rest stay single."""
    if size == 1:
        return rows_NL
    n_groups = rows_NL.shape[1] // size
    grouped = rows_NL[:, : n_groups * size].reshape(len(rows_NL), size, n_groups).amax(1)
    return torch.cat([grouped, rows_NL[:, n_groups * size :]], dim=1)


def _kth_of_rows(rows_NL: Tensor, k: int) -> Tensor:
    """Return the k-th largest of each row [N, 1], 0 where it is not positive or there are fewer."""
    if k > rows_NL.shape[1]:
        return rows_NL.new_zeros(len(rows_NL), 1)
    known_NL = torch.fmax(rows_NL, rows_NL.new_zeros(()))  # topk takes NaN for the largest
    return known_NL.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def _column_bounds_of_bits(by_eight: Tensor, local_F: Tensor) -> Tensor:
    """Return what `_column_bounds` does for the bits of bf16; where Numba compiles, from groups of 8 throughout."""
    if not has_numba(by_eight.device):
        return _column_bounds(by_eight, local_F)
    from sae_train.kernels import numba_leading

    return numba_leading.kth_of_columns(by_eight, local_F).unsqueeze(0)


def _column_bounds(by_eight: Tensor, local_F: Tensor) -> Tensor:
    """Return for each column a bound [1, F] that at least local_F[j] of its entries reach, or 0.

    Groups are of 64 tokens where half as many groups as that have room for the budget, else of 8.

    Args:
        by_eight: the largest entry of each column's groups of 8 [groups, F], of floats or of the bits of bf16.
    """
    infinity = torch.inf if by_eight.is_floating_point() else _INFINITE_BITS
    bound_F = torch.where(local_F == 0, infinity, by_eight.new_zeros(by_eight.shape[1])).to(by_eight.dtype)
    by_sixty_four = _column_maxima(by_eight)
    is_small_F = local_F * 2 <= len(by_sixty_four)
    is_medium_F = ~is_small_F & (local_F * 6 <= len(by_eight) * 5)
    for maxima, is_member_F in ((by_sixty_four, is_small_F), (by_eight, is_medium_F)):
        members = (is_member_F & (local_F > 0)).nonzero().squeeze(1)
        if len(members) > 0:
            place = local_F[members] - 1
            known = maxima[:, members]
            known = torch.where((known > 0) & (known <= infinity), known, 0)  # topk takes NaN for the largest
            largest = known.topk(int(place.max()) + 1, dim=0).values
            bound_F[members] = largest.gather(0, place.unsqueeze(0)).squeeze(0)
    return bound_F.unsqueeze(0)


def _column_maxima(rows_NF: Tensor) -> Tensor:
    """Return the maxima of groups of 8 rows [N // 8 + rest, F]; the rest stay single."""
    n_groups, n_features = len(rows_NF) // 8, rows_NF.shape[1]
    grouped = rows_NF[: n_groups * 8].reshape(n_groups, 8, n_features).amax(1)
    return grouped if n_groups * 8 == len(rows_NF) else torch.cat([grouped, rows_NF[n_groups * 8 :]])

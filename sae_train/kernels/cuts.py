"""Exact cuts over a list of candidates: the entries of a batch among which are all that could be kept.

Each function returns a mask of the candidates that are kept, of the whole grid of ranks exactly as many as the budget
where enough are positive. Ties go to the lower token, then the lower feature. Shapes do not depend on values, so on a
GPU nothing waits. Candidates come in ascending flat index; a candidate that is not positive is never kept, and those
of index N*F or more stand for none.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sae_train.kernels.owners import column_cuts, row_cuts, row_slots
from sae_train.kernels.radix import INTEGER, kth_largest, ties_kept
from sae_train.ranks.interface import Ranks


def cut_batch(
    index_C: Tensor, value_C: Tensor, *, budget: int, shape: tuple[int, int], n_features: int, ranks: Ranks
) -> Tensor:
    """Return the mask [C] of the candidates that are among the `budget` largest of the grid.

    >>> from sae_train.ranks.interface import Solo
    >>> index, value = torch.tensor([0, 3, 4]), torch.tensor([5.0, 7.0, 5.0])
    >>> cut_batch(index, value, budget=2, shape=(2, 3), n_features=3, ranks=Solo())
    tensor([ True,  True, False])

    Args:
        index_C: flat index token * F + feature.
        value_C: of each, fp32 or float64.
        budget: matches of the batch over all ranks.
        shape: N, F of this rank.
        n_features: features of the whole dictionary.
        ranks: the whole grid.
    """
    cut = kth_largest(value_C, budget, ranks)
    above, tied = value_C > cut, (value_C == cut) & (value_C > 0)
    left = ties_kept(
        above.sum(), tied.sum(), lambda: torch.where(tied, index_C, -1),
        budget=budget, shape=shape, n_features=n_features, ranks=ranks,
    )  # fmt: skip
    return above | (tied & (tied.cumsum(0) <= left))


def cut_rows(
    index_C: Tensor, value_C: Tensor, *, k: int, most: int, shape: tuple[int, int], n_features: int, ranks: Ranks
) -> Tensor:
    """Return the mask [C] of the candidates that are among the `k` largest of their token.

    >>> from sae_train.ranks.interface import Solo
    >>> index, value = torch.tensor([0, 2, 3, 5]), torch.tensor([1.0, 2.0, 4.0, 4.0])
    >>> cut_rows(index, value, k=1, most=2, shape=(2, 3), n_features=3, ranks=Solo())
    tensor([False,  True,  True, False])

    Args:
        k: matches of a token over all ranks; other arguments as in `cut_batch`.
        most: candidates of a token on this rank at most.
    """
    n_tokens, width = shape
    token_C = torch.div(index_C, max(1, width), rounding_mode="floor").clamp(max=n_tokens)
    start_N = torch.searchsorted(token_C, torch.arange(n_tokens + 1, device=index_C.device))
    place_C = torch.arange(len(index_C), device=index_C.device) - start_N.index_select(0, token_C)
    rows_NK = value_C.new_zeros(n_tokens + 1, max(1, most))
    known_C = torch.where(value_C > 0, value_C, 0)
    rows_NK.view(-1).index_copy_(0, token_C * rows_NK.shape[1] + place_C.clamp(max=rows_NK.shape[1] - 1), known_C)
    slots = row_slots(k, n_features, ranks.features)
    largest_NK = rows_NK[:-1].topk(min(slots, rows_NK.shape[1]), dim=1).values
    largest_NK = pad(largest_NK, (0, slots - largest_NK.shape[1]))
    if ranks.features.size == 1:
        cut_N = largest_NK[:, -1]
        left_N = slots - (largest_NK > cut_N.unsqueeze(1)).sum(1)
    else:
        cut_N, left_N = row_cuts(largest_NK, k=k, ranks=ranks.features)
    return _mask_to_cut(value_C, token_C, start_N, cut_N, left_N)


def cut_columns(index_C: Tensor, value_C: Tensor, *, budget_F: Tensor, shape: tuple[int, int], ranks: Ranks) -> Tensor:
    """Return the mask [C] of the candidates that are among the `budget_F[j]` largest of their feature.

    >>> from sae_train.ranks.interface import Solo
    >>> index, value = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> cut_columns(index, value, budget_F=torch.tensor([1, 2]), shape=(2, 2), ranks=Solo())
    tensor([False,  True,  True,  True])

    Args:
        budget_F: int64 on the host, matches of each of this rank's features over all ranks; others as in `cut_batch`.
    """
    n_tokens, width = shape
    device, local_F = index_C.device, budget_F.clamp(max=n_tokens)
    integer, n_bits = INTEGER[value_C.dtype]
    known_C = torch.where((value_C > 0) & (index_C < n_tokens * width), value_C, 0)
    descending_C = (1 << n_bits) - 1 - known_C.view(integer)  # ordered like the values; torch sorts integers by radix
    by_value = descending_C.sort(stable=True).indices
    column_C = index_C.remainder(max(1, width)).int()
    by_column = column_C.index_select(0, by_value).sort(stable=True)
    order_C, group_C = by_value.index_select(0, by_column.indices), by_column.values
    start_F = torch.searchsorted(group_C, torch.arange(width, dtype=torch.int32, device=device))
    place_C = torch.arange(len(index_C), device=device) - start_F.index_select(0, group_C)
    is_leading = place_C < local_F.to(device, non_blocking=True).index_select(0, group_C)
    leading_C = torch.empty_like(is_leading).index_copy_(0, order_C, is_leading) & (known_C > 0)
    if ranks.data.size == 1:
        return leading_C
    # Each rank sends its leading entries of a column to the column's owner, which finds the cut over all ranks.
    total, slot_F = int(local_F.sum()), (local_F.cumsum(0) - local_F).to(device, non_blocking=True)
    slot_C = torch.where(is_leading, slot_F.index_select(0, group_C) + place_C, total)
    sent_C = value_C.new_zeros(total + 1).index_copy_(0, slot_C, known_C.index_select(0, order_C))[:-1]
    cut_F, left_F = column_cuts(sent_C.contiguous(), local_F=local_F, budget_F=budget_F, ranks=ranks.data)
    by_token_C = column_C.sort(stable=True).indices  # by feature, then token
    keep_C = _mask_to_cut(known_C.index_select(0, by_token_C), group_C, start_F, cut_F, left_F)
    return torch.empty_like(keep_C).index_copy_(0, by_token_C, keep_C)


def _mask_to_cut(value_C: Tensor, group_C: Tensor, start_G: Tensor, cut_G: Tensor, left_G: Tensor) -> Tensor:
    """Return the mask of entries above their group's cut, or among the first left_G[g] of the group that equal it.

    Entries are sorted by group, and group g begins at start_G[g]. Those after the last group have value 0.
    """
    if len(cut_G) == 0:
        return torch.zeros_like(value_C, dtype=torch.bool)
    group_C = group_C.clamp(max=len(cut_G) - 1)
    cut_C, is_positive = cut_G.index_select(0, group_C), value_C > 0
    tied_C = (value_C == cut_C) & is_positive
    before_C = pad(tied_C.cumsum(0), (1, 0))
    first_C = before_C.index_select(0, start_G.index_select(0, group_C))
    return ((value_C > cut_C) & is_positive) | (tied_C & (before_C[1:] - first_C <= left_G.index_select(0, group_C)))

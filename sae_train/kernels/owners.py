"""Cuts of rows and columns whose entries are spread over ranks, by way of an owner.

Each rank sends the owner of a row or column its own largest values. The owner finds the cut and how many of the
values that equal it each rank keeps, the lower rank first, and sends both back. Nothing that could be kept is left
out, so the cuts are exact; all counts are known on the host, so nobody waits for a device.
"""

import torch
from torch import Tensor

from sae_train.kernels.radix import INTEGER
from sae_train.ranks.interface import Ranks


def row_slots(k: int, n_features: int, ranks: Ranks) -> int:
    """Return the number of a token's values that each of a row's `ranks` sends: as many as it could possibly keep."""
    return min(k, -(-n_features // ranks.size))


def row_cuts(largest_NK: Tensor, *, k: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return each token's cut [N], and how many of this rank's values that equal it are kept [N].

    Args:
        largest_NK: this rank's `row_slots` largest values of each token, 0 where one is not positive or not there.
        k: entries that a token keeps.
        ranks: those with the same tokens; token t is owned by the rank whose slice holds it.
    """
    n_tokens, slots = largest_NK.shape
    owned_R = [hi - lo for lo, hi in ranks.slices(n_tokens)]
    n_own = owned_R[ranks.rank]
    received = ranks.exchange(largest_NK, send=owned_R, receive=[n_own] * ranks.size)
    value_RNK = received.view(ranks.size, n_own, slots)
    value_NC = value_RNK.transpose(0, 1).reshape(n_own, ranks.size * slots)
    cut_N = value_NC.topk(k, dim=1).values[:, -1] if k <= value_NC.shape[1] else value_NC.new_zeros(n_own)
    above_N = (value_NC > cut_N.unsqueeze(1)).sum(1)
    tied_RN = (value_RNK == cut_N.unsqueeze(1)).sum(2)
    return _given_back(cut_N, _allotted(k - above_N, tied_RN), receive=owned_R, ranks=ranks)


def column_cuts(value_C: Tensor, *, local_F: Tensor, budget_F: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return each column's cut [F], and how many of this rank's values that equal it are kept [F].

    Args:
        value_C: this rank's local_F[j] largest values of every column, column by column, 0 where one is not positive.
        local_F: int64 on the host, min(budget, tokens) of each column; equal on all ranks.
        budget_F: int64 on the host, entries that all ranks keep of each column together.
        ranks: those with the same columns; a column is owned by the rank whose slice holds it.
    """
    owned_R = [hi - lo for lo, hi in ranks.slices(len(local_F))]
    sent_R = [int(part.sum()) for part in local_F.split(owned_R)]
    low, high = ranks.slice(len(local_F))
    n_own = sent_R[ranks.rank]
    value_RC = ranks.exchange(value_C, send=sent_R, receive=[n_own] * ranks.size).view(ranks.size, n_own)
    column_C = torch.arange(high - low).repeat_interleave(local_F[low:high]).to(value_C.device, non_blocking=True)
    cut_F, left_RF = _cuts_of_owned(value_RC, column_C, budget_F[low:high].to(value_C.device, non_blocking=True))
    return _given_back(cut_F, left_RF, receive=owned_R, ranks=ranks)


def _cuts_of_owned(value_RC: Tensor, column_C: Tensor, budget_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return each owned column's cut [F], and how many of each rank's values that equal it are kept [R, F]."""
    n_ranks, n_owned = len(value_RC), len(budget_F)
    if len(column_C) == 0:
        return value_RC.new_full((n_owned,), torch.inf), budget_F.new_zeros(n_ranks, n_owned)
    value, order = value_RC.reshape(-1).sort(descending=True, stable=True)
    column, by_column = column_C.expand_as(value_RC).reshape(-1)[order].sort(stable=True)
    value = value[by_column]
    each_F = torch.arange(n_owned, device=column.device)
    at_cut = (torch.searchsorted(column, each_F) + budget_F - 1).clamp(min=0, max=len(value) - 1)
    cut_F = torch.where(column[at_cut] == each_F, value[at_cut], 0)
    cut_F = torch.where(budget_F > 0, cut_F, torch.inf)
    cut_C, none_RF = cut_F[column_C], budget_F.new_zeros(n_ranks, n_owned)
    above_F = none_RF.index_add(1, column_C, (value_RC > cut_C).long()).sum(0)
    tied_RF = none_RF.index_add(1, column_C, (value_RC == cut_C).long())
    return cut_F, _allotted(budget_F - above_F, tied_RF)


def _allotted(left_G: Tensor, tied_RG: Tensor) -> Tensor:
    """Return the number of tied values that each rank keeps when `left_G` are left: the lower rank's first."""
    return (left_G - (tied_RG.cumsum(0) - tied_RG)).clamp(min=0)


def _given_back(cut_G: Tensor, left_RG: Tensor, *, receive: list[int], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Send each rank the owned cuts and its numbers of ties; return those of all owners. Numbers travel as bits."""
    integer, _ = INTEGER[cut_G.dtype]
    both = torch.stack([cut_G.view(integer).expand_as(left_RG), left_RG.to(integer)], dim=2)
    received = ranks.exchange(both.flatten(0, 1), send=[len(cut_G)] * ranks.size, receive=receive)
    cut, left = received.unbind(1)
    return cut.contiguous().view(cut_G.dtype), left.long()

"""Which matches of a batch are kept: by batch, by row, by column, or by threshold.

Only positive entries are ever kept, as many as the budget says where enough are positive. Ties at a cut go to the
lower token, then the lower feature; tokens are counted over all ranks in rank order, and every rank holds equally many.
"""

import torch
from torch import Tensor

from sae_train.kernels import candidates, reference
from sae_train.kernels.matches import Matches, flat_nonzero, pack
from sae_train.ranks import Ranks


def select_batch(pre_NF: Tensor, *, budget: int, capacity: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest entries of the whole batch, all ranks' rows together.

    Args:
        pre_NF: this rank's pre-activations, fp32 or float64.
        budget: matches of the batch over all ranks.
        capacity: slots of the result, at least `budget`.
        ranks: who holds the other rows.
    """
    if pre_NF.device.type == "cpu":
        return candidates.select_batch(pre_NF, budget=budget, capacity=capacity, ranks=ranks)
    return reference.select_batch(pre_NF, budget=budget, capacity=capacity, ranks=ranks)


def select_rows(pre_NF: Tensor, *, k: int, capacity: int, allowed_F: Tensor | None = None) -> Matches:
    """Keep the `k` largest entries of each row, of the columns where the mask `allowed_F` [F] holds if it is given."""
    if pre_NF.device.type != "cpu":
        allowed_NF = pre_NF if allowed_F is None else torch.where(allowed_F, pre_NF, 0)
        return reference.select_rows(allowed_NF, k=k, capacity=capacity)
    if allowed_F is None:
        return candidates.select_rows(pre_NF, k=k, capacity=capacity)
    members = allowed_F.nonzero().squeeze(1)
    few = candidates.select_rows(pre_NF.index_select(1, members), k=k, capacity=capacity)
    used = int(few.start[-1])
    feature = torch.zeros_like(few.feature)
    feature[:used] = members[few.feature[:used].long()].int()
    return few._replace(feature=feature)


def select_columns(pre_NF: Tensor, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep the `budget_F[j]` largest entries of each column of the whole batch, all ranks' rows together.

    Args:
        pre_NF: this rank's pre-activations, fp32 or float64.
        budget_F: int64 on the host, matches of each feature over all ranks.
        capacity: slots of the result, at least the sum of `budget_F`.
        ranks: who holds the other rows.
    """
    if pre_NF.device.type == "cpu":
        return candidates.select_columns(pre_NF, budget_F=budget_F, capacity=capacity, ranks=ranks)
    return reference.select_columns(pre_NF, budget_F=budget_F, capacity=capacity, ranks=ranks)


def select_above(pre_NF: Tensor, threshold_F: Tensor) -> Matches:
    """Keep what is above its feature's threshold (strictly); as many slots as matches: one host read."""
    index = flat_nonzero(pre_NF > threshold_F)
    return pack(index, pre_NF.reshape(-1)[index], shape=(pre_NF.shape[0], pre_NF.shape[1]), capacity=None)

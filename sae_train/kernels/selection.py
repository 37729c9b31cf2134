"""Which matches of a batch are kept: by batch, by row, by column, or by threshold.

Only positive entries are kept (NaN is not), as many as the budget says where enough are positive. Ties at a cut go to
the lower token, then the lower feature. The batch is spread over a grid of ranks: those of `ranks.data` hold its
tokens, equally many each, those of `ranks.features` its features, each in rank order. Selection is collective, and the
same pairs are kept in every grid. Pairs are numbered within the rank.
"""

import torch
from torch import Tensor

from sae_train.kernels import selection_cpu, selection_gpu
from sae_train.kernels.approximate_product import Approximate, PreActivations, more_than
from sae_train.kernels.cuts import cut_batch, cut_columns, cut_rows
from sae_train.kernels.matches import Matches, no_matches, pack
from sae_train.ranks.interface import Ranks


def select_batch(pre_NF: PreActivations, *, budget: int, capacity: int, n_features: int, ranks: Ranks) -> Matches:
    """Keep the `budget` largest entries of the whole batch, all ranks' tokens and features together.

    >>> from sae_train.ranks.interface import Solo
    >>> pre = torch.tensor([[1.0, 5.0, -2.0], [3.0, 0.0, 4.0]])
    >>> found = select_batch(pre, budget=3, capacity=4, n_features=3, ranks=Solo())
    >>> found.value, found.feature.tolist(), found.token.tolist(), found.start.tolist()
    (tensor([5., 3., 4., 0.]), [1, 0, 2, 0], [0, 1, 1, 0], [0, 1, 3])

    Args:
        pre_NF: this rank's pre-activations, fp32 or float64, or approximate ones.
        budget: matches of the batch over all ranks.
        capacity: slots of the result, at least `budget`.
        n_features: features of the whole dictionary.
        ranks: the whole grid.
    """
    if isinstance(pre_NF, Approximate):
        shape, more = (pre_NF.shape[0], pre_NF.shape[1]), more_than(budget)
        found = select_batch(pre_NF.bf16_NF, budget=more, capacity=more, n_features=n_features, ranks=ranks)
        index, value = pre_NF.exact(found)
        keep = cut_batch(index, value, budget=budget, shape=shape, n_features=n_features, ranks=ranks)
        return pack(index, value, keep, shape=shape, capacity=capacity)
    select = selection_cpu.select_batch if pre_NF.device.type == "cpu" else selection_gpu.select_batch
    return select(pre_NF, budget=budget, capacity=capacity, n_features=n_features, ranks=ranks)


def select_rows(
    pre_NF: PreActivations, *, k: int, capacity: int, n_features: int, ranks: Ranks, allowed_F: Tensor | None = None
) -> Matches:
    """Keep the `k` largest entries of each row, all columns of the grid together.

    >>> from sae_train.ranks.interface import Solo
    >>> pre = torch.tensor([[1.0, 5.0, -2.0], [3.0, 0.0, 4.0]])
    >>> found = select_rows(pre, k=1, capacity=2, n_features=3, ranks=Solo())
    >>> found.value, found.feature.tolist()
    (tensor([5., 4.]), [1, 2])

    Args:
        k: matches of a token over all ranks; other arguments as in `select_batch`.
        capacity: slots of the result, at least k x tokens or all of this rank's entries.
        allowed_F: mask of this rank's columns that may be kept; all if None.
    """
    if k < 1:
        like = pre_NF.b_F if isinstance(pre_NF, Approximate) else pre_NF
        return no_matches(like, n_tokens=pre_NF.shape[0], capacity=capacity)
    if isinstance(pre_NF, Approximate):
        shape, more = (pre_NF.shape[0], pre_NF.shape[1]), min(more_than(k), n_features)
        most = min(more, shape[1])
        slots = most * shape[0]
        found = select_rows(
            pre_NF.bf16_NF, k=more, capacity=slots, n_features=n_features, ranks=ranks, allowed_F=allowed_F
        )
        index, value = pre_NF.exact(found)
        keep = cut_rows(index, value, k=k, most=most, shape=shape, n_features=n_features, ranks=ranks)
        return pack(index, value, keep, shape=shape, capacity=capacity)
    select = selection_cpu.select_rows if pre_NF.device.type == "cpu" else selection_gpu.select_rows
    return select(pre_NF, k=k, capacity=capacity, n_features=n_features, ranks=ranks, allowed_F=allowed_F)


def select_columns(pre_NF: PreActivations, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep the `budget_F[j]` largest entries of each column of the whole batch, all ranks' tokens together.

    >>> from sae_train.ranks.interface import Solo
    >>> pre = torch.tensor([[1.0, 5.0, -2.0], [3.0, 6.0, 4.0]])
    >>> found = select_columns(pre, budget_F=torch.tensor([1, 0, 2]), capacity=3, ranks=Solo())
    >>> found.value, found.feature.tolist()
    (tensor([3., 4., 0.]), [0, 2, 0])

    Args:
        budget_F: int64 on the host, matches of each of this rank's features over all ranks.
        capacity: slots of the result, at least the sum of `budget_F`.
    """
    if isinstance(pre_NF, Approximate):
        shape = pre_NF.shape[0], pre_NF.shape[1]
        more_F = torch.tensor([more_than(each) for each in budget_F.tolist()], dtype=torch.int64)
        found = select_columns(pre_NF.bf16_NF, budget_F=more_F, capacity=int(more_F.sum()), ranks=ranks)
        index, value = pre_NF.exact(found)
        keep = cut_columns(index, value, budget_F=budget_F, shape=shape, ranks=ranks)
        return pack(index, value, keep, shape=shape, capacity=capacity)
    select = selection_cpu.select_columns if pre_NF.device.type == "cpu" else selection_gpu.select_columns
    return select(pre_NF, budget_F=budget_F, capacity=capacity, ranks=ranks)


def select_where(pre_NF: Tensor, keep_NF: Tensor) -> Matches:
    """Keep the entries where `keep_NF` holds, positive or not, in as many slots; waits for the device.

    >>> pre = torch.tensor([[1.0, 5.0], [3.0, 0.0]])
    >>> found = select_where(pre, pre > torch.tensor([1.0, 4.0]))
    >>> found.value, found.feature.tolist(), found.start.tolist()
    (tensor([5., 3.]), [1, 0], [0, 1, 2])
    """
    index = selection_cpu.flat_nonzero(keep_NF)
    value, keep = pre_NF.reshape(-1).index_select(0, index), torch.ones_like(index, dtype=torch.bool)
    return pack(index, value, keep, shape=(pre_NF.shape[0], pre_NF.shape[1]))

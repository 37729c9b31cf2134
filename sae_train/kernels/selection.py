"""Which matches of a batch are kept: by batch, by row, by column, or by threshold.

Only positive entries are ever kept (NaN is not), as many as the budget says where enough are positive. Ties at a cut
go to the lower token, then the lower feature. The batch is spread over a grid of ranks: those of `ranks.data` hold
its tokens, equally many each, those of `ranks.features` its features, each in rank order. Selection is collective,
and the same pairs are kept in every grid. Pairs are numbered within the rank.
"""

from torch import Tensor

from sae_train.kernels import candidates, grouped
from sae_train.kernels.hint import Hint
from sae_train.kernels.matches import Matches, flat_nonzero, pack
from sae_train.kernels.screened import PreActivations, Screened
from sae_train.ranks.interface import Ranks


def select_batch(
    pre_NF: PreActivations, *, budget: int, capacity: int, n_features: int, ranks: Ranks, hint: Hint | None = None
) -> Matches:
    """Keep the `budget` largest entries of the whole batch, all ranks' tokens and features together.

    Args:
        pre_NF: this rank's pre-activations, fp32 or float64; screened only on a CPU.
        budget: matches of the batch over all ranks.
        capacity: slots of the result, at least `budget`.
        n_features: features of the whole dictionary.
        ranks: the whole grid.
        hint: of the run's earlier batches, on every rank or on none; it is given this one's cut.
    """
    if isinstance(pre_NF, Screened) or pre_NF.device.type == "cpu":
        return candidates.select_batch(
            pre_NF, budget=budget, capacity=capacity, n_features=n_features, ranks=ranks, hint=hint
        )
    return grouped.select_batch(pre_NF, budget=budget, capacity=capacity, n_features=n_features, ranks=ranks)


def select_rows(
    pre_NF: PreActivations, *, k: int, capacity: int, n_features: int, ranks: Ranks, allowed_F: Tensor | None = None
) -> Matches:
    """Keep the `k` largest entries of each row, all columns of the grid together.

    Args:
        pre_NF: this rank's pre-activations, fp32 or float64; screened only on a CPU.
        k: matches of a token over all ranks.
        capacity: slots of the result, at least k x tokens or all of this rank's entries.
        n_features: features of the whole dictionary.
        ranks: the whole grid.
        allowed_F: mask of this rank's columns that may be kept; all if None.
    """
    if isinstance(pre_NF, Screened) or pre_NF.device.type == "cpu":
        return candidates.select_rows(
            pre_NF, k=k, capacity=capacity, n_features=n_features, ranks=ranks, allowed_F=allowed_F
        )
    return grouped.select_rows(pre_NF, k=k, capacity=capacity, n_features=n_features, ranks=ranks, allowed_F=allowed_F)


def select_columns(pre_NF: PreActivations, *, budget_F: Tensor, capacity: int, ranks: Ranks) -> Matches:
    """Keep the `budget_F[j]` largest entries of each column of the whole batch, all ranks' tokens together.

    Args:
        pre_NF: this rank's pre-activations, fp32 or float64; screened only on a CPU.
        budget_F: int64 on the host, matches of each of this rank's features over all ranks.
        capacity: slots of the result, at least the sum of `budget_F`.
        ranks: the whole grid.
    """
    if isinstance(pre_NF, Screened) or pre_NF.device.type == "cpu":
        return candidates.select_columns(pre_NF, budget_F=budget_F, capacity=capacity, ranks=ranks)
    return grouped.select_columns(pre_NF, budget_F=budget_F, capacity=capacity, ranks=ranks)


def select_above(pre_NF: Tensor, threshold_F: Tensor) -> Matches:
    """Keep what is above its feature's threshold (strictly); as many slots as matches: one host read."""
    return select_where(pre_NF, pre_NF > threshold_F)


def select_few_above(pre_NF: PreActivations, bound_F: Tensor, *, most: float) -> Matches | None:
    """Keep the entries above their feature's bound (strictly), positive or not; None where they are more than `most`.

    Waits for the device: as many slots as matches. Screened ones may count some that are a little below.
    """
    if isinstance(pre_NF, Screened):
        found = pre_NF.above(bound_F, most=most)
        return None if found is None else pack(*found, None, shape=pre_NF.shape, capacity=None)
    keep_NF = pre_NF > bound_F
    return None if int(keep_NF.count_nonzero()) > most else select_where(pre_NF, keep_NF)


def select_where(pre_NF: Tensor, keep_NF: Tensor) -> Matches:
    """Keep the entries where `keep_NF` holds, positive or not; as many slots as matches: waits for the device."""
    index = flat_nonzero(keep_NF)
    return pack(index, pre_NF.reshape(-1)[index], None, shape=(pre_NF.shape[0], pre_NF.shape[1]), capacity=None)

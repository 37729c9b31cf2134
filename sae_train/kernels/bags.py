"""Weighted sums of rows: a reconstruction is a bag of decoder rows, a gradient of a weight row a bag of token rows.

After Gao et al. 2024 (arXiv 2406.04093). No intermediate of N*k*D numbers is made, and every sum has a
fixed order.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae_train.kernels.backend import uses_triton
from sae_train.kernels.matches import by_feature


def bags(rows_SD: Tensor, index_M: Tensor, weight_M: Tensor, start_B: Tensor) -> Tensor:
    """Return for each bag b the sum [B, D] over slots i from start[b] to start[b + 1] of weight[i] * rows[index[i]].

    >>> rows, index = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    >>> bags(rows, index, torch.tensor([2.0, 3.0, 4.0]), torch.tensor([0, 2, 3]))
    tensor([[2., 3.],
            [0., 4.]])

    Rows are fp32 or float64, or bf16 where Triton runs, with fp32 sums. Slots from start[B] on must have weight 0.
    """
    if uses_triton(rows_SD.device):
        from sae_train.kernels import triton_bags

        return triton_bags.bags(rows_SD, index_M, weight_M, start_B)[0]
    return embedding_bag(index_M, rows_SD, start_B, mode="sum", per_sample_weights=weight_M, include_last_offset=True)


def bags_and_totals(
    rows_SD: Tensor, index_M: Tensor, weight_M: Tensor, start_B: Tensor, order_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `bags` [B, D] and the sum of each bag's weights [B], where slot i stands for order[i].

    >>> rows, index = torch.tensor([[1.0], [10.0]]), torch.tensor([0, 1])
    >>> bags_and_totals(rows, index, torch.tensor([2.0, 3.0]), torch.tensor([0, 1, 2]), torch.tensor([1, 0]))
    (tensor([[30.],
            [ 2.]]), tensor([3., 2.]))
    """
    if uses_triton(rows_SD.device):
        from sae_train.kernels import triton_bags

        return triton_bags.bags(rows_SD, index_M, weight_M, start_B, order_M)
    index_M, weight_M = index_M.index_select(0, order_M), weight_M.index_select(0, order_M)
    ones_S1 = weight_M.new_ones(len(rows_SD), 1)
    total_B1 = bags(ones_S1, index_M, weight_M, start_B)
    return bags(rows_SD, index_M, weight_M, start_B), total_B1.squeeze(1)


def sums_by_feature(value_MC: Tensor, feature_M: Tensor, *, n_features: int) -> Tensor:
    """Return for each feature the sums of its matches' values [F, C], in the order of tokens; no graph.

    >>> sums_by_feature(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 0, 1]), n_features=3)
    tensor([[2.],
            [4.],
            [0.]])

    Args:
        value_MC: C values a match, 0 in unused slots.
    """
    with torch.no_grad():
        order, start_F = by_feature(feature_M, n_features)
        return bags(value_MC, order, value_MC.new_ones(len(order)), start_F)


def rows_to_read(rows: Tensor, precision: str) -> Tensor:
    """Return rows as Triton kernels read them: rounded to bf16 under precision=bf16, so that half the bytes move."""
    is_rounded = precision == "bf16" and rows.dtype == torch.float32 and uses_triton(rows.device)
    return rows.bfloat16() if is_rounded else rows


def used_slots(start_N: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    """Return per-slot tensors [M] without their unused slots on a CPU, where reading the count costs nothing."""
    if start_N.device.type != "cpu":
        return given
    used = int(start_N[-1])
    return given if used == len(given[0]) else tuple(each.narrow(0, 0, used) for each in given)


def zero_unused(value_M: Tensor, start_N: Tensor) -> Tensor:
    """Return per-slot values with 0 in the unused slots."""
    if start_N.device.type == "cpu" and int(start_N[-1]) == len(value_M):
        return value_M
    is_used = torch.arange(len(value_M), device=start_N.device) < start_N[-1]
    return torch.where(is_used, value_M, 0)

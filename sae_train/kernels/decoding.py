"""The reconstruction: for each token a weighted sum of decoder rows, at the cost of the matches only."""

from typing import Any

import torch
from torch import Tensor

from sae_train.kernels.bags import bags, bags_and_totals, rows_to_read, used_slots
from sae_train.kernels.function import applied
from sae_train.kernels.match_products import row_products
from sae_train.kernels.matches import FeatureOrder


def decode(
    value_M: Tensor, W_FD: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor, *,
    order: FeatureOrder | None = None, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """Return for each token the sum of value * row of W over its matches [N, D]; differentiable in value and W.

    The gradient of a value is one dot product. The gradient of a row of W is a weighted sum of token rows.

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> feature, token = torch.tensor([0, 2, 1]).int(), torch.tensor([0, 0, 1]).int()
    >>> decode(torch.tensor([2.0, 3.0, 4.0]), W, feature, token, torch.tensor([0, 2, 3]).int())
    tensor([[5., 3.],
            [0., 4.]])

    Args:
        value_M: as in `Matches`, like feature_M, token_M and start_N.
        W_FD: one row a feature.
        order: the matches' own, where several products share it.
        precision: bf16 rounds the rows that Triton kernels read; elsewhere it has no effect.
    """
    value, feature, token = used_slots(start_N, value_M, feature_M, token_M)
    return applied(_Decode, value, W_FD, feature, token, start_N, order or FeatureOrder(), precision)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, W_FD: Tensor, feature: Tensor, token: Tensor, start_N: Tensor,
        order: FeatureOrder, precision: str,
    ) -> Tensor:  # fmt: skip
        rows_FD = rows_to_read(W_FD, precision)
        ctx.save_for_backward(value, rows_FD, feature, token, start_N)
        ctx.order, ctx.precision = order, precision
        return bags(rows_FD, feature, value, start_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, rows_FD, feature, token, start_N = ctx.saved_tensors
        grad_ND = rows_to_read(grads[0], ctx.precision).contiguous()
        grad_value = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_value = row_products(grad_ND, rows_FD, feature, token, start_N)
        if ctx.needs_input_grad[1]:
            order, start_F = ctx.order(feature, len(rows_FD))
            grad_W, _ = bags_and_totals(grad_ND, token, value, start_F, order)
        return grad_value, grad_W, None, None, None, None, None

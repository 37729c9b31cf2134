"""Graphs of the encoder's product: at the matches only, for every pair, and for a value that each feature has."""

from typing import Any

import torch
from torch import Tensor

from sae_train.kernels.bags import bags_and_totals, rows_to_read, used_slots, zero_unused
from sae_train.kernels.function import applied
from sae_train.kernels.matches import FeatureOrder


def attach(
    value_M: Tensor, x_ND: Tensor, W_FD: Tensor, b_F: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor, *,
    order: FeatureOrder | None = None, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """Return `value_M` [M], which holds x W^T + b at the matches, with the graph of that product for W and b.

    >>> x, W, b = torch.tensor([[2.0]]), torch.tensor([[3.0], [4.0]], requires_grad=True), torch.zeros(2)
    >>> feature, token, start = torch.tensor([1]).int(), torch.tensor([0]).int(), torch.tensor([0, 1]).int()
    >>> attach(torch.tensor([8.0]), x, W, b, feature, token, start).sum().backward()
    >>> W.grad
    tensor([[0.],
            [2.]])

    Args:
        value_M: as in `Matches`, like feature_M, token_M and start_N.
        x_ND: the tokens; no gradient reaches them.
        W_FD: one row a feature.
        b_F: bias.
        order: the matches' own, where several products share it.
        precision: bf16 rounds the rows that Triton kernels read; elsewhere it has no effect.
    """
    value, feature, token = used_slots(start_N, value_M, feature_M, token_M)
    attached = applied(_Attach, value, W_FD, b_F, x_ND, feature, token, start_N, order or FeatureOrder(), precision)
    if len(value) == len(value_M):
        return attached
    return torch.cat([attached, value_M[len(value) :].detach()])


def attach_dense(pre_NF: Tensor, x_ND: Tensor, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """Return `pre_NF` [N, F], which holds x W^T + b, with the graph of that product for W and b.

    >>> x, W, b = torch.tensor([[2.0]]), torch.tensor([[3.0]], requires_grad=True), torch.zeros(1)
    >>> attach_dense(torch.tensor([[6.0]]), x, W, b).sum().backward()
    >>> W.grad
    tensor([[2.]])
    """
    return applied(_AttachDense, pre_NF, W_FD, b_F, x_ND)


def of_features(value_F: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's feature's value [M]; differentiable, the gradient summed in the order of tokens.

    >>> feature, token = torch.tensor([2, 0]).int(), torch.tensor([0, 0]).int()
    >>> of_features(torch.tensor([5.0, 6.0, 7.0]), feature, token, torch.tensor([0, 2]).int())
    tensor([7., 5.])
    """
    ones_N1, none_F1 = value_F.new_ones(len(start_N) - 1, 1), value_F.new_zeros(len(value_F), 1)
    value_M = value_F.detach().index_select(0, feature_M)
    return attach(value_M, ones_N1, none_F1, value_F, feature_M, token_M, start_N)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, W_FD: Tensor, b_F: Tensor, x_ND: Tensor, feature: Tensor, token: Tensor,
        start_N: Tensor, order: FeatureOrder, precision: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x_ND, feature, token, start_N)
        ctx.n_features, ctx.order, ctx.precision = len(W_FD), order, precision
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, feature, token, start_N = ctx.saved_tensors
        grad = zero_unused(grads[0], start_N)
        order, start_F = ctx.order(feature, ctx.n_features)
        grad_W, grad_b = bags_and_totals(rows_to_read(x_ND, ctx.precision), token, grad, start_F, order)
        return None, grad_W, grad_b, None, None, None, None, None, None


class _AttachDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_NF: Tensor, W_FD: Tensor, b_F: Tensor, x_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND)
        return pre_NF.view_as(pre_NF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_ND,) = ctx.saved_tensors
        return None, grads[0].t() @ x_ND, grads[0].sum(0), None

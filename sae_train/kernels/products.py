"""The products of a sparse autoencoder: one dense, the rest over matches only.

Affinities need the full product. Everything after selection costs k rows a token: a reconstruction is a weighted
bag of decoder rows, the gradient of a code value is one dot product, and with matches ordered by feature the
gradient of each weight row is a weighted bag of token rows (the idea of Gao et al. 2024, arXiv 2406.04093). No
intermediate of N*k*D numbers is made, and every sum has a fixed order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

PRECISIONS = ("bf16", "float32", "float64")


def affine(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, precision: str) -> Tensor:
    """Return x W^T + b [N, F] from fp32 accumulators (float64 where the inputs are), without a graph.

    `bf16` rounds the factors of the product to bf16; on a CPU that only imitates what a GPU computes.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: choose {', '.join(PRECISIONS)}")
    with torch.no_grad():
        if precision == "bf16" and x_ND.dtype == torch.float32:
            x_bf16, W_bf16 = x_ND.bfloat16(), W_FD.bfloat16()
            if x_ND.is_cuda:
                return torch.mm(x_bf16, W_bf16.t(), out_dtype=torch.float32).add_(b_F)
            x_ND, W_FD = x_bf16.float(), W_bf16.float()
        return torch.addmm(b_F, x_ND, W_FD.t())


def decode(value_M: Tensor, W_FD: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor) -> Tensor:
    """Return for each token the sum of value * row of W over its matches [N, D]; differentiable in value and W."""
    used = _used_slots(start_N, len(value_M))
    value, feature, token = (t.narrow(0, 0, used) for t in (value_M, feature_M, token_M))
    rows: Tensor = _Decode.apply(value, W_FD, feature, token, start_N)  # type: ignore[no-untyped-call]
    return rows


def attach(
    value_M: Tensor,
    x_ND: Tensor,
    W_FD: Tensor,
    b_F: Tensor,
    feature_M: Tensor,
    token_M: Tensor,
    start_N: Tensor,
) -> Tensor:
    """Return `value_M`, which holds x W^T + b at the matches, with the graph of that product for W and b."""
    used = _used_slots(start_N, len(value_M))
    value, feature, token = (t.narrow(0, 0, used) for t in (value_M, feature_M, token_M))
    attached: Tensor = _Attach.apply(  # type: ignore[no-untyped-call]
        value, W_FD, b_F, x_ND, feature, token, start_N
    )
    if used == len(value_M):
        return attached
    return torch.cat([attached, value_M[used:].detach()])


def attach_dense(pre_NF: Tensor, x_ND: Tensor, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """Return `pre_NF`, which holds x W^T + b, with the graph of that product for W and b: the dense `attach`."""
    attached: Tensor = _AttachDense.apply(pre_NF, W_FD, b_F, x_ND)  # type: ignore[no-untyped-call]
    return attached


def of_features(value_F: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's feature's value [M]; differentiable, the gradient summed in the order of tokens."""
    values: Tensor = _OfFeatures.apply(value_F, feature_M, token_M, start_N)  # type: ignore[no-untyped-call]
    return values


def _used_slots(start_N: Tensor, slots: int) -> int:
    """Return how many slots to work on: the matches alone where reading their count costs nothing."""
    return int(start_N[-1]) if start_N.device.type == "cpu" else slots


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, W_FD: Tensor, feature: Tensor, token: Tensor, start_N: Tensor) -> Tensor:
        ctx.save_for_backward(value, W_FD, feature, token, start_N)
        return embedding_bag(feature, W_FD, start_N, mode="sum", per_sample_weights=value, include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, W_FD, feature, token, start_N = ctx.saved_tensors
        grad_ND = grads[0].contiguous()
        grad_value = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_value = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_ND, W_FD, feature, start_N, token, 0, -1
            )
            grad_value = torch.where(_is_used(start_N, len(value)), grad_value, 0)
        if ctx.needs_input_grad[1]:
            grad_W = _bags_by_feature(value, feature, token, grad_ND, n_features=len(W_FD))
        return grad_value, grad_W, None, None, None


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        W_FD: Tensor,
        b_F: Tensor,
        x_ND: Tensor,
        feature: Tensor,
        token: Tensor,
        start_N: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, feature, token, start_N)
        ctx.n_features = len(W_FD)
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, feature, token, start_N = ctx.saved_tensors
        grad = torch.where(_is_used(start_N, len(feature)), grads[0], 0)
        grad_W = _bags_by_feature(grad, feature, token, x_ND, n_features=ctx.n_features)
        ones_N1 = x_ND.new_ones(len(x_ND), 1)
        grad_b = _bags_by_feature(grad, feature, token, ones_N1, n_features=ctx.n_features).squeeze(1)
        return None, grad_W, grad_b, None, None, None, None


class _AttachDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_NF: Tensor, W_FD: Tensor, b_F: Tensor, x_ND: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND)
        return pre_NF.view_as(pre_NF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_ND,) = ctx.saved_tensors
        return None, grads[0].t() @ x_ND, grads[0].sum(0), None


class _OfFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_F: Tensor, feature: Tensor, token: Tensor, start_N: Tensor) -> Tensor:
        ctx.save_for_backward(feature, token, start_N)
        ctx.n_features = len(value_F)
        return value_F[feature.long()]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        feature, token, start_N = ctx.saved_tensors
        grad = torch.where(_is_used(start_N, len(feature)), grads[0], 0)
        ones_N1 = grad.new_ones(len(start_N) - 1, 1)
        return _bags_by_feature(grad, feature, token, ones_N1, n_features=ctx.n_features).squeeze(1), None, None, None


def _is_used(start_N: Tensor, slots: int) -> Tensor:
    return torch.arange(slots, device=start_N.device) < start_N[-1]


def _bags_by_feature(weight: Tensor, feature: Tensor, token: Tensor, rows_ND: Tensor, *, n_features: int) -> Tensor:
    """Return for each feature the sum of weight * row of its matches' tokens [F, D], in token order."""
    by_feature, order = feature.sort(stable=True)
    bounds = torch.arange(n_features + 1, dtype=torch.int32, device=feature.device)
    start_F = torch.searchsorted(by_feature, bounds, out_int32=True)
    return embedding_bag(
        token[order], rows_ND, start_F, mode="sum", per_sample_weights=weight[order], include_last_offset=True
    )

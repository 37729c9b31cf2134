"""The products of a sparse autoencoder: one dense, the rest over matches only.

Affinities need the full product. Everything after selection costs k rows a token: a reconstruction is a weighted
bag of decoder rows, the gradient of a code value is one dot product, and with matches ordered by feature the
gradient of each weight row is a weighted bag of token rows (the idea of Gao et al. 2024, arXiv 2406.04093). No
intermediate of N*k*D numbers is made, and every sum has a fixed order.

What these products wait for is rows of matrices. Under `precision` bf16 `decode` and `attach` round the rows that they
read, of weights, tokens and gradients, to that, and half as many bytes move; weights of bags and all sums stay fp32.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae_train.kernels.backend import DTYPES, uses_numba, uses_triton
from sae_train.kernels.function import applied
from sae_train.kernels.matches import FeatureOrder, by_feature
from sae_train.kernels.workspace import Workspace


def decode(
    value_M: Tensor,
    W_FD: Tensor,
    feature_M: Tensor,
    token_M: Tensor,
    start_N: Tensor,
    *,
    order: FeatureOrder | None = None,
    workspace: Workspace | None = None,
    precision: str = "float32",
) -> Tensor:
    """Return for each token the sum of value * row of W over its matches [N, D]; differentiable in value and W.

    Args:
        order: the matches' own, if other products over them are to share it; `attach` alike.
        workspace: whose memory the gradient of W is written to, and which knows W's rows in bf16, and of gradients what
            numba_adam.along_rows or .squares would say; `attach` alike.
        precision: of rows that are read, bf16, or float32 for that of W; `attach` alike.
    """
    value, feature, token = _of_matches(start_N, value_M, feature_M, token_M)
    shared = order or FeatureOrder(), workspace or Workspace()
    return applied(_Decode, value, W_FD, feature, token, start_N, *shared, precision)


def attach(
    value_M: Tensor,
    x_ND: Tensor,
    W_FD: Tensor,
    b_F: Tensor,
    feature_M: Tensor,
    token_M: Tensor,
    start_N: Tensor,
    *,
    order: FeatureOrder | None = None,
    workspace: Workspace | None = None,
    precision: str = "float32",
) -> Tensor:
    """Return `value_M`, which holds x W^T + b at the matches, with the graph of that product for W and b."""
    value, feature, token = _of_matches(start_N, value_M, feature_M, token_M)
    shared = order or FeatureOrder(), workspace or Workspace()
    attached = applied(_Attach, value, W_FD, b_F, x_ND, feature, token, start_N, *shared, precision)
    if len(value) == len(value_M):
        return attached
    return torch.cat([attached, value_M[len(value) :].detach()])


def attach_dense(pre_NF: Tensor, x_ND: Tensor, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """Return `pre_NF`, which holds x W^T + b, with the graph of that product for W and b: the dense `attach`."""
    return applied(_AttachDense, pre_NF, W_FD, b_F, x_ND)


def of_features(value_F: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's feature's value [M]; differentiable, the gradient summed in the order of tokens."""
    return applied(_OfFeatures, value_F, feature_M, token_M, start_N)


def row_products(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's product of its token's row and its feature's row of W [M], 0 in unused slots; no graph."""
    with torch.no_grad():
        return _row_products(rows_ND.contiguous(), W_FD, feature_M, token_M, start_N)


def sums_by_feature(value_MC: Tensor, feature_M: Tensor, *, n_features: int) -> Tensor:
    """Return for each feature the sums of its matches' values [F, C], in the order of tokens; no graph.

    Args:
        value_MC: C values a match, 0 in unused slots.
    """
    with torch.no_grad():
        order, start_F = by_feature(feature_M, n_features)
        if uses_triton(value_MC):
            from sae_train.kernels import triton_products

            return triton_products.bags(value_MC, order, None, start_F)
        return embedding_bag(order, value_MC, start_F, mode="sum", include_last_offset=True)


def _read_rows(rows: Tensor, precision: str, workspace: Workspace | None = None) -> Tensor:
    """Return rows as products read them: rounded to bf16 where the precision says so, once for one workspace."""
    if precision != "bf16" or rows.dtype != torch.float32:
        return rows
    if not uses_numba(rows):
        return rows.bfloat16()
    rounded: Tensor | None = None if workspace is None else workspace.noted(rows, "bf16")
    if rounded is None:
        from sae_train.kernels import numba_rows

        rounded = numba_rows.bf16(rows)
        if workspace is not None:
            workspace.note(rows, bf16=rounded)
    return rounded


def _of_matches(start_N: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    """Return what slots hold, [M] each: of the slots to work on."""
    slots = len(given[0])
    used = _used_slots(start_N, slots)
    return given if used == slots else tuple(each.narrow(0, 0, used) for each in given)


def _used_slots(start_N: Tensor, slots: int) -> int:
    """Return how many slots to work on: the matches alone where reading their count costs nothing."""
    return int(start_N[-1]) if start_N.device.type == "cpu" else slots


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        W_FD: Tensor,
        feature: Tensor,
        token: Tensor,
        start_N: Tensor,
        order: FeatureOrder,
        workspace: Workspace,
        precision: str,
    ) -> Tensor:
        rows_FD = _read_rows(W_FD, precision, workspace)
        ctx.save_for_backward(value, rows_FD, W_FD, feature, token, start_N)
        ctx.order, ctx.workspace, ctx.precision = order, workspace, precision
        return _bags(rows_FD, feature, value, start_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, rows_FD, W_FD, feature, token, start_N = ctx.saved_tensors
        grad_ND = _read_rows(grads[0], ctx.precision).contiguous()
        grad_value = grad_W = None
        is_plain = uses_numba(value, W_FD) and grad_ND.dtype == rows_FD.dtype and grad_ND.dtype in DTYPES
        if all(ctx.needs_input_grad[:2]) and is_plain:
            from sae_train.kernels import numba_backward

            order, start_F = ctx.order(feature, len(rows_FD))
            grad_W = ctx.workspace.take(rows_FD.shape, like=value)
            given = grad_ND, rows_FD, value, token, start_F, order
            grad_value, split_2F = numba_backward.gradients(*given, unit_FD=W_FD, out=grad_W)
            ctx.workspace.note(grad_W, along_rows=split_2F)
            return grad_value, grad_W, None, None, None, None, None, None
        if ctx.needs_input_grad[0]:
            grad_value = _row_products(grad_ND, rows_FD, feature, token, start_N)
        if ctx.needs_input_grad[1]:
            order, start_F = ctx.order(feature, len(rows_FD))
            grad_W = _bags_and_totals(grad_ND, token, value, start_F, order, ctx.workspace, width=grad_ND.shape[1])[0]
        return grad_value, grad_W, None, None, None, None, None, None


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
        order: FeatureOrder,
        workspace: Workspace,
        precision: str,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, feature, token, start_N)
        ctx.n_features, ctx.order, ctx.workspace, ctx.precision = len(W_FD), order, workspace, precision
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, feature, token, start_N = ctx.saved_tensors
        grad = _of_used_slots(grads[0], start_N)
        order, start_F = ctx.order(feature, ctx.n_features)
        rounded = ctx.workspace.noted(x_ND, "padded") if ctx.precision == "bf16" else None
        rows_N = _read_rows(x_ND, ctx.precision) if rounded is None else rounded
        grad_W, grad_b = _bags_and_totals(rows_N, token, grad, start_F, order, ctx.workspace, width=x_ND.shape[1])
        return None, grad_W, grad_b, None, None, None, None, None, None, None


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
        grad = _of_used_slots(grads[0], start_N)
        ones_N1 = grad.new_ones(len(start_N) - 1, 1)
        order, start_F = by_feature(feature, ctx.n_features)
        return _bags_and_totals(ones_N1, token, grad, start_F, order, Workspace(), width=1)[1], None, None, None


def _row_products(rows_ND: Tensor, W_FD: Tensor, feature: Tensor, token: Tensor, start_N: Tensor) -> Tensor:
    """Return `row_products`; torch does it on a CPU as a dense product sampled at a sparse matrix's places."""
    if uses_triton(rows_ND):
        from sae_train.kernels import triton_products

        return triton_products.row_products(rows_ND, W_FD, feature, start_N)
    if uses_numba(rows_ND, W_FD) or uses_numba(rows_ND, W_FD, dtype=torch.bfloat16):
        from sae_train.kernels import numba_products

        return numba_products.row_products(rows_ND, W_FD, feature, start_N)
    rows_ND, W_FD = (each.float() if each.dtype == torch.bfloat16 else each for each in (rows_ND, W_FD))
    if rows_ND.device.type == "cpu":
        used = int(start_N[-1])
        _hear_warning_of_sparse_matrices()
        size, zeros = (len(rows_ND), len(W_FD)), rows_ND.new_zeros(used)
        places = torch.sparse_csr_tensor(start_N, feature[:used], zeros, size=size, check_invariants=False)
        product = torch.sparse.sampled_addmm(places, rows_ND, W_FD.t(), beta=0).values()
        return torch.nn.functional.pad(product, (0, len(feature) - used))
    product = torch.ops.aten._embedding_bag_per_sample_weights_backward(rows_ND, W_FD, feature, start_N, token, 0, -1)
    return _of_used_slots(product, start_N)


@functools.cache
def _hear_warning_of_sparse_matrices() -> None:
    """Let torch say here, unheard, what it says once a process: that they are in beta. Our tests watch what is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


def _of_used_slots(value_M: Tensor, start_N: Tensor) -> Tensor:
    """Return the values of the slots that hold a match, and 0 in the others."""
    if start_N.device.type == "cpu" and int(start_N[-1]) == len(value_M):
        return value_M
    is_used = torch.arange(len(value_M), device=start_N.device) < start_N[-1]
    return torch.where(is_used, value_M, 0)


def _bags_and_totals(
    rows: Tensor, index: Tensor, weight: Tensor, start: Tensor, order: Tensor, workspace: Workspace, *, width: int
) -> tuple[Tensor, Tensor]:
    """Return for each bag the sum of weight * rows[index] over its slots, and of the weights; slot i is order[i].

    Args:
        width: columns to read; there are more only where Numba's kernels work.
    """
    if uses_triton(rows):
        from sae_train.kernels import triton_products

        return triton_products.bags_and_totals(rows, index, weight, start, order)
    if _is_numbas(rows, weight):
        from sae_train.kernels import numba_products

        out = workspace.take((len(start) - 1, width), like=weight)
        square_B = out.new_empty(len(out))
        found = numba_products.bags_and_totals(rows, index, weight, start, order, out=out, square_B=square_B)
        workspace.note(out, squares=square_B)
        return found
    index, weight = index[order], weight[order]
    return _bags(rows, index, weight, start), _bags(weight.new_ones(len(rows), 1), index, weight, start).squeeze(1)


def _bags(rows: Tensor, index: Tensor, weight: Tensor, start: Tensor) -> Tensor:
    """Return for each bag the sum of weight * rows[index] over its slots."""
    if uses_triton(rows):
        from sae_train.kernels import triton_products

        return triton_products.bags(rows, index, weight, start)
    if _is_numbas(rows, weight):
        from sae_train.kernels import numba_products

        return numba_products.bags(rows, index, weight, start)
    rows = rows.to(weight.dtype) if rows.dtype == torch.bfloat16 else rows
    return embedding_bag(index, rows, start, mode="sum", per_sample_weights=weight, include_last_offset=True)


def _is_numbas(rows: Tensor, weight: Tensor) -> bool:
    """Return whether Numba's kernels sum fp32 weights times rows, fp32 or bf16 ones."""
    return uses_numba(weight) and rows.dtype in DTYPES

"""Both gradients of a sparse reconstruction in one pass on a CPU: each row of its gradient is read once for the two.

What numba_products.py finds by `row_products` and `bags_and_totals`, from matches in the order of features, whose
weights stay in cache meanwhile. Every sum is of fp32 and has a fixed order. Letters as there, and F features.
"""

import torch
from numba import carray, float32, int32, int64, njit, uint16
from torch import Tensor

from sae_train.kernels.numba_adam import split
from sae_train.kernels.numba_products import share_of_slots
from sae_train.kernels.numba_team import AHEAD, SUMS, Kernel, at, fetch, number, run, wide


def gradients(
    grad_ND: Tensor,
    W_FD: Tensor,
    value_M: Tensor,
    token_M: Tensor,
    start_F: Tensor,
    order_M: Tensor,
    *,
    unit_FD: Tensor,
    out: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Write the gradient of W, and return that of the values [M] fp32, and what numba_adam.along_rows says of W's.

    Args:
        grad_ND: of the reconstruction, fp32 or bf16.
        W_FD: alike.
        value_M: fp32.
        token_M: int32.
        start_F: int32 [F + 1], into the order.
        order_M: int64, matches by feature.
        unit_FD: fp32, W as it was before it was rounded.
        out: [F, D] fp32.
    """
    grad_M, split_2F = torch.empty_like(value_M), out.new_empty(2, len(out))
    given = [each.contiguous() for each in (grad_ND, W_FD, value_M, token_M, start_F, order_M, unit_FD)]
    kernel = _GRADIENTS[grad_ND.dtype, W_FD.dtype]
    run(kernel, len(W_FD), W_FD.shape[1], len(grad_ND), len(order_M), *given, grad_M, out, *split_2F)
    return grad_M, tuple(split_2F)


@njit(fastmath=SUMS)
def _both(out_D, W_D, row_D, weight):
    """Add weight * row, and return the product of the row with W's."""
    wide()
    product = float32(0)
    for d in range(len(out_D)):
        entry = number(row_D[d])
        product += number(W_D[d]) * entry
        out_D[d] += weight * entry
    return product


@njit(fastmath=SUMS)
def _both_of_four(out_D, W_D, a_D, b_D, c_D, d_D, weight_4):
    """Do what `_both` does four times; what they add to is read and written once."""
    wide()
    a_weight, b_weight, c_weight, d_weight = weight_4
    a, b, c, d = float32(0), float32(0), float32(0), float32(0)
    for i in range(len(out_D)):
        weight, a_entry, b_entry, c_entry, d_entry = (
            number(W_D[i]), number(a_D[i]), number(b_D[i]), number(c_D[i]), number(d_D[i])
        )  # fmt: skip
        a += weight * a_entry
        b += weight * b_entry
        c += weight * c_entry
        d += weight * d_entry
        first = (out_D[i] + a_weight * a_entry) + b_weight * b_entry
        out_D[i] = (first + c_weight * c_entry) + d_weight * d_entry
    return a, b, c, d


@njit
def _gradients(words, dtype):
    n_features, width, n_tokens, n_matches = words[0], words[1], words[2], words[3]
    grad_ND, W_FD = carray(at(words[4]), (n_tokens, width), dtype), carray(at(words[5]), (n_features, width), dtype)
    value_M, token_M = carray(at(words[6]), n_matches, float32), carray(at(words[7]), n_matches, int32)
    start_F, order_M = carray(at(words[8]), n_features + 1, int32), carray(at(words[9]), n_matches, int64)
    unit_FD, grad_M = carray(at(words[10]), (n_features, width), float32), carray(at(words[11]), n_matches, float32)
    out, along_F = carray(at(words[12]), (n_features, width), float32), carray(at(words[13]), n_features, float32)
    square_F = carray(at(words[14]), n_features, float32)
    low, high = share_of_slots(start_F)
    for feature in range(low, high):
        out[feature] = 0
        slot, end = int64(start_F[feature]), start_F[feature + 1]
        while slot + 4 <= end:
            a, b, c, d = order_M[slot], order_M[slot + 1], order_M[slot + 2], order_M[slot + 3]
            i, j, k, m = token_M[a], token_M[b], token_M[c], token_M[d]
            weights = value_M[a], value_M[b], value_M[c], value_M[d]
            rows = grad_ND[i], grad_ND[j], grad_ND[k], grad_ND[m]
            if slot + AHEAD + 4 <= n_matches:
                for ahead in range(slot + AHEAD, slot + AHEAD + 4):
                    fetch(grad_ND[token_M[order_M[ahead]]])
            found = _both_of_four(out[feature], W_FD[feature], rows[0], rows[1], rows[2], rows[3], weights)
            grad_M[a], grad_M[b], grad_M[c], grad_M[d] = found
            slot += 4
        while slot < end:
            match = order_M[slot]
            grad_M[match] = _both(out[feature], W_FD[feature], grad_ND[token_M[match]], value_M[match])
            slot += 1
        along_F[feature], square_F[feature] = split(out[feature], unit_FD[feature])


@Kernel
def _gradients_fp32(words):
    _gradients(words, float32)


@Kernel
def _gradients_bf16(words):
    _gradients(words, uint16)


_GRADIENTS = {(torch.float32,) * 2: _gradients_fp32, (torch.bfloat16,) * 2: _gradients_bf16}

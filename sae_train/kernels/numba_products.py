"""Products over matches on a CPU: what triton_products.py does on a GPU. Every sum has a fixed order.

Letters: M matches, B bags, D width.
"""

import numpy as np
from numba import carray, float32, int32, int64, njit
from torch import Tensor

from sae_train.kernels.numba_team import at, kernel, product, run, share


def bags_and_totals(
    rows: Tensor, index_M: Tensor, weight_M: Tensor, start_B: Tensor, order_M: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of weight * row over each bag's slots [B, D], and of the weights alone [B].

    Args:
        rows: [R, D] fp32.
        index_M: int32, rows.
        weight_M: fp32.
        start_B: int32 [B + 1].
        order_M: int64; slot i stands for order[i].
        out: [B, D] fp32 to write to.
    """
    n_bags, width = out.shape
    total_B = out.new_empty(n_bags)
    given = [each.contiguous() for each in (rows, index_M, weight_M, start_B, order_M)]
    run(_bags, n_bags, width, len(rows), len(index_M), *given, out, total_B)
    return out, total_B


def row_products(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's product of its token's row and its feature's row of W [M], 0 in unused slots."""
    product_M = rows_ND.new_zeros(len(feature_M))
    given = [each.contiguous() for each in (rows_ND, W_FD, feature_M, start_N)]
    run(_row_products, len(rows_ND), rows_ND.shape[1], len(W_FD), len(feature_M), *given, product_M)
    return product_M


def entries(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, index_C: Tensor) -> Tensor:
    """Return the entries of x W^T + b at flat indices [C] int64."""
    value_C = x_ND.new_empty(len(index_C))
    given = [each.contiguous() for each in (x_ND, W_FD, b_F, index_C)]
    run(_entries, len(x_ND), x_ND.shape[1], len(W_FD), len(index_C), *given, value_C)
    return value_C


@njit
def _share_of_slots(start_B):
    """Return lo, hi of this thread's bags: those that begin in its part of the slots."""
    n_bags = len(start_B) - 1
    low, high = share(start_B[n_bags])
    first = np.searchsorted(start_B[:n_bags], low)
    last = n_bags if high == start_B[n_bags] else np.searchsorted(start_B[:n_bags], high)
    return first, last


@njit(fastmath={"contract"})
def _add(out_D, row_D, weight):
    for d in range(len(out_D)):
        out_D[d] += weight * row_D[d]


@njit(fastmath={"contract"})
def _add_four(out_D, rows, row_4, weight_4):
    """Do what `_add` does four times, one after the other; what they add to is read and written once."""
    a_D, b_D, c_D, d_D = rows[row_4[0]], rows[row_4[1]], rows[row_4[2]], rows[row_4[3]]
    a, b, c, d = weight_4
    for i in range(len(out_D)):
        out_D[i] = (((out_D[i] + a * a_D[i]) + b * b_D[i]) + c * c_D[i]) + d * d_D[i]


@kernel
def _bags(words):
    n_bags, width, n_rows, n_slots = words[0], words[1], words[2], words[3]
    rows = carray(at(words[4]), (n_rows, width), float32)
    index_M, weight_M = carray(at(words[5]), n_slots, int32), carray(at(words[6]), n_slots, float32)
    start_B, order_M = carray(at(words[7]), n_bags + 1, int32), carray(at(words[8]), n_slots, int64)
    out, total_B = carray(at(words[9]), (n_bags, width), float32), carray(at(words[10]), n_bags, float32)
    low, high = _share_of_slots(start_B)
    for bag in range(low, high):
        out[bag] = 0
        total = float32(0)
        slot, end = start_B[bag], start_B[bag + 1]
        while slot + 4 <= end:
            a, b, c, d = order_M[slot], order_M[slot + 1], order_M[slot + 2], order_M[slot + 3]
            weights = weight_M[a], weight_M[b], weight_M[c], weight_M[d]
            _add_four(out[bag], rows, (index_M[a], index_M[b], index_M[c], index_M[d]), weights)
            total = (((total + weights[0]) + weights[1]) + weights[2]) + weights[3]
            slot += 4
        while slot < end:
            match = order_M[slot]
            _add(out[bag], rows[index_M[match]], weight_M[match])
            total += weight_M[match]
            slot += 1
        total_B[bag] = total


@kernel
def _row_products(words):
    n_tokens, width, n_features, n_slots = words[0], words[1], words[2], words[3]
    rows_ND = carray(at(words[4]), (n_tokens, width), float32)
    W_FD = carray(at(words[5]), (n_features, width), float32)
    feature_M, start_N = carray(at(words[6]), n_slots, int32), carray(at(words[7]), n_tokens + 1, int32)
    product_M = carray(at(words[8]), n_slots, float32)
    low, high = _share_of_slots(start_N)
    for token in range(low, high):
        for slot in range(start_N[token], start_N[token + 1]):
            product_M[slot] = product(rows_ND[token], W_FD[feature_M[slot]])


@kernel
def _entries(words):
    n_tokens, width, n_features, n_entries = words[0], words[1], words[2], words[3]
    x_ND, W_FD = carray(at(words[4]), (n_tokens, width), float32), carray(at(words[5]), (n_features, width), float32)
    b_F, index_C = carray(at(words[6]), n_features, float32), carray(at(words[7]), n_entries, int64)
    value_C = carray(at(words[8]), n_entries, float32)
    low, high = share(n_entries)
    for entry in range(low, high):
        token = index_C[entry] // n_features
        feature = index_C[entry] - token * n_features
        value_C[entry] = product(x_ND[token], W_FD[feature]) + b_F[feature]

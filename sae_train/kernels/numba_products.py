"""Products over matches on a CPU: what triton_products.py does on a GPU. Every sum is of fp32 and has a fixed order.

Rows are fp32 or bf16. Letters: M matches, B bags, C candidates, D width, P padded width.
"""

import numpy as np
import torch
from numba import carray, float32, int32, int64, njit, uint16
from torch import Tensor

from sae_train.kernels.numba_team import AHEAD, SUMS, Kernel, at, fetch, number, product, run, share, wide


def bags(rows: Tensor, index_M: Tensor, weight_M: Tensor, start_B: Tensor) -> Tensor:
    """Return the sum of weight * row over each bag's slots [B, D]; see `bags_and_totals`."""
    out = weight_M.new_empty(len(start_B) - 1, rows.shape[1])
    return bags_and_totals(rows, index_M, weight_M, start_B, None, out=out)[0]


def bags_and_totals(
    rows: Tensor,
    index_M: Tensor,
    weight_M: Tensor,
    start_B: Tensor,
    order_M: Tensor | None,
    *,
    out: Tensor,
    square_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of weight * row over each bag's slots [B, D], and of the weights alone [B].

    Args:
        rows: [R, D] fp32 or bf16, or wider: of their columns the first D are read.
        index_M: int32, rows.
        weight_M: fp32.
        start_B: int32 [B + 1].
        order_M: int64; slot i stands for order[i], for itself if None.
        out: [B, D] fp32 to write to.
        square_B: fp32, where to write the squared norms of what is written there.
    """
    n_bags, width = out.shape
    total_B = out.new_empty(n_bags)
    square_B = out.new_empty(0) if square_B is None else square_B
    order_M = index_M.new_empty(0, dtype=torch.int64) if order_M is None else order_M
    given = [each.contiguous() for each in (rows, index_M, weight_M, start_B, order_M)]
    run(
        _BAGS[rows.dtype],
        n_bags,
        width,
        len(rows),
        len(index_M),
        len(order_M),
        *given,
        out,
        total_B,
        square_B,
        len(square_B),
        rows.shape[1],
    )
    return out, total_B


def row_products(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's product of its token's row and its feature's row of W [M] in fp32, 0 in unused slots.

    Args:
        rows_ND: fp32 or bf16.
        W_FD: alike.
    """
    product_M = rows_ND.new_zeros(len(feature_M), dtype=torch.float32)
    given = [each.contiguous() for each in (rows_ND, W_FD, feature_M, start_N)]
    kernel = _ROW_PRODUCTS[rows_ND.dtype, W_FD.dtype]
    run(kernel, len(rows_ND), rows_ND.shape[1], len(W_FD), len(feature_M), *given, product_M)
    return product_M


def entries(x_NP: Tensor, W_FP: Tensor, b_F: Tensor, index_C: Tensor, *, width: int) -> Tensor:
    """Return the entries of x W^T + b at flat indices [C] int64, fp32.

    Args:
        x_NP: fp32 or bf16; of its columns the first `width` are read.
        W_FP: alike.
        b_F: fp32.
        index_C: ascending.
    """
    value_C = b_F.new_empty(len(index_C))
    given = [each.contiguous() for each in (x_NP, W_FP, b_F, index_C)]
    kernel = _ENTRIES[x_NP.dtype, W_FP.dtype]
    run(kernel, len(x_NP), width, len(W_FP), len(index_C), x_NP.shape[1], W_FP.shape[1], *given, value_C)
    return value_C


@njit
def share_of_slots(start_B):
    """Return lo, hi of this thread's bags: those that begin in its part of the slots."""
    n_bags = len(start_B) - 1
    low, high = share(start_B[n_bags])
    first = np.searchsorted(start_B[:n_bags], low)
    last = n_bags if high == start_B[n_bags] else np.searchsorted(start_B[:n_bags], high)
    return first, last


@njit(fastmath={"contract"})
def _add(out_D, row_D, weight):
    wide()
    for d in range(len(out_D)):
        out_D[d] += weight * number(row_D[d])


@njit(fastmath={"contract"})
def _add_four(out_D, rows, row_4, weight_4):
    """Do what `_add` does four times, one after the other; what they add to is read and written once."""
    wide()
    a_D, b_D, c_D, d_D = rows[row_4[0]], rows[row_4[1]], rows[row_4[2]], rows[row_4[3]]
    a, b, c, d = weight_4
    for i in range(len(out_D)):
        first = (out_D[i] + a * number(a_D[i])) + b * number(b_D[i])
        out_D[i] = (first + c * number(c_D[i])) + d * number(d_D[i])


@njit
def _bags(words, dtype):
    n_bags, width, n_rows, n_slots, n_ordered = words[0], words[1], words[2], words[3], words[4]
    rows = carray(at(words[5]), (n_rows, words[14]), dtype)
    index_M, weight_M = carray(at(words[6]), n_slots, int32), carray(at(words[7]), n_slots, float32)
    start_B, order_M = carray(at(words[8]), n_bags + 1, int32), carray(at(words[9]), n_ordered, int64)
    out, total_B = carray(at(words[10]), (n_bags, width), float32), carray(at(words[11]), n_bags, float32)
    square_B = carray(at(words[12]), words[13], float32)
    low, high = share_of_slots(start_B)
    is_ordered = n_ordered > 0
    for bag in range(low, high):
        out[bag] = 0
        total = float32(0)
        slot, end = int64(start_B[bag]), start_B[bag + 1]
        while slot + 4 <= end:
            a, b, c, d = slot, slot + 1, slot + 2, slot + 3
            if is_ordered:
                a, b, c, d = order_M[a], order_M[b], order_M[c], order_M[d]
            weights = weight_M[a], weight_M[b], weight_M[c], weight_M[d]
            if slot + AHEAD + 4 <= n_slots:
                for ahead in range(slot + AHEAD, slot + AHEAD + 4):
                    fetch(rows[index_M[order_M[ahead] if is_ordered else ahead], :width])
            _add_four(out[bag], rows, (index_M[a], index_M[b], index_M[c], index_M[d]), weights)
            total = (((total + weights[0]) + weights[1]) + weights[2]) + weights[3]
            slot += 4
        while slot < end:
            match = order_M[slot] if is_ordered else slot
            _add(out[bag], rows[index_M[match]], weight_M[match])
            total += weight_M[match]
            slot += 1
        total_B[bag] = total
        if len(square_B) > 0:
            square_B[bag] = product(out[bag], out[bag])


@Kernel
def _bags_fp32(words):
    _bags(words, float32)


@Kernel
def _bags_bf16(words):
    _bags(words, uint16)


@njit(fastmath=SUMS)
def _four_products(x_D, a_D, b_D, c_D, d_D):
    """Return the products of one row with four, whose sums have the same order: places among the four are alike."""
    wide()
    a, b, c, d = float32(0), float32(0), float32(0), float32(0)
    for i in range(len(x_D)):
        x = number(x_D[i])
        a += x * number(a_D[i])
        b += x * number(b_D[i])
        c += x * number(c_D[i])
        d += x * number(d_D[i])
    return a, b, c, d


@njit
def _row_products(words, dtype):
    n_tokens, width, n_features, n_slots = words[0], words[1], words[2], words[3]
    rows_ND, W_FD = carray(at(words[4]), (n_tokens, width), dtype), carray(at(words[5]), (n_features, width), dtype)
    feature_M, start_N = carray(at(words[6]), n_slots, int32), carray(at(words[7]), n_tokens + 1, int32)
    product_M = carray(at(words[8]), n_slots, float32)
    low, high = share_of_slots(start_N)
    for token in range(low, high):
        slot, end = start_N[token], start_N[token + 1]
        while slot < end:  # by fours, of which the last are repeated where there are fewer
            last = min(slot + 3, end - 1)
            b, c = min(slot + 1, last), min(slot + 2, last)
            rows = W_FD[feature_M[slot]], W_FD[feature_M[b]], W_FD[feature_M[c]], W_FD[feature_M[last]]
            found = _four_products(rows_ND[token], *rows)
            product_M[slot], product_M[b], product_M[c], product_M[last] = found
            slot = last + 1


@Kernel
def _row_products_fp32(words):
    _row_products(words, float32)


@Kernel
def _row_products_bf16(words):
    _row_products(words, uint16)


@njit
def _entries(words, dtype):
    n_tokens, width, n_features, n_entries = words[0], words[1], words[2], words[3]
    x_NP, W_FP = carray(at(words[6]), (n_tokens, words[4]), dtype), carray(at(words[7]), (n_features, words[5]), dtype)
    b_F, index_C = carray(at(words[8]), n_features, float32), carray(at(words[9]), n_entries, int64)
    value_C = carray(at(words[10]), n_entries, float32)
    low, high = share(n_entries)
    entry = low
    while entry < high:  # as in `_row_products`
        token = index_C[entry] // n_features
        before, last = token * n_features, min(entry + 3, high - 1)
        while index_C[last] >= before + n_features:
            last -= 1
        a, b, c, d = entry, min(entry + 1, last), min(entry + 2, last), last
        i, j, k, m = index_C[a] - before, index_C[b] - before, index_C[c] - before, index_C[d] - before
        rows = W_FP[i, :width], W_FP[j, :width], W_FP[k, :width], W_FP[m, :width]
        if entry + AHEAD + 4 <= n_entries:
            for ahead in range(entry + AHEAD, entry + AHEAD + 4):
                fetch(W_FP[index_C[ahead] % n_features, :width])
        found = _four_products(x_NP[token, :width], *rows)
        value_C[a], value_C[b], value_C[c] = found[0] + b_F[i], found[1] + b_F[j], found[2] + b_F[k]
        value_C[d] = found[3] + b_F[m]
        entry = last + 1


@Kernel
def _entries_fp32(words):
    _entries(words, float32)


@Kernel
def _entries_bf16(words):
    _entries(words, uint16)


_BAGS = {torch.float32: _bags_fp32, torch.bfloat16: _bags_bf16}
_ROW_PRODUCTS = {(torch.float32,) * 2: _row_products_fp32, (torch.bfloat16,) * 2: _row_products_bf16}
_ENTRIES = {(torch.float32,) * 2: _entries_fp32, (torch.bfloat16,) * 2: _entries_bf16}

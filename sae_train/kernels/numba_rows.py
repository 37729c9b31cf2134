"""Rows in bf16, with what rounding took from them: the twin of screen.py's `rounded_rows`.

A row is summed in the same order whatever the threads. Letters: R rows, D width, T threads.
"""

import numpy as np
import torch
from numba import carray, float32, njit, uint16, uint32
from torch import Tensor

from sae_train.kernels.numba_team import SUMS, at, kernel, run, share, thread


def rounded(rows_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 rows in bf16 [R, D], their norms [R], and the norms of what rounding took from them [R]."""
    n_rows, width = rows_RD.shape
    bf16_RD = rows_RD.new_empty(n_rows, width, dtype=torch.bfloat16)
    norm_R, missed_R = rows_RD.new_empty(n_rows), rows_RD.new_empty(n_rows)
    n_threads = torch.get_num_threads()
    kept_TD = torch.empty(n_threads, width, dtype=torch.int32)
    run(_rounded, n_rows, width, rows_RD.contiguous(), bf16_RD, norm_R, missed_R, n_threads, kept_TD)
    return bf16_RD, norm_R, missed_R


@njit
def _round(bits_D, kept_D, bf16_D):
    """Round to the nearest bf16, ties to even; a NaN stays one."""
    for d in range(len(bits_D)):
        bits = bits_D[d]
        rounded = uint32(bits + uint32(0x7FFF) + (uint32(bits >> uint32(16)) & uint32(1))) & uint32(0xFFFF0000)
        rounded = uint32(0x7FC00000) if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000) else rounded
        kept_D[d] = rounded
        bf16_D[d] = rounded >> uint32(16)


@njit(fastmath=SUMS)
def _norms(row_D, kept_D):
    square, missed = float32(0), float32(0)
    for d in range(len(row_D)):
        square += row_D[d] * row_D[d]
        missed += (row_D[d] - kept_D[d]) * (row_D[d] - kept_D[d])
    return np.sqrt(square), np.sqrt(missed)


@kernel
def _rounded(words):
    shape = (words[0], words[1])
    row_RD, bits_RD = carray(at(words[2]), shape, float32), carray(at(words[2]), shape, uint32)
    bf16_RD = carray(at(words[3]), shape, uint16)
    norm_R, missed_R = carray(at(words[4]), shape[0], float32), carray(at(words[5]), shape[0], float32)
    kept_D = carray(at(words[7]), (words[6], shape[1]), uint32)[thread()]
    numbers_D = carray(at(words[7]), (words[6], shape[1]), float32)[thread()]
    low, high = share(shape[0])
    for row in range(low, high):
        _round(bits_RD[row], kept_D, bf16_RD[row])
        norm_R[row], missed_R[row] = _norms(row_RD[row], numbers_D)

"""Rows in bf16, with what rounding took from them: the twin of screen.py's `rounded_rows`; and the twins of rows.py.

A row is summed in the same order whatever the threads. Letters: R rows, D width, P padded width, T threads, C chunks.
"""

import numpy as np
import torch
from numba import carray, float32, int64, njit, uint16, uint32
from torch import Tensor

from sae_train.kernels.numba_team import (
    AHEAD,
    SUMS,
    Kernel,
    at,
    bits_of,
    fetch,
    number,
    product,
    run,
    share,
    team,
    thread,
    wide,
)  # fmt: skip


def rounded(rows_RD: Tensor, last_R: Tensor, *, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 rows in bf16 [R, P], their norms [R], and the norms of what rounding took from them [R].

    Args:
        last_R: fp32, what stands behind each row; behind it are zeros.
        padded: P, more than D.
    """
    n_rows, width = rows_RD.shape
    bf16_RP = rows_RD.new_empty(n_rows, padded, dtype=torch.bfloat16)
    norm_R, missed_R = rows_RD.new_empty(n_rows), rows_RD.new_empty(n_rows)
    n_threads = torch.get_num_threads()
    kept_TD = torch.empty(n_threads, width, dtype=torch.int32)
    given = rows_RD.contiguous(), last_R.contiguous(), bf16_RP
    run(_rounded, n_rows, width, padded, *given, norm_R, missed_R, n_threads, kept_TD)
    return bf16_RP, norm_R, missed_R


def bf16(rows_RD: Tensor) -> Tensor:
    """Return fp32 rows in bf16 [R, D]."""
    bf16_RD = torch.empty_like(rows_RD, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    run(_bf16, *rows_RD.shape, rows_RD.contiguous(), bf16_RD)
    return bf16_RD


def normalised(address_N: Tensor, centre_D: Tensor, scale: float, *, are_bf16: bool) -> Tensor:
    """Return the rows at these addresses less a centre, over a scale [N, D] fp32; see Table.normalised.

    The caller keeps the rows alive; each is `len(centre_D)` numbers of fp32 or bf16.
    """
    out_ND, scale_1 = centre_D.new_empty(len(address_N), len(centre_D)), torch.tensor([scale], dtype=torch.float32)
    given = address_N, centre_D.contiguous(), scale_1, out_ND
    run(_normalised, len(address_N), len(centre_D), int(are_bf16), *given)
    return out_ND


def missed(x_ND: Tensor, x_hat: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return x - (x_hat + bias) [..., N, D], and the norms of its rows [..., N]; fp32, see rows.missed."""
    error, norm = torch.empty_like(x_hat), x_hat.new_empty(x_hat.shape[:-1])
    run(_missed, len(x_ND), x_ND.shape[1], norm.numel(), x_ND, x_hat, bias_D.contiguous(), error, norm)
    return error, norm


def scaled_and_sums(rows: Tensor, factor: float, *, together: int) -> tuple[Tensor, Tensor]:
    """Return rows [..., D] times a factor, and of that the sums of every so many rows [C, D]; fp32."""
    rows, width = rows.contiguous(), rows.shape[-1]
    n_rows = rows[..., 0].numel()
    scaled, sum_CD = torch.empty_like(rows), rows.new_empty(-(-n_rows // together), width)
    factor_1 = torch.tensor([factor], dtype=torch.float32)
    run(_scaled_and_sums, n_rows, width, len(sum_CD), together, rows, factor_1, scaled, sum_CD)
    return scaled, sum_CD


def norms_and_sums(x_RD: Tensor, *, together: int) -> tuple[Tensor, Tensor]:
    """Return the norms of rows [R], and the sums of every so many rows that stand together [C, D]; fp32."""
    n_rows, width = x_RD.shape
    n_chunks = -(-n_rows // together)
    norm_R, sum_CD = x_RD.new_empty(n_rows), x_RD.new_empty(n_chunks, width)
    run(_norms_and_sums, n_rows, width, n_chunks, together, x_RD.contiguous(), norm_R, sum_CD)
    return norm_R, sum_CD


def errors(
    x: tuple[Tensor, Tensor],
    W: tuple[Tensor, Tensor],
    b_F: Tensor,
    *,
    bounds: tuple[float, float],
    are_rounded: bool,
) -> tuple[Tensor, Tensor]:
    """Return how far near pre-activations are from exact ones at most, of each token [N] and feature [F]; fp32.

    Args:
        x: norms of rows [N], and of what rounding took from them [N].
        W: alike [F].
        bounds: of the roundoff of a sum, relative to its magnitudes; and of summands too small for AMX.
        are_rounded: whether exact ones are of rounded rows.
    """
    error_N, error_F = torch.empty_like(x[0]), torch.empty_like(W[0])
    given = (*x, *W, b_F.contiguous(), torch.tensor(bounds, dtype=torch.float32))
    run(_errors, len(error_N), len(error_F), int(are_rounded), *given, error_N, error_F)
    return error_N, error_F


@njit
def nearest(bits):
    """Return the bits of the nearest bf16 as an fp32, ties to even; a NaN stays one."""
    rounded = uint32(bits + uint32(0x7FFF) + (uint32(bits >> uint32(16)) & uint32(1))) & uint32(0xFFFF0000)
    return uint32(0x7FC00000) if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000) else rounded


@njit
def _round(bits_D, kept_D, bf16_P):
    wide()
    for d in range(len(bits_D)):
        kept_D[d] = nearest(bits_D[d])
        bf16_P[d] = kept_D[d] >> uint32(16)


@njit
def round_alone(bits_D, bf16_D):
    """Write a row, given as its bits, in bf16."""
    wide()
    for d in range(len(bits_D)):
        bf16_D[d] = nearest(bits_D[d]) >> uint32(16)


@Kernel
def _bf16(words):
    bits_RD = carray(at(words[2]), (words[0], words[1]), uint32)
    bf16_RD = carray(at(words[3]), (words[0], words[1]), uint16)
    low, high = share(words[0])
    for row in range(low, high):
        round_alone(bits_RD[row], bf16_RD[row])


@njit(fastmath=SUMS)
def _norms(row_D, kept_D):
    wide()
    square, missed = float32(0), float32(0)
    for d in range(len(row_D)):
        square += row_D[d] * row_D[d]
        missed += (row_D[d] - kept_D[d]) * (row_D[d] - kept_D[d])
    return np.sqrt(square), np.sqrt(missed)


@njit
def round_row(row_D, bits_D, kept_D, bits_kept_D, bf16_P):
    """Write a row in bf16, and zeros behind it.

    Args:
        row_D: the row.
        bits_D: the same as bits.
        kept_D: scratch, for what is left of the row.
        bits_kept_D: the same as bits.

    Returns:
        Its norm, and the norm of what rounding took from it.
    """
    _round(bits_D, bits_kept_D, bf16_P)
    for place in range(len(row_D), len(bf16_P)):
        bf16_P[place] = 0
    return _norms(row_D, kept_D)


@Kernel
def _rounded(words):
    n_rows, width, padded = words[0], words[1], words[2]
    row_RD, bits_RD = carray(at(words[3]), (n_rows, width), float32), carray(at(words[3]), (n_rows, width), uint32)
    last_R, bf16_RP = carray(at(words[4]), n_rows, uint32), carray(at(words[5]), (n_rows, padded), uint16)
    norm_R, missed_R = carray(at(words[6]), n_rows, float32), carray(at(words[7]), n_rows, float32)
    bits_kept_D = carray(at(words[9]), (words[8], width), uint32)[thread()]
    kept_D = carray(at(words[9]), (words[8], width), float32)[thread()]
    low, high = share(n_rows)
    for row in range(low, high):
        norm_R[row], missed_R[row] = round_row(row_RD[row], bits_RD[row], kept_D, bits_kept_D, bf16_RP[row])
        bf16_RP[row, width] = nearest(last_R[row]) >> uint32(16)


@njit(error_model="numpy")  # nothing is raised, so that the loop vectorises
def _normalise(row_D, centre_D, scale, out_D):
    wide()
    for d in range(len(row_D)):
        out_D[d] = (number(row_D[d]) - centre_D[d]) / scale


@njit
def _normalise_share(address_N, form, centre_D, scale, out_ND):
    """Normalise this thread's share of the rows at these addresses, of numbers of that form."""
    low, high = share(len(address_N))
    for token in range(low, high):
        if token + AHEAD < high:
            fetch(carray(at(address_N[token + AHEAD]), len(centre_D), form))
        _normalise(carray(at(address_N[token]), len(centre_D), form), centre_D, scale, out_ND[token])


@Kernel
def _normalised(words):
    n_tokens, width = words[0], words[1]
    address_N = carray(at(words[3]), n_tokens, int64)
    centre_D, scale = carray(at(words[4]), width, float32), carray(at(words[5]), 1, float32)[0]
    out_ND = carray(at(words[6]), (n_tokens, width), float32)
    if words[2]:
        _normalise_share(address_N, uint16, centre_D, scale, out_ND)
    else:
        _normalise_share(address_N, float32, centre_D, scale, out_ND)


@njit(fastmath=SUMS)
def _miss(x_D, x_hat_D, bias_D, error_D):
    """Write what is missed, and return the sum of its squares."""
    wide()
    total = float32(0)
    for d in range(len(x_D)):
        error = x_D[d] - (x_hat_D[d] + bias_D[d])
        error_D[d] = error
        total += error * error
    return total


@Kernel
def _missed(words):
    n_tokens, width, n_rows = words[0], words[1], words[2]
    x_ND, x_hat_RD = carray(at(words[3]), (n_tokens, width), float32), carray(at(words[4]), (n_rows, width), float32)
    error_RD, norm_R = carray(at(words[6]), (n_rows, width), float32), carray(at(words[7]), n_rows, float32)
    bias_D = carray(at(words[5]), width, float32)
    low, high = share(n_rows)
    for row in range(low, high):
        norm_R[row] = np.sqrt(_miss(x_ND[row % n_tokens], x_hat_RD[row], bias_D, error_RD[row]))


@njit
def _add(sum_D, row_D):
    wide()
    for d in range(len(row_D)):
        sum_D[d] += row_D[d]


@njit
def _scale(row_D, factor, scaled_D):
    wide()
    for d in range(len(row_D)):
        scaled_D[d] = factor * row_D[d]


@Kernel
def _scaled_and_sums(words):
    n_rows, width, n_chunks, together = words[0], words[1], words[2], words[3]
    row_RD, factor = carray(at(words[4]), (n_rows, width), float32), carray(at(words[5]), 1, float32)[0]
    scaled_RD, sum_CD = carray(at(words[6]), (n_rows, width), float32), carray(at(words[7]), (n_chunks, width), float32)
    low, high = share(n_chunks)
    for chunk in range(low, high):
        sum_CD[chunk] = 0
        for row in range(chunk * together, min((chunk + 1) * together, n_rows)):
            _scale(row_RD[row], factor, scaled_RD[row])
            _add(sum_CD[chunk], scaled_RD[row])


@Kernel
def _norms_and_sums(words):
    n_rows, width, n_chunks, together = words[0], words[1], words[2], words[3]
    x_RD, norm_R = carray(at(words[4]), (n_rows, width), float32), carray(at(words[5]), n_rows, float32)
    sum_CD = carray(at(words[6]), (n_chunks, width), float32)
    low, high = share(n_chunks)
    for chunk in range(low, high):
        sum_CD[chunk] = 0
        for row in range(chunk * together, min((chunk + 1) * together, n_rows)):
            norm_R[row] = np.sqrt(product(x_RD[row], x_RD[row]))
            _add(sum_CD[chunk], x_RD[row])


@njit
def _largest(number_R):
    """Return the largest of numbers none of which is negative, or NaN if there is one: their bits are in order."""
    wide()
    largest = uint32(0)
    for row in range(len(number_R)):
        largest = max(largest, bits_of(number_R[row]))
    return number(largest)


@njit
def _largest_bias_error(b_F, bits_F, of_sums):
    wide()
    largest = uint32(0)
    for feature in range(len(b_F)):
        largest = max(largest, bits_of(_bias_error(b_F[feature], bits_F[feature], of_sums)))
    return number(largest)


@njit
def _bias_error(bias, bits, of_sums):
    """Return what the rounding of a bias, given as its bits, too, and of the sum that it is in, may come to."""
    near = number(uint16(nearest(bits) >> uint32(16)))
    return abs(bias - near) + of_sums * abs(near)


@njit
def _error(norm_x, missed_x, norm_W, missed_W, of_sums, tiny, are_rounded):
    """Return the bound that screen.screened explains, but for the bias."""
    rounded_x, rounded_W = norm_x + missed_x, norm_W + missed_W
    if are_rounded:
        missed_x, missed_W = float32(0), float32(0)
    sums = of_sums * rounded_x * rounded_W
    return missed_x * rounded_W + norm_x * missed_W + sums + tiny * (float32(1) + rounded_x + rounded_W)


@Kernel
def _errors(words):
    n_tokens, n_features, are_rounded = words[0], words[1], words[2] != 0
    norm_N, missed_N = carray(at(words[3]), n_tokens, float32), carray(at(words[4]), n_tokens, float32)
    norm_F, missed_F = carray(at(words[5]), n_features, float32), carray(at(words[6]), n_features, float32)
    b_F, bits_F = carray(at(words[7]), n_features, float32), carray(at(words[7]), n_features, uint32)
    of_sums, tiny = carray(at(words[8]), 2, float32)[0], carray(at(words[8]), 2, float32)[1]
    error_N, error_F = carray(at(words[9]), n_tokens, float32), carray(at(words[10]), n_features, float32)
    if thread() == 0:
        most = _largest(norm_N), _largest(missed_N)
        for feature in range(n_features):
            error = _error(most[0], most[1], norm_F[feature], missed_F[feature], of_sums, tiny, are_rounded)
            error_F[feature] = error + _bias_error(b_F[feature], bits_F[feature], of_sums)
    if thread() == team() - 1:
        most, bias = (_largest(norm_F), _largest(missed_F)), _largest_bias_error(b_F, bits_F, of_sums)
        for token in range(n_tokens):
            error = _error(norm_N[token], missed_N[token], most[0], most[1], of_sums, tiny, are_rounded)
            error_N[token] = error + bias

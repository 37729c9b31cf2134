"""Adam on rows that stay on the unit sphere, on a CPU: what triton_adam.py does on a GPU, under the same names.

Gradient and weight are read once for what clipping wants to know, then everything moves once. A row's sums have an
order of their own, whatever the threads.
"""

import numpy as np
import torch
from numba import carray, float32, njit, uint16, uint32
from torch import Tensor

from sae_train.kernels.numba_rows import round_alone, round_row
from sae_train.kernels.numba_team import SUMS, Kernel, at, product, run, share, thread, wide


def along_rows(gradient_FD: Tensor, weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each gradient's component along its unit row [F], and the squared norm of the rest of it [F]; fp32."""
    n_rows, width = weight_FD.shape
    along_F, square_F = weight_FD.new_empty(n_rows), weight_FD.new_empty(n_rows)
    run(_along_rows, n_rows, width, gradient_FD.contiguous(), weight_FD, along_F, square_F)
    return along_F, square_F


def squares(rows_FD: Tensor) -> Tensor:
    """Return the squared norm of each row [F]; fp32."""
    n_rows, width = rows_FD.shape
    square_F = rows_FD.new_empty(n_rows)
    run(_squares, n_rows, width, rows_FD.contiguous(), square_F)
    return square_F


def move(
    weight_FD: Tensor,
    gradient_FD: Tensor,
    along_F: Tensor,
    mean_FD: Tensor,
    square_FD: Tensor,
    *,
    step: Tensor,
    scale: Tensor | None,
    halted: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    rounded_FD: Tensor | None = None,
) -> None:
    """Update unit rows and their moments in place; see triton_adam.move.

    Args:
        rounded_FD: bf16, where to write the rows in that, unless halted.
    """
    torch.autograd.graph.increment_version((weight_FD, mean_FD, square_FD))  # as updates in place do
    if bool(halted):
        return
    n_rows, width = weight_FD.shape
    rounded_FD = torch.empty(0, width, dtype=torch.bfloat16) if rounded_FD is None else rounded_FD
    given = weight_FD, gradient_FD.contiguous(), along_F, mean_FD, square_FD, rounded_FD
    run(_move, n_rows, width, len(rounded_FD), *given, _numbers(step, scale, lr, beta1, beta2, eps))


def move_free(
    weight_FD: Tensor,
    gradient_FD: Tensor,
    mean_FD: Tensor,
    square_FD: Tensor,
    *,
    step: Tensor,
    scale: Tensor | None,
    halted: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    rounded: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Update rows of any norm and their moments in place, as `move` does its rows.

    Args:
        rounded: what numba_rows.rounded returned, to write to, all but what stands behind the rows; unless halted.
    """
    torch.autograd.graph.increment_version((weight_FD, mean_FD, square_FD))
    if bool(halted):
        return
    n_rows, width = weight_FD.shape
    rounded = rounded or (weight_FD.new_empty(n_rows, 0), *weight_FD.new_empty(2, 0))
    n_threads = torch.get_num_threads()
    kept_TD = torch.empty(n_threads, width, dtype=torch.int32)
    given = weight_FD, gradient_FD.contiguous(), mean_FD, square_FD, *rounded
    numbers = _numbers(step, scale, lr, beta1, beta2, eps)
    run(_move_free, n_rows, width, rounded[0].shape[1], n_threads, kept_TD, *given, numbers)


def _numbers(step: Tensor, scale: Tensor | None, lr: float, beta1: float, beta2: float, eps: float) -> Tensor:
    """Return what `_move_row` wants to know."""
    unbias, root_unbias = 1 - beta1 ** float(step), (1 - beta2 ** float(step)) ** 0.5
    divisor = 1.0 if scale is None else float(scale)
    return torch.tensor(
        [lr / unbias, root_unbias, divisor, beta1, 1 - beta1, beta2, 1 - beta2, eps], dtype=torch.float32
    )


@njit(fastmath=SUMS)
def _square_beside(gradient_D, weight_D, along):
    wide()
    total = float32(0)
    for d in range(len(weight_D)):
        rest = gradient_D[d] - along * weight_D[d]
        total += rest * rest
    return total


@njit
def split(gradient_D, weight_D):
    """Return a gradient's component along its unit row, and the squared norm of the rest of it."""
    along = product(gradient_D, weight_D)
    return along, _square_beside(gradient_D, weight_D, along)


@Kernel
def _along_rows(words):
    shape = (words[0], words[1])
    gradient_FD, weight_FD = carray(at(words[2]), shape, float32), carray(at(words[3]), shape, float32)
    along_F, square_F = carray(at(words[4]), shape[0], float32), carray(at(words[5]), shape[0], float32)
    low, high = share(shape[0])
    for row in range(low, high):
        along_F[row], square_F[row] = split(gradient_FD[row], weight_FD[row])


@Kernel
def _squares(words):
    rows_FD, square_F = carray(at(words[2]), (words[0], words[1]), float32), carray(at(words[3]), words[0], float32)
    low, high = share(words[0])
    for row in range(low, high):
        square_F[row] = product(rows_FD[row], rows_FD[row])


@njit(error_model="numpy", fastmath={"contract"})  # nothing is raised, so that loops vectorise
def _move_row(weight_D, gradient_D, along, mean_D, square_D, number_I):
    step_size, root_unbias, divisor = number_I[0], number_I[1], number_I[2]
    beta1, rest1, beta2, rest2, eps = number_I[3], number_I[4], number_I[5], number_I[6], number_I[7]
    for d in range(len(weight_D)):
        gradient = (gradient_D[d] - along * weight_D[d]) / divisor
        mean = beta1 * mean_D[d] + rest1 * gradient
        square = beta2 * square_D[d] + rest2 * gradient * gradient
        mean_D[d], square_D[d] = mean, square
        weight_D[d] -= step_size * (mean / (np.sqrt(square) / root_unbias + eps))


@njit(error_model="numpy")
def _divide(row_D, divisor):
    for d in range(len(row_D)):
        row_D[d] /= divisor


@Kernel
def _move(words):
    shape = (words[0], words[1])
    weight_FD, gradient_FD = carray(at(words[3]), shape, float32), carray(at(words[4]), shape, float32)
    along_F, number_I = carray(at(words[5]), shape[0], float32), carray(at(words[9]), 8, float32)
    mean_FD, square_FD = carray(at(words[6]), shape, float32), carray(at(words[7]), shape, float32)
    bits_FD, rounded_FD = carray(at(words[3]), shape, uint32), carray(at(words[8]), (words[2], shape[1]), uint16)
    low, high = share(shape[0])
    for row in range(low, high):
        _move_row(weight_FD[row], gradient_FD[row], along_F[row], mean_FD[row], square_FD[row], number_I)
        norm = np.sqrt(product(weight_FD[row], weight_FD[row]))
        if norm > 0:
            _divide(weight_FD[row], norm)
        if len(rounded_FD) > 0:
            round_alone(bits_FD[row], rounded_FD[row])


@Kernel
def _move_free(words):
    shape = (words[0], words[1])
    weight_FD, gradient_FD = carray(at(words[5]), shape, float32), carray(at(words[6]), shape, float32)
    mean_FD, square_FD = carray(at(words[7]), shape, float32), carray(at(words[8]), shape, float32)
    bits_FD, bf16_FP = carray(at(words[5]), shape, uint32), carray(at(words[9]), (shape[0], words[2]), uint16)
    norm_F, missed_F = carray(at(words[10]), shape[0], float32), carray(at(words[11]), shape[0], float32)
    number_I = carray(at(words[12]), 8, float32)
    bits_kept_D = carray(at(words[4]), (words[3], shape[1]), uint32)[thread()]
    kept_D = carray(at(words[4]), (words[3], shape[1]), float32)[thread()]
    low, high = share(shape[0])
    for row in range(low, high):
        _move_row(weight_FD[row], gradient_FD[row], float32(0), mean_FD[row], square_FD[row], number_I)
        if bf16_FP.shape[1] > 0:
            norm_F[row], missed_F[row] = round_row(weight_FD[row], bits_FD[row], kept_D, bits_kept_D, bf16_FP[row])

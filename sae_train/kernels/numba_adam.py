"""Adam on rows that stay on the unit sphere, on a CPU: what triton_adam.py does on a GPU, under the same names.

Gradient and weight are read once for what clipping wants to know, then everything moves once. A row's sums have an
order of their own, whatever the threads.
"""

import numpy as np
import torch
from numba import carray, float32, njit
from torch import Tensor

from sae_train.kernels.numba_team import SUMS, Kernel, at, product, run, share, wide


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
) -> None:
    """Update unit rows and their moments in place; see triton_adam.move."""
    torch.autograd.graph.increment_version((weight_FD, mean_FD, square_FD))  # as torch's own updates in place do
    if bool(halted):
        return
    n_rows, width = weight_FD.shape
    unbias, root_unbias = 1 - beta1 ** float(step), (1 - beta2 ** float(step)) ** 0.5
    divisor = 1.0 if scale is None else float(scale)
    number_I = torch.tensor(
        [lr / unbias, root_unbias, divisor, beta1, 1 - beta1, beta2, 1 - beta2, eps], dtype=torch.float32
    )
    run(_move, n_rows, width, weight_FD, gradient_FD.contiguous(), along_F, mean_FD, square_FD, number_I)


@njit(fastmath=SUMS)
def _square_beside(gradient_D, weight_D, along):
    wide()
    total = float32(0)
    for d in range(len(weight_D)):
        rest = gradient_D[d] - along * weight_D[d]
        total += rest * rest
    return total


@Kernel
def _along_rows(words):
    shape = (words[0], words[1])
    gradient_FD, weight_FD = carray(at(words[2]), shape, float32), carray(at(words[3]), shape, float32)
    along_F, square_F = carray(at(words[4]), shape[0], float32), carray(at(words[5]), shape[0], float32)
    low, high = share(shape[0])
    for row in range(low, high):
        along_F[row] = product(gradient_FD[row], weight_FD[row])
        square_F[row] = _square_beside(gradient_FD[row], weight_FD[row], along_F[row])


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
    weight_FD, gradient_FD = carray(at(words[2]), shape, float32), carray(at(words[3]), shape, float32)
    along_F, number_I = carray(at(words[4]), shape[0], float32), carray(at(words[7]), 8, float32)
    mean_FD, square_FD = carray(at(words[5]), shape, float32), carray(at(words[6]), shape, float32)
    low, high = share(shape[0])
    for row in range(low, high):
        _move_row(weight_FD[row], gradient_FD[row], along_F[row], mean_FD[row], square_FD[row], number_I)
        norm = np.sqrt(product(weight_FD[row], weight_FD[row]))
        if norm > 0:
            _divide(weight_FD[row], norm)

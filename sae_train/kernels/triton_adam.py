"""Adam on rows that stay on the unit sphere, as Triton kernels: projection, clipping, update, renormalisation.

Clipping needs the norm of every gradient before the first weight may move, so there are two passes. `along_rows` reads
gradient and weight once. `move` reads gradient, weight and moments once and writes weight and moments once. A program
holds one row. The formula is torch's fused Adam (arXiv 1412.6980, algorithm 1; eps is added to the corrected
root). No GPU has measured the speed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def along_rows(gradient_FD: Tensor, weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each gradient's component along its unit row [F], and the squared norm of the rest of it [F]; fp32.

    The projected gradient itself is not written anywhere. For an example see unit_rows.py.
    """
    (n_rows, width), block = weight_FD.shape, triton.next_power_of_2(weight_FD.shape[1])
    along_F, square_F = weight_FD.new_empty(n_rows), weight_FD.new_empty(n_rows)
    with torch.cuda.device_of(weight_FD):
        _along_kernel[(n_rows,)](
            gradient_FD.contiguous(), weight_FD, along_F, square_F, width, BLOCK=block, num_warps=8
        )
    return along_F, square_F


def move(
    weight_FD: Tensor, gradient_FD: Tensor, along_F: Tensor, mean_FD: Tensor, square_FD: Tensor, *, step: Tensor,
    scale: Tensor | None, halted: Tensor, lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Update unit rows and their moments in place, all fp32 and contiguous; `move_unit_rows` has the arguments.

    Args:
        step: count on the device, this step included.
    """
    (n_rows, width), block = weight_FD.shape, triton.next_power_of_2(weight_FD.shape[1])
    unbias_2 = torch.stack([1 - beta1 ** step.double(), (1 - beta2 ** step.double()).sqrt()]).float()
    with torch.cuda.device_of(weight_FD):
        _move_kernel[(n_rows,)](
            weight_FD, gradient_FD.contiguous(), along_F, mean_FD, square_FD,
            unbias_2, unbias_2 if scale is None else scale.float(), halted.int(), lr, width,
            BETA1=beta1, REST1=1 - beta1, BETA2=beta2, REST2=1 - beta2, EPS=eps, SCALED=scale is not None,
            BLOCK=block, num_warps=8,
        )  # fmt: skip
    torch.autograd.graph.increment_version((weight_FD, mean_FD, square_FD))  # as torch's own updates in place do


@triton.jit
def _along_kernel(gradients, weights, alongs, squares, width, BLOCK: tl.constexpr):
    """Split one row's gradient."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * width + column
    gradient = tl.load(gradients + at, mask=column < width, other=0.0)
    weight = tl.load(weights + at, mask=column < width, other=0.0)
    along = tl.sum(gradient * weight, 0)
    rest = gradient - along * weight
    tl.store(alongs + row, along)
    tl.store(squares + row, tl.sum(rest * rest, 0))


@triton.jit
def _move_kernel(
    weights, gradients, alongs, means, squares, unbias, scales, halted, rate, width, BETA1: tl.constexpr,
    REST1: tl.constexpr, BETA2: tl.constexpr, REST2: tl.constexpr, EPS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Move one row, unless halted. Divisions and roots are rounded to nearest."""
    if tl.load(halted) == 0:
        row = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        at = row.to(tl.int64) * width + column
        scale = 1.0
        if SCALED:
            scale = tl.load(scales)
        weight = tl.load(weights + at, mask=inside, other=0.0)
        gradient = tl.load(gradients + at, mask=inside, other=0.0)
        gradient = tl.div_rn(gradient - tl.load(alongs + row) * weight, scale)
        mean = BETA1 * tl.load(means + at, mask=inside, other=0.0) + REST1 * gradient
        square = tl.load(squares + at, mask=inside, other=1.0)  # a root to divide by outside, too
        square = BETA2 * square + REST2 * gradient * gradient
        tl.store(means + at, mean, mask=inside)
        tl.store(squares + at, square, mask=inside)
        root = tl.div_rn(tl.sqrt_rn(square), tl.load(unbias + 1)) + EPS
        moved = weight - tl.div_rn(rate, tl.load(unbias)) * tl.div_rn(mean, root)
        norm = tl.sqrt_rn(tl.sum(moved * moved, 0))
        norm = tl.where(norm > 0, norm, 1.0)
        tl.store(weights + at, tl.div_rn(moved, norm), mask=inside)

"""Adam on rows that stay on the unit sphere, as Triton kernels: projection, clipping, update, renormalisation.

Clipping needs the norm of every gradient before the first weight may move, so there are two passes: `along_rows`
reads gradient and weight once, `move` reads gradient, weight and moments once and writes weight and moments once.
Twins of the methods project_gradient and normalise of TrainableAutoencoder, and of Adam._move, in fp32. The formula is
that of torch's fused Adam (arXiv 1412.6980, algorithm 1; eps is added to the corrected root). Checked interpreted on a
CPU (tests/kernels/test_triton.py); speed is unmeasured.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 8192
"""Columns up to which a row is held in registers; wider ones pass in blocks and are read twice."""


def along_rows(gradient_FD: Tensor, weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each gradient's component along its unit row [F], and the squared norm of the rest of it [F]; fp32.

    The sum of the second is the squared norm of the projected gradient, which is not written anywhere.
    """
    n_rows, width = weight_FD.shape
    along_F, square_F = weight_FD.new_empty(n_rows), weight_FD.new_empty(n_rows)
    with torch.cuda.device_of(weight_FD):
        _along_kernel[(n_rows,)](gradient_FD.contiguous(), weight_FD, along_F, square_F, width, **_tiling(width))
    return along_F, square_F


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
    """Update unit rows and their moments in place; the gradient is left as it is. All fp32, contiguous.

    Args:
        along_F: of `along_rows`; this much of each row is taken off its gradient.
        mean_FD: first moment.
        square_FD: second moment.
        step: count on the device, this step included.
        scale: what gradients are divided by, a scalar on the device; 1 if None.
        halted: scalar bool on the device; where true nothing is changed.
    """
    n_rows, width = weight_FD.shape
    unbias_2 = torch.stack([1 - beta1 ** step.double(), (1 - beta2 ** step.double()).sqrt()]).float()
    with torch.cuda.device_of(weight_FD):
        _move_kernel[(n_rows,)](
            weight_FD, gradient_FD.contiguous(), along_F, mean_FD, square_FD,
            unbias_2, unbias_2 if scale is None else scale.float(), halted.int(), lr, width,
            BETA1=beta1, REST1=1 - beta1, BETA2=beta2, REST2=1 - beta2, EPS=eps, SCALED=scale is not None,
            **_tiling(width),
        )  # fmt: skip
    torch.autograd.graph.increment_version((weight_FD, mean_FD, square_FD))  # as torch's own updates in place do


def _tiling(width: int) -> dict[str, Any]:
    block = min(triton.next_power_of_2(width), WIDEST)
    return {
        "WHOLE": width <= block,
        "BLOCK": block,
        "num_warps": max(1, min(16, block // 256)),
        "enable_fp_fusion": True,
    }


@triton.jit
def _along_kernel(gradients, weights, alongs, squares, width, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Split one row's gradient."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    if WHOLE:
        gradient = tl.load(gradients + at + column, mask=column < width, other=0.0)
        weight = tl.load(weights + at + column, mask=column < width, other=0.0)
        along = tl.sum(gradient * weight, 0)
        rest = gradient - along * weight
        square = tl.sum(rest * rest, 0)
    else:
        tile_sum = tl.zeros([BLOCK], tl.float32)
        for left in range(0, width, BLOCK):
            inside = left + column < width
            gradient = tl.load(gradients + at + left + column, mask=inside, other=0.0)
            tile_sum += gradient * tl.load(weights + at + left + column, mask=inside, other=0.0)
        along = tl.sum(tile_sum, 0)
        tile_sum = tl.zeros([BLOCK], tl.float32)
        for left in range(0, width, BLOCK):
            inside = left + column < width
            gradient = tl.load(gradients + at + left + column, mask=inside, other=0.0)
            rest = gradient - along * tl.load(weights + at + left + column, mask=inside, other=0.0)
            tile_sum += rest * rest
        square = tl.sum(tile_sum, 0)
    tl.store(alongs + row, along)
    tl.store(squares + row, square)


@triton.jit
def _moved(
    weights,
    gradients,
    means,
    squares,
    at,
    inside,
    along,
    scale,
    step_size,
    root_unbias,
    BETA1: tl.constexpr,
    REST1: tl.constexpr,
    BETA2: tl.constexpr,
    REST2: tl.constexpr,
    EPS: tl.constexpr,
):
    """Update the moments at `at` and return the moved weights there, 0 outside; divisions and roots are rounded."""
    weight = tl.load(weights + at, mask=inside, other=0.0)
    gradient = tl.load(gradients + at, mask=inside, other=0.0)
    gradient = tl.div_rn(gradient - along * weight, scale)
    mean = BETA1 * tl.load(means + at, mask=inside, other=0.0) + REST1 * gradient
    square = tl.load(squares + at, mask=inside, other=1.0)  # outside too a root to divide by, whatever eps
    square = BETA2 * square + REST2 * gradient * gradient
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, square, mask=inside)
    root = tl.div_rn(tl.sqrt_rn(square), root_unbias) + EPS
    return weight - step_size * tl.div_rn(mean, root)


@triton.jit
def _move_kernel(
    weights,
    gradients,
    alongs,
    means,
    squares,
    unbias,
    scales,
    halted,
    rate,
    width,
    BETA1: tl.constexpr,
    REST1: tl.constexpr,
    BETA2: tl.constexpr,
    REST2: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move one row, unless halted."""
    if tl.load(halted) == 0:
        row = tl.program_id(0)
        start = row.to(tl.int64) * width
        column = tl.arange(0, BLOCK)
        along = tl.load(alongs + row)
        step_size = tl.div_rn(rate, tl.load(unbias))
        root_unbias = tl.load(unbias + 1)
        scale = 1.0
        if SCALED:
            scale = tl.load(scales)
        if WHOLE:
            inside = column < width
            moved = _moved(
                weights, gradients, means, squares, start + column, inside, along, scale, step_size, root_unbias,
                BETA1, REST1, BETA2, REST2, EPS,
            )  # fmt: skip
            norm = tl.sqrt_rn(tl.sum(moved * moved, 0))
            norm = tl.where(norm > 0, norm, 1.0)
            tl.store(weights + start + column, tl.div_rn(moved, norm), mask=inside)
        else:
            tile_sum = tl.zeros([BLOCK], tl.float32)
            for left in range(0, width, BLOCK):
                inside = left + column < width
                moved = _moved(
                    weights, gradients, means, squares, start + left + column, inside, along, scale, step_size,
                    root_unbias, BETA1, REST1, BETA2, REST2, EPS,
                )  # fmt: skip
                tile_sum += moved * moved
                tl.store(weights + start + left + column, moved, mask=inside)
            norm = tl.sqrt_rn(tl.sum(tile_sum, 0))
            norm = tl.where(norm > 0, norm, 1.0)
            tl.debug_barrier()  # what one thread of this program wrote another may read
            for left in range(0, width, BLOCK):
                inside = left + column < width
                moved = tl.load(weights + start + left + column, mask=inside, other=0.0)
                tl.store(weights + start + left + column, tl.div_rn(moved, norm), mask=inside)

"""Weighted sums of rows as a Triton kernel: one pass over the rows, sums in a fixed order.

After the kernels of Gao et al. 2024 (arXiv 2406.04093), but nothing is added atomically. A program sums one bag, also
the long one of a feature that fires everywhere. The sizes of tiles are a guess; no GPU has measured them. Offsets into
matrices are int64, so N*F and F*D may exceed 2^31. Slots are int32, as `start` is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import PTXASError

AssemblerError = PTXASError
"""Raised where ptxas does not support the GPU."""
TILE = 4096
"""Numbers that a program holds of the matched rows at a time."""


def bags(
    rows_SD: Tensor, index_M: Tensor, weight_M: Tensor, start_B: Tensor, order_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return for each bag b the sum [B, D] over slots i from start[b] to start[b + 1] of weight[i] * rows[index[i]].

    The second result is the sum of each bag's weights [B], of the same pass. Rows are fp32, bf16 (sums are fp32) or
    float64. Slot i stands for order[i], where that is given. For an example see bags.py.
    """
    n_bags, width = len(start_B) - 1, rows_SD.shape[1]
    is_double = rows_SD.dtype == torch.float64
    sum_BD = torch.empty(n_bags, width, dtype=torch.float64 if is_double else torch.float32, device=rows_SD.device)
    total_B = sum_BD.new_empty(n_bags)
    if n_bags == 0:
        return sum_BD, total_B
    block = triton.next_power_of_2(width)
    order = index_M if order_M is None else order_M
    matched = (each.contiguous() for each in (rows_SD, index_M, weight_M, order, start_B))
    with torch.cuda.device_of(rows_SD):
        _bags_kernel[(n_bags,)](
            *matched, sum_BD, total_B, width,
            ORDERED=order_M is not None, ACC=tl.float64 if is_double else tl.float32,
            ROWS=max(1, min(32, TILE // block)), BLOCK=block, num_warps=8 if block > 1024 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return sum_BD, total_B


@triton.jit
def _bags_kernel(
    rows, index, weight, order, start, sums, totals, width,
    ORDERED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one bag, ROWS slots at a time, and its weights."""
    bag = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    last = tl.load(start + bag + 1)
    tile_sum = tl.zeros([ROWS, BLOCK], ACC)
    weight_sum = tl.zeros([ROWS], ACC)
    for first in range(tl.load(start + bag), last, ROWS):
        slot = first + tl.arange(0, ROWS)
        used = slot < last
        if ORDERED:
            slot = tl.load(order + slot, mask=used, other=0)
        row = tl.load(index + slot, mask=used, other=0).to(tl.int64)
        at = rows + row[:, None] * width + column[None, :]
        tile = tl.load(at, mask=used[:, None] & inside[None, :], other=0.0).to(ACC)
        factor = tl.load(weight + slot, mask=used, other=0.0).to(ACC)
        tile_sum += factor[:, None] * tile
        weight_sum += factor
    tl.store(sums + bag.to(tl.int64) * width + column, tl.sum(tile_sum, 0), mask=inside)
    tl.store(totals + bag, tl.sum(weight_sum, 0))

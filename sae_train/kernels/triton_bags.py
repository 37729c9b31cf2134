"""Weighted sums of rows as Triton kernels: one pass over the rows, sums in a fixed order.

After the kernels of Gao et al. 2024 (arXiv 2406.04093), but nothing is added atomically. A program sums one bag. Of a
long bag, such as that of a feature that fires everywhere, it sums the beginning and adds the sums that other programs
made of the rest, in order. The sizes of tiles are a guess; no GPU has measured them.

Offsets into matrices are int64, so N*F and F*D may exceed 2^31. Slots are counted in int32, as `start` is.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import PTXASError

AssemblerError = PTXASError
"""Raised where ptxas does not know the GPU."""
TILE = 4096
"""Numbers that a program holds of the matched rows at a time."""
WIDEST_BAG = 512
"""Columns of a bag that one program sums."""
CHUNK = 512
"""Matches above which a bag is shared by programs: each takes those between two multiples of this many slots."""


def bags(
    rows_SD: Tensor, index_M: Tensor, weight_M: Tensor, start_B: Tensor, order_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return for each bag b the sum [B, D] over slots i from start[b] to start[b + 1] of weight[i] * rows[index[i]].

    The second result is the sum of each bag's weights [B], of the same pass. For an example see bags.py.

    Args:
        rows_SD: fp32, bf16 (sums are fp32) or float64.
        index_M: rows, int32 or int64.
        weight_M: of each slot.
        start_B: int32 [B + 1], on the device; slots from start[B] on are never read.
        order_M: slot i stands for order[i]; for itself if None.
    """
    rows_SD, index_M = rows_SD.contiguous(), index_M.contiguous()
    n_bags, width = len(start_B) - 1, rows_SD.shape[1]
    is_double = rows_SD.dtype == torch.float64
    sum_BD = torch.empty(n_bags, width, dtype=torch.float64 if is_double else torch.float32, device=rows_SD.device)
    total_B = sum_BD.new_empty(n_bags)
    if n_bags == 0:
        return sum_BD, total_B
    block = min(triton.next_power_of_2(width), WIDEST_BAG)
    n_blocks = triton.cdiv(width, block)
    n_chunks = triton.cdiv(len(index_M if order_M is None else order_M), CHUNK)
    part_CD = sum_BD.new_empty(n_chunks if n_chunks > 1 else 0, width)
    part_total_C = sum_BD.new_empty(n_chunks if n_chunks > 1 else 0)
    options: dict[str, Any] = {
        "ORDERED": order_M is not None, "ACC": tl.float64 if is_double else tl.float32, "CHUNK": CHUNK,
        "ROWS": max(1, min(32, TILE // block)), "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    order_M = index_M if order_M is None else order_M.contiguous()
    matched = rows_SD, index_M, weight_M.contiguous(), order_M, start_B
    with torch.cuda.device_of(rows_SD):
        if n_chunks > 1:
            slot_C = torch.arange(0, n_chunks * CHUNK, CHUNK, dtype=torch.int32, device=start_B.device)
            owner_C = torch.searchsorted(start_B, slot_C, right=True, out_int32=True).sub_(1)
            _chunks_kernel[(n_chunks * n_blocks,)](
                *matched, owner_C, part_CD, part_total_C, n_bags, width, n_blocks, **options
            )
        _bags_kernel[(n_bags * n_blocks,)](
            *matched, part_CD, part_total_C, sum_BD, total_B, width, n_blocks, SHARED=n_chunks > 1, **options
        )
    return sum_BD, total_B


@triton.jit
def _tile_of_sums(
    rows, index, weight, order, first_slot, last_slot, column, inside, width,
    ORDERED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return ROWS sums of a range of slots, ROWS at a time, and as many sums of their weights."""
    tile_sum = tl.zeros([ROWS, BLOCK], ACC)
    weight_sum = tl.zeros([ROWS], ACC)
    for first in range(first_slot, last_slot, ROWS):
        slot = first + tl.arange(0, ROWS)
        used = slot < last_slot
        if ORDERED:
            slot = tl.load(order + slot, mask=used, other=0)
        row = tl.load(index + slot, mask=used, other=0).to(tl.int64)
        at = rows + row[:, None] * width + column[None, :]
        tile = tl.load(at, mask=used[:, None] & inside[None, :], other=0.0).to(ACC)
        factor = tl.load(weight + slot, mask=used, other=0.0).to(ACC)
        tile_sum += factor[:, None] * tile
        weight_sum += factor
    return tile_sum, weight_sum


@triton.jit
def _chunks_kernel(
    rows, index, weight, order, start, owner, parts, part_totals, n_bags, width, n_blocks,
    ORDERED: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum what one chunk of slots holds of a long bag that began before it; `owner` is the bag of its first slot."""
    chunk = tl.program_id(0) // n_blocks
    block = tl.program_id(0) % n_blocks
    bag = tl.load(owner + chunk)
    if bag < n_bags:
        first = tl.load(start + bag)
        last = tl.load(start + bag + 1)
        if (last - first > CHUNK) & (first < chunk * CHUNK):
            column = block * BLOCK + tl.arange(0, BLOCK)
            inside = column < width
            until = tl.minimum(last, (chunk + 1) * CHUNK)
            tile_sum, weight_sum = _tile_of_sums(
                rows, index, weight, order, chunk * CHUNK, until, column, inside, width,
                ORDERED, ACC, ROWS, BLOCK,
            )  # fmt: skip
            tl.store(parts + chunk.to(tl.int64) * width + column, tl.sum(tile_sum, 0), mask=inside)
            tl.store(part_totals + chunk, tl.sum(weight_sum, 0), mask=block == 0)


@triton.jit
def _bags_kernel(
    rows, index, weight, order, start, parts, part_totals, sums, totals, width, n_blocks, SHARED: tl.constexpr,
     ORDERED: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one block of columns of one bag; of a long one up to the next chunk, then the sums of its chunks."""
    bag = tl.program_id(0) // n_blocks
    block = tl.program_id(0) % n_blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(start + bag)
    last = tl.load(start + bag + 1)
    until = last
    if SHARED:
        next_chunk = first // CHUNK + 1
        is_long = last - first > CHUNK
        until = tl.where(is_long, next_chunk * CHUNK, last)
    tile_sum, weight_sum = _tile_of_sums(
        rows, index, weight, order, first, until, column, inside, width, ORDERED, ACC, ROWS, BLOCK
    )
    row_sum = tl.sum(tile_sum, 0)
    total = tl.sum(weight_sum, 0)
    if SHARED:
        part = parts + next_chunk.to(tl.int64) * width + column
        for chunk in range(next_chunk, tl.where(is_long, tl.cdiv(last, CHUNK), 0)):
            row_sum += tl.load(part, mask=inside, other=0.0)
            part += width
            total += tl.load(part_totals + chunk)
    tl.store(sums + bag.to(tl.int64) * width + column, row_sum, mask=inside)
    tl.store(totals + bag, total, mask=block == 0)

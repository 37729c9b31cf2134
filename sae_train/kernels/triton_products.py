"""The sparse products as Triton kernels: one pass over the matched rows, sums in fp32 and in a fixed order.

Twins of what products.py makes of plain torch, after the kernels of Gao et al. 2024 (arXiv 2406.04093) but for the
order of their sums: nothing is added atomically and no N*k*D numbers are made. A program sums one bag; of a long one,
such as a feature that fires everywhere, it sums the beginning and adds what others made of the rest, in order.
Checked interpreted on a CPU (tests/kernels/test_triton.py); the sizes of tiles are a guess, their speed is unmeasured.

Offsets into matrices are int64, so N*F and F*D may exceed 2^31; slots are counted in int32, as `start` is.
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
WIDEST_ROW = 4096
"""Columns up to which a token's row is read once and kept for all of its matches."""


def bags(
    rows_SD: Tensor, index_M: Tensor, weight_M: Tensor | None, start_B: Tensor, order_M: Tensor | None = None
) -> Tensor:
    """Return for each bag b the sum [B, D] over slots i from start[b] to start[b + 1] of weight[i] * rows[index[i]].

    Args:
        rows_SD: fp32 or bf16; the result is fp32.
        index_M: rows, int32 or int64.
        weight_M: all 1 if None.
        start_B: int32 [B + 1], on the device; slots from start[B] on are never read.
        order_M: slot i stands for order[i]; for itself if None.
    """
    return _bags(rows_SD, index_M, weight_M, start_B, order_M, totals=False)[0]


def bags_and_totals(
    rows_SD: Tensor, index_M: Tensor, weight_M: Tensor, start_B: Tensor, order_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `bags` [B, D], and the sum of each one's weights [B] from the same pass."""
    return _bags(rows_SD, index_M, weight_M, start_B, order_M, totals=True)


def row_products(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's product of its token's row and its feature's row of W [M] in fp32, 0 in unused slots.

    Args:
        rows_ND: fp32 or bf16.
        W_FD: fp32 or bf16.
        start_N: int32 [N + 1], on the device: token i holds slots start[i] to start[i + 1].
    """
    rows_ND, W_FD = rows_ND.contiguous(), W_FD.contiguous()
    n_tokens, width = rows_ND.shape
    product_M = torch.zeros(len(feature_M), dtype=torch.float32, device=rows_ND.device)
    if n_tokens == 0:
        return product_M
    block = min(triton.next_power_of_2(width), WIDEST_ROW)
    with torch.cuda.device_of(rows_ND):
        _row_products_kernel[(n_tokens,)](
            rows_ND, W_FD, feature_M.contiguous(), start_N, product_M, width,
            WHOLE=width <= block, ROWS=_rows_of_a_tile(block), BLOCK=block, num_warps=8 if block > 1024 else 4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return product_M


def _bags(
    rows_SD: Tensor,
    index_M: Tensor,
    weight_M: Tensor | None,
    start_B: Tensor,
    order_M: Tensor | None,
    *,
    totals: bool,
) -> tuple[Tensor, Tensor]:
    rows_SD, index_M = rows_SD.contiguous(), index_M.contiguous()
    n_bags, width = len(start_B) - 1, rows_SD.shape[1]
    sum_BD = torch.empty(n_bags, width, dtype=torch.float32, device=rows_SD.device)
    total_B = sum_BD.new_empty(n_bags if totals else 0)
    if n_bags == 0:
        return sum_BD, total_B
    block = min(triton.next_power_of_2(width), WIDEST_BAG)
    n_blocks = triton.cdiv(width, block)
    n_chunks = triton.cdiv(len(index_M if order_M is None else order_M), CHUNK)
    part_CD = sum_BD.new_empty(n_chunks if n_chunks > 1 else 0, width)
    part_total_C = sum_BD.new_empty(n_chunks if totals else 0)
    matched = (
        rows_SD,
        index_M,
        index_M if weight_M is None else weight_M.contiguous(),
        index_M if order_M is None else order_M.contiguous(),
        start_B,
    )
    options: dict[str, Any] = {
        "WEIGHTED": weight_M is not None, "ORDERED": order_M is not None, "TOTALS": totals,
        "CHUNK": CHUNK, "ROWS": _rows_of_a_tile(block), "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
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


def _rows_of_a_tile(block: int) -> int:
    return max(1, min(32, TILE // block))


@triton.jit
def _tile_of_sums(
    rows,
    index,
    weight,
    order,
    first_slot,
    last_slot,
    column,
    inside,
    width,
    WEIGHTED: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return ROWS sums of a range of slots, ROWS at a time, and as many sums of their weights."""
    tile_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    for first in range(first_slot, last_slot, ROWS):
        slot = first + tl.arange(0, ROWS)
        used = slot < last_slot
        if ORDERED:
            slot = tl.load(order + slot, mask=used, other=0)
        row = tl.load(index + slot, mask=used, other=0).to(tl.int64)
        at = rows + row[:, None] * width + column[None, :]
        tile = tl.load(at, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            factor = tl.load(weight + slot, mask=used, other=0.0).to(tl.float32)
            tile = factor[:, None] * tile
            weight_sum += factor
        tile_sum += tile
    return tile_sum, weight_sum


@triton.jit
def _chunks_kernel(
    rows,
    index,
    weight,
    order,
    start,
    owner,
    parts,
    part_totals,
    n_bags,
    width,
    n_blocks,
    WEIGHTED: tl.constexpr,
    ORDERED: tl.constexpr,
    TOTALS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
                rows, index, weight, order, chunk * CHUNK, until, column, inside, width, WEIGHTED, ORDERED, ROWS, BLOCK
            )
            tl.store(parts + chunk.to(tl.int64) * width + column, tl.sum(tile_sum, 0), mask=inside)
            if TOTALS:
                tl.store(part_totals + chunk, tl.sum(weight_sum, 0), mask=block == 0)


@triton.jit
def _bags_kernel(
    rows,
    index,
    weight,
    order,
    start,
    parts,
    part_totals,
    sums,
    totals,
    width,
    n_blocks,
    SHARED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ORDERED: tl.constexpr,
    TOTALS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        rows, index, weight, order, first, until, column, inside, width, WEIGHTED, ORDERED, ROWS, BLOCK
    )
    row_sum = tl.sum(tile_sum, 0)
    total = tl.sum(weight_sum, 0)
    if SHARED:
        part = parts + next_chunk.to(tl.int64) * width + column
        for chunk in range(next_chunk, tl.where(is_long, tl.cdiv(last, CHUNK), 0)):
            row_sum += tl.load(part, mask=inside, other=0.0)
            part += width
            if TOTALS:
                total += tl.load(part_totals + chunk)
    tl.store(sums + bag.to(tl.int64) * width + column, row_sum, mask=inside)
    if TOTALS:
        tl.store(totals + bag, total, mask=block == 0)


@triton.jit
def _row_products_kernel(
    rows,
    weights,
    feature,
    start,
    products,
    width,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply one token's row with its features' rows, ROWS of them at a time; WHOLE where a block holds a row."""
    token = tl.program_id(0)
    own = rows + token.to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    last = tl.load(start + token + 1)
    if WHOLE:
        own_tile = tl.load(own + column, mask=column < width, other=0.0).to(tl.float32)
    for first in range(tl.load(start + token), last, ROWS):
        slot = first + tl.arange(0, ROWS)
        used = slot < last
        other = weights + tl.load(feature + slot, mask=used, other=0).to(tl.int64) * width
        if WHOLE:
            kept = used[:, None] & (column < width)[None, :]
            tile = tl.load(other[:, None] + column[None, :], mask=kept, other=0.0).to(tl.float32)
            tile_sum = own_tile[None, :] * tile
        else:
            tile_sum = tl.zeros([ROWS, BLOCK], tl.float32)
            for left in range(0, width, BLOCK):
                inside = left + column < width
                kept = used[:, None] & inside[None, :]
                tile = tl.load(other[:, None] + left + column[None, :], mask=kept, other=0.0).to(tl.float32)
                part = tl.load(own + left + column, mask=inside, other=0.0).to(tl.float32)
                tile_sum += part[None, :] * tile
        tl.store(products + slot, tl.sum(tile_sum, 1), mask=used)

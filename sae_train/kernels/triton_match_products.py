"""One dot product a match as a Triton kernel: a program multiplies one token's row with its features' rows.

The sizes of tiles are a guess; no GPU has measured them. Offsets into matrices are int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Numbers of features' rows that a program holds at a time."""


def row_products(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's product of its token's row and its feature's row of W [M], 0 in unused slots.

    Rows are fp32, bf16 (products are fp32) or float64. For an example see match_products.py.
    """
    rows_ND, W_FD = rows_ND.contiguous(), W_FD.contiguous()
    n_tokens, width = rows_ND.shape
    is_double = rows_ND.dtype == torch.float64
    product_M = torch.zeros(len(feature_M), dtype=torch.float64 if is_double else torch.float32, device=rows_ND.device)
    if n_tokens == 0:
        return product_M
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(rows_ND):
        _row_products_kernel[(n_tokens,)](
            rows_ND, W_FD, feature_M.contiguous(), start_N, product_M, width,
            ACC=tl.float64 if is_double else tl.float32, ROWS=max(1, min(32, TILE // block)), BLOCK=block,
            num_warps=8 if block > 1024 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return product_M


@triton.jit
def _row_products_kernel(
    rows, weights, feature, start, products, width, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Multiply one token's row with its features' rows, ROWS of them at a time."""
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    own = tl.load(rows + token.to(tl.int64) * width + column, mask=inside, other=0.0).to(ACC)
    last = tl.load(start + token + 1)
    for first in range(tl.load(start + token), last, ROWS):
        slot = first + tl.arange(0, ROWS)
        used = slot < last
        other = weights + tl.load(feature + slot, mask=used, other=0).to(tl.int64) * width
        tile = tl.load(other[:, None] + column[None, :], mask=used[:, None] & inside[None, :], other=0.0).to(ACC)
        tl.store(products + slot, tl.sum(own[None, :] * tile, 1), mask=used)

"""The encoder's dense product."""

import functools
from pathlib import Path

import torch
from torch import Tensor

PRECISIONS = ("bf16", "float32", "float64")
PIECE_ELEMENTS = 1 << 22
"""Pre-activations that oneDNN computes at once: half of what the C library at most keeps for the next. As many numbers
are rounded at once."""


def affine(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, precision: str, out: Tensor | None = None) -> Tensor:
    """Return x W^T + b [N, F] from fp32 accumulators (float64 where the inputs are), without a graph.

    `bf16` rounds the factors of the product to bf16; on a CPU that only imitates what a GPU computes.

    Args:
        out: [N, F] of the result's dtype to write to, so that a step need not ask the system for so much memory anew.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: choose {', '.join(PRECISIONS)}")
    if out is not None and (out.shape, out.dtype) != ((len(x_ND), len(W_FD)), x_ND.dtype):
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, the product {(len(x_ND), len(W_FD))} {x_ND.dtype}")
    with torch.no_grad():
        if precision == "bf16" and x_ND.dtype == torch.float32:
            if x_ND.is_cuda:
                return torch.mm(x_ND.bfloat16(), W_FD.bfloat16().t(), out_dtype=torch.float32, out=out).add_(b_F)
            x_ND, W_FD = _rounded(x_ND), _rounded(W_FD)
        if _has_onednn(x_ND):
            return _affine_by_onednn(x_ND, W_FD, b_F, out)
        return torch.addmm(b_F, x_ND, W_FD.t(), out=out)


def _rounded(rows: Tensor) -> Tensor:
    """Return fp32 rows [R, D] rounded to bf16 numbers, in fp32.

    The plan counts this one copy (training/plan.py), so no second one in bf16 is held beside it, but for a piece.
    """
    rounded = torch.empty_like(rows)
    step = max(1, PIECE_ELEMENTS // max(1, rows.shape[1]))
    for into, piece in zip(rounded.split(step), rows.split(step), strict=True):
        into.copy_(piece.bfloat16())
    return rounded


def _has_onednn(x_ND: Tensor) -> bool:
    """Return whether oneDNN computes the product: on AMD in half the time of MKL, which torch.addmm asks.

    On Intel it takes 1.2 to 1.8 of MKL's time.
    """
    is_plain = x_ND.device.type == "cpu" and x_ND.dtype == torch.float32 and x_ND.numel() > 0
    return is_plain and not _is_intel() and torch.backends.mkldnn.is_available() and _onednn_works()


@functools.cache
def _is_intel() -> bool:
    """Return whether MKL runs on the processor that it was made for, as far as Linux tells."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


@functools.cache
def _onednn_works() -> bool:
    """Return whether torch's operation, which it keeps for its compiler, is there and takes what we give it."""
    a = torch.eye(4)
    try:
        found = torch.ops.mkldnn._linear_pointwise(a, a, a[0], "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, a + a[0])


def _affine_by_onednn(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, out: Tensor | None) -> Tensor:
    """Return x W^T + b in pieces that the heap gives again and again without a page fault (a third of the time)."""
    pre_NF = x_ND.new_empty(len(x_ND), len(W_FD)) if out is None else out
    step = max(16, PIECE_ELEMENTS // max(1, len(W_FD)))
    for into, rows_ND in zip(pre_NF.split(step), x_ND.split(step), strict=True):
        into.copy_(torch.ops.mkldnn._linear_pointwise(rows_ND, W_FD, b_F, "none", [], ""))
    return pre_NF

"""The encoder's dense product."""

import functools
from pathlib import Path

import torch
from torch import Tensor

PIECE_ELEMENTS = 1 << 22
"""Pre-activations that oneDNN computes at once: 16 MB, which the allocator reuses without page faults."""


def affine(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, precision: str, out: Tensor | None = None) -> Tensor:
    """Return x W^T + b [N, F] from fp32 accumulators (float64 where the inputs are), without a graph.

    `precision=bf16` rounds the factors to bf16 where the device `writes_fp32`, as a GPU does. Elsewhere a bf16 product
    only finds candidates (`approximate`), and this product is in fp32.

    >>> affine(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([0.0, 1.0]), precision="float32")
    tensor([[1., 3.]])

    Args:
        out: [N, F] of the result's dtype to write to. A step that passes the same tensor again saves page faults.
    """
    with torch.no_grad():
        if precision == "bf16" and x_ND.dtype == torch.float32 and writes_fp32(x_ND.device):
            return torch.mm(x_ND.bfloat16(), W_FD.bfloat16().t(), out_dtype=torch.float32, out=out).add_(b_F)
        if not _uses_onednn(x_ND):
            return torch.addmm(b_F, x_ND, W_FD.t(), out=out)
        pre_NF = x_ND.new_empty(len(x_ND), len(W_FD)) if out is None else out
        step = max(16, PIECE_ELEMENTS // max(1, len(W_FD)))
        for into, rows_ND in zip(pre_NF.split(step), x_ND.split(step), strict=True):
            into.copy_(torch.ops.mkldnn._linear_pointwise(rows_ND, W_FD, b_F, "none", [], ""))
        return pre_NF


@functools.cache
def writes_fp32(device: torch.device) -> bool:
    """Return whether a product of bf16 factors on this device writes fp32 numbers (`out_dtype`): on a CPU none does."""
    if device.type != "cuda":
        return False
    a = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return torch.mm(a, a, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


def _uses_onednn(x_ND: Tensor) -> bool:
    return x_ND.device.type == "cpu" and x_ND.dtype == torch.float32 and x_ND.numel() > 0 and _prefers_onednn()


@functools.cache
def _prefers_onednn() -> bool:
    """Return whether oneDNN computes fp32 products here: not on Intel, and only if torch's private operation works.

    It takes half the time of MKL, which `torch.addmm` calls, on AMD processors, and 1.2 to 1.8 times that on Intel's.
    """
    a = torch.eye(4)
    try:
        is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        found = torch.ops.mkldnn._linear_pointwise(a, a, a[0], "none", [], "")
    except (AttributeError, OSError, RuntimeError, TypeError):
        return False
    return not is_intel and torch.backends.mkldnn.is_available() and torch.equal(found, a + a[0])

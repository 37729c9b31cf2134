"""Which kernels work on a tensor: Triton's on a GPU, Numba's on a CPU, and plain torch's where those cannot run."""

import importlib.util
import os
import shutil
import subprocess
from functools import cache, lru_cache

import torch
from torch import Tensor

DEVICES: tuple[str, ...] = ("cuda",)
"""Kinds of devices that Triton's kernels run on; tests add "cpu", where Triton interprets them."""
DTYPES = (torch.float32, torch.bfloat16)
"""Of the tensors whose rows are read; float64 is plain torch's."""
OLDEST = (8, 0)
"""Compute capability of the first CUDA GPUs that multiply bf16 numbers; Triton asks for it, too."""


def uses_numba(*given: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether kernels that Numba compiles work on these tensors, all on a CPU and of that type."""
    is_plain = all(each.device.type == "cpu" and each.dtype == dtype for each in given)
    return is_plain and why_not_numba() is None


def has_numba(device: torch.device) -> bool:
    """Return whether kernels that Numba compiles can run there."""
    return device.type == "cpu" and why_not_numba() is None


@cache
def why_not_numba() -> str | None:
    """Return why Numba's kernels cannot run here, None where they can; the first call imports all and tries two.

    That takes half a second, a whole one where they have to be compiled first, as every other is when it is first run.
    """
    try:
        import numba

        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        for name in ("adam", "backward", "cut", "leading", "products", "rows", "scan"):
            importlib.import_module(f"sae_train.kernels.numba_{name}")
        from sae_train.kernels import numba_groups
    except ImportError as error:
        return str(error)
    order, start = numba_groups.by_group(torch.tensor([1, 0, 1]), 2)
    if order.tolist() != [1, 0, 2] or start.tolist() != [0, 1, 3]:
        return "a kernel did not do what it should, by torch's OpenMP"
    return None


def has_bf16(device: torch.device) -> bool:
    """Return whether a GPU multiplies bf16 numbers itself; what torch emulates on older ones is slower than fp32."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


def uses_triton(rows: Tensor) -> bool:
    """Return whether Triton's kernels work on `rows`."""
    return rows.device.type in DEVICES and rows.dtype in DTYPES and why_not_triton(rows.device) is None


@lru_cache
def why_not_triton(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run here, None where they can: on a GPU by running one."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda":
        return None
    if not has_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"it asks for compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {major}.{minor}"
    if "CC" not in os.environ and not any(shutil.which(compiler) for compiler in ("gcc", "clang")):
        return "it builds its launchers with a C compiler, and neither gcc nor clang is on the PATH"
    return _what_a_kernel_runs_into(device)


def _what_a_kernel_runs_into(device: torch.device) -> str | None:
    """Return what a small kernel ends with, for want of headers, a place for its files or a driver; else None.

    A kernel that does not compile is our fault, and keeps its traceback.
    """
    start = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        from sae_train.kernels import triton_products
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    try:
        triton_products.bags(torch.ones(1, 16, device=device), start[:1], torch.ones(1, device=device), start).cpu()
    except (OSError, RuntimeError, subprocess.SubprocessError, triton_products.AssemblerError) as error:
        said = next(iter(str(error).splitlines()), "")
        return f"a kernel ended with {type(error).__name__}{f': {said[:160]}' if said else ''}"
    return None


def notices(device: torch.device, *, precision: str, asked: str) -> list[str]:
    """Return the lines that a run says at its start, one for each thing that its device lacks.

    Args:
        precision: of the run.
        asked: as it was typed, or "auto".
    """
    lines = []
    reason = why_not_triton(device) if device.type in DEVICES else why_not_numba() if device.type == "cpu" else None
    if reason:
        which = "Triton" if device.type in DEVICES else "compiled"
        lines.append(f"no {which} kernels on {device}: {reason}. Plain torch does their work, slower.")
    if device.type == "cuda" and not has_bf16(device):
        if precision == "bf16":
            lines.append(f"no bf16 products on {device}: torch emulates them, slower than precision=float32.")
        elif asked == "auto" and precision == "float32":
            lines.append(f"no bf16 products on {device}: precision=auto is float32 there, slower.")
    return lines

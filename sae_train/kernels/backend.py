"""Which devices run Triton kernels, and which ones multiply bf16 numbers in hardware."""

import importlib.util
import subprocess
from functools import cache, lru_cache
from pathlib import Path

import torch

DEVICES: tuple[str, ...] = ("cuda",)
"""Types of the devices that run Triton kernels. Tests add "cpu", where Triton interprets its kernels."""
OLDEST = (8, 0)
"""Least compute capability of a CUDA GPU that multiplies bf16 numbers. Triton requires it, too."""


def uses_triton(device: torch.device) -> bool:
    """Return whether operations on this device run as Triton kernels."""
    return device.type in DEVICES and why_not_triton(device) is None


def has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 matrices faster than fp32 ones: CUDA from `OLDEST` on, a CPU with AMX.

    It reads hardware flags and measures nothing. Older GPUs emulate bf16. AVX-512 BF16 alone gains little, or loses.
    """
    if device.type == "cpu":
        return has_amx() and torch.backends.mkldnn.is_available()
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


@cache
def has_amx() -> bool:
    """Return whether this processor multiplies bf16 tiles (AMX)."""
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    flags = Path("/proc/cpuinfo")  # torch 2.11
    return flags.exists() and "amx_bf16" in flags.read_text(encoding="ascii", errors="replace")


@lru_cache
def why_not_triton(device: torch.device) -> str | None:
    """Return the reason why Triton kernels cannot run on a device, None where they can. On a GPU it runs one."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda":
        return None
    if not has_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"it asks for compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {major}.{minor}"
    return _failure_of_a_kernel(device)


def _failure_of_a_kernel(device: torch.device) -> str | None:
    """Return the error that a small kernel ends with where headers, a driver or a cache directory are missing.

    None where it runs. A kernel that does not compile is our fault, and keeps its traceback.
    """
    start = torch.tensor([0, 1], dtype=torch.int32, device=device)
    try:
        from sae_train.kernels import triton_bags
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    try:
        triton_bags.bags(torch.ones(1, 16, device=device), start[:1], torch.ones(1, device=device), start)[0].cpu()
    except (OSError, RuntimeError, subprocess.SubprocessError, triton_bags.AssemblerError) as error:
        said = next(iter(str(error).splitlines()), "")
        return f"a kernel ended with {type(error).__name__}{f': {said[:160]}' if said else ''}"
    return None

"""The facts that a resumed run keeps: precision and source; and the program and processor that computed."""

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sae_train
from sae_train.errors import CheckpointError
from sae_train.kernels import backend


def resolve_precision(typed: str, *, stored: dict[str, Any] | None, device: torch.device) -> str:
    """Return the precision of matrix products: as typed, else as this run began, else the fastest on the device.

    Args:
        typed: the setting, which may be 'auto'.
        stored: config.yaml of the run, None for a new one.
    """
    if typed != "auto":
        return typed
    if stored is not None:
        return str(stored["config"].get("precision", "float32"))
    return "bf16" if backend.has_bf16(device) else "float32"


@functools.lru_cache
def processor(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its vector instructions: the order of sums depends on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    vectors = torch.backends.cpu.get_cpu_capability() + (" with AMX" if backend.has_amx() else "")
    return f"{names[0] if names else platform.machine()} ({vectors})"


def check_source(record: dict[str, Any], *, stored: dict[str, Any] | None, path: Path) -> None:
    """Refuse to go on with another model or other data than the run began with.

    Raises:
        CheckpointError: a fact of the source, such as the commit of a hub model, is not what config.yaml says.
    """
    before = stored["source"] if stored else record
    known = [key for key in record if key in before]  # an older version may have recorded fewer facts
    moved = [f"{key} {before[key]!r} -> {record[key]!r}" for key in known if before[key] != record[key]]
    if moved:
        raise CheckpointError(
            f"{path}: its activations came from elsewhere: {', '.join(moved)}. Bring that back (model.revision= pins a "
            "model), or choose another name=."
        )


def provenance(overrides: list[str]) -> dict[str, Any]:
    """Return the overrides as typed, and the version of this program: package version, git commit if any."""
    source = Path(sae_train.__file__).resolve().parent
    try:
        asked = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
        commit = asked.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "version": sae_train.__version__,
        "git_commit": commit,
        "torch": str(torch.__version__),
        "overrides": overrides,
    }


def device_notices(device: torch.device, *, precision: str, asked: str) -> list[str]:
    """Return the lines that a run prints at its start, one for each thing that its device lacks.

    Args:
        precision: of the run.
        asked: the precision as it was typed, or "auto".
    """
    lines = []
    reason = backend.why_not_triton(device) if device.type in backend.DEVICES else None
    if reason:
        lines.append(f"no Triton kernels on {device}: {reason}. Plain torch does their work, slower.")
    if precision == "bf16" and not backend.has_bf16(device):
        why = "torch emulates them" if device.type == "cuda" else "this processor has no AMX"
        lines.append(f"no fast bf16 products on {device}: {why}. precision=float32 may be faster.")
    elif device.type == "cuda" and asked == "auto" and precision == "float32" and not backend.has_bf16(device):
        lines.append(f"no fast bf16 products on {device}: precision=auto is float32 there, slower.")
    return lines

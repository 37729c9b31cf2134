"""Overrides of small runs of the real program."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def tiny_run(folder: Path) -> list[str]:
    """Return the overrides of the `tiny` fixture for any folder."""
    return [
        "n_features=256",
        "k=8",
        "tokens=8192",
        "batch_tokens=512",
        "harvest.lanes=8",
        "harvest.context_length=32",
        "harvest.contexts_per_forward=8",
        "harvest.pool_batches=8",
        "harvest.calibration_tokens=2048",
        "evaluation_tokens=4000",
        "log_every=2048",
        "tracking=none",
        f"runs={folder / 'runs'}",
    ]


def rows_run(folder: Path) -> list[str]:
    """Return the overrides of a run of 16 steps on random rows in `folder`: it starts in a fraction of the time."""
    (folder / "rows").mkdir(exist_ok=True)
    rows = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
    save_file({"activations": rows}, folder / "rows" / "rows.safetensors")
    return [
        "harvest=tensors",
        f"harvest.path={folder / 'rows'}",
        "harvest.calibration_tokens=512",
        "n_features=64",
        "k=4",
        "tokens=4096",
        "batch_tokens=256",
        "evaluation_tokens=256",
        "log_every=512",
        "tracking=none",
        f"runs={folder / 'runs'}",
    ]

"""SAEs in our format on the disk, as a run leaves them, without a run."""

from pathlib import Path
from typing import Any

import torch

from sae_train.formats import native
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import manifest_of, random_sae

FIGURES = {"l0": 3.1, "fvu": 0.25, "delta_ce": 0.5, "ce_recovered": 0.9, "dead_fraction": 0.125}
FACTS: dict[str, Any] = {"site": "residual2", "tokens": 4096, "sparsifier": "mutual_choice", "seed": 3,
                         "figures": FIGURES}  # fmt: skip


def write_sae(directory: Path, *, inference: str = "threshold", seed: int = 0, **facts: Any) -> SparseAutoencoder:
    """Write a random SAE of either rule; return it."""
    sae = random_sae(d_model=16, n_features=48, seed=seed)
    sae.inference = inference
    if inference == "topk":
        sae.threshold = torch.zeros_like(sae.threshold)
    native.save(sae, directory, manifest=manifest_of(sae, **FACTS | facts), ranks=Solo())
    return sae

"""Measure an exported SAE for study_sparsifiers.py, in addition to its summary: densities, rare features, the truth."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from quality_score import BLOCK, halves
from safetensors.torch import load_file
from synthetic_dictionary import recovery
from torch import Tensor

import sae_train
from sae_train.sae.zipf_budget import default_shift, zipf_mass

CHUNK = 4096
QUANTILES = 64
"""Points of a density curve that are kept."""


@torch.no_grad()
def measure(sae_directory: Path, held_out: Path, *, k: int, truth: Path | None) -> dict[str, object]:
    """Return figures of the evaluation half of the held-out rows (blocks of 256, the odd ones).

    underused: share of features that fire on less than half of what Zipf's law with exponent 1 and the default shift
        would give the feature of their rank, dead ones among them (`aux_zipf`'s own measure).
    rare_half: increase of FVU when the rarer half of the features that fire is left out.
    rare_share: their share of all firings.
    density: the density at 64 evenly spaced ranks, the densest first.
    """
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    sae = sae_train.load(sae_directory)
    _, rows_ND = halves(held_out)
    fires_NF = torch.cat([sae.encode(part) > 0 for part in rows_ND.split(CHUNK)])
    density_F = fires_NF.double().mean(dim=0)
    order_F = density_F.argsort(descending=True)
    law_F = zipf_mass(sae.n_features, exponent=1.0, shift=default_shift(sae.n_features))
    expected_F = (k * law_F).clamp(max=1)
    n_alive = int((density_F > 0).sum())
    rare = order_F[n_alive // 2 : n_alive]
    place = torch.linspace(0, sae.n_features - 1, QUANTILES).round().long()
    found: dict[str, object] = {
        "underused": float((density_F[order_F] < 0.5 * expected_F).double().mean()),
        "rare_half": fvu(sae, rows_ND, without=rare) - fvu(sae, rows_ND, without=rare[:0]),
        "rare_share": float(density_F[rare].sum() / density_F.sum()),
        "density": [float(f"{value:.3g}") for value in density_F[order_F][place].tolist()],
    }
    if truth is None:
        return found
    held = load_file(truth)
    held["active"] = torch.cat(held["active"].split(BLOCK)[1::2])
    return found | asdict(recovery(fires_NF, sae.W_dec.detach(), held))


def fvu(sae: sae_train.SparseAutoencoder, rows_ND: Tensor, *, without: Tensor) -> float:
    """Return sum ||x - x_hat||^2 / sum ||x - mean||^2 with some features left out."""
    error = 0.0
    for x_ND in rows_ND.split(CHUNK):
        code_NF = sae.encode(x_ND)
        code_NF[:, without] = 0
        error += float((x_ND - sae.decode(code_NF)).double().square().sum())
    return error / float((rows_ND.double() - rows_ND.double().mean(dim=0)).square().sum())

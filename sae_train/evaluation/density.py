"""How often features fire: histogram, inequality, and the fit of Zipf's law."""

import torch
from torch import Tensor

from sae_train.sae.zipf_fit import fit_zipf

HISTOGRAM_EDGES = torch.linspace(-8.0, 0.0, 51)
"""Edges of log10 density: 50 bins from 1e-8 to 1."""


def density_figures(density_F: Tensor) -> dict[str, float]:
    """Return gini, above_10pct and the fit of Zipf's law to [F] firing densities (share of tokens, 0 to 1).

    zipf_exponent, zipf_shift and zipf_r2 are of `fit_zipf`, and absent where it finds none.
    """
    ordered_F = density_F.double().sort(descending=True).values
    n_features, total = len(ordered_F), float(ordered_F.sum())
    figures = {"above_10pct": float((density_F > 0.1).double().mean())}
    if total > 0:
        weights = torch.arange(1, n_features + 1, dtype=torch.float64, device=ordered_F.device)
        figures["gini"] = float(1 + 1 / n_features - 2 * (ordered_F * weights).sum() / (n_features * total))
    fit = fit_zipf(density_F)
    return figures if fit is None else figures | {f"zipf_{name}": value for name, value in fit._asdict().items()}


def density_histogram(density_F: Tensor, n_tokens: int) -> list[int]:
    """Return counts of features in the bins of log10(density + 1 / (10 n_tokens)); silent ones fall in the lowest."""
    logs = (density_F.double() + 0.1 / max(n_tokens, 1)).log10().clamp(-8.0, 0.0)
    return [int(n) for n in torch.histc(logs.cpu().float(), bins=50, min=-8.0, max=0.0)]

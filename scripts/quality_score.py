"""Score any SAE in our file layout on held-out activations: the one evaluator of bench_quality.py.

Rows are halved by blocks of 256 (even: calibration, odd: evaluation). Every figure is of the evaluation half:

    FVU   sum ||x - x_hat||^2 / sum ||x - mean||^2
    L0    mean number of features per row
    dead  share of features that fire on no row

A model with thresholds is scored by its own thresholds and, at matched L0, by thresholds that keep k per row of the
calibration half. How they are matched:

    threshold  where all features have the same threshold: another one for all
    factor     where features have thresholds of their own: one common factor on these, as our export does
    largest    where no factor will do, because features with a threshold of 0 fire more than k times a row by
               themselves: of what fires by the own thresholds, the k largest contributions (value times the decoder
               row's norm) a row on average
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

BLOCK = 256
CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Score:
    """Figures of one rule on the evaluation half."""

    fvu: float
    l0: float
    dead: float


def halves(directory: Path) -> tuple[Tensor, Tensor]:
    """Return (calibration, evaluation) rows [n, d_model], fp32."""
    files = [load_file(path)["activations"].float() for path in sorted(directory.glob("*.safetensors"))]
    blocks = torch.cat(files).split(BLOCK)
    return torch.cat(blocks[0::2]), torch.cat(blocks[1::2])


def pooled_cut(w: dict[str, Tensor], rows_ND: Tensor, k: float, *, unit_F: Tensor, above_F: Tensor) -> float:
    """Return the cut (strict) that keeps k affinities per row of rows_ND, measured in unit_F.

    Only affinities above above_F count. The cut is inf where more than k a row have a unit of 0, and 0 where there are
    too few.
    """
    keep = round(k * len(rows_ND))
    bound, kept = 0.0, torch.empty(0)
    for x_ND in rows_ND.split(CHUNK):
        pre_NF = x_ND @ w["W_enc"] + w["b_enc"]
        measured_NF = (pre_NF / unit_F).masked_fill_(pre_NF <= above_F, 0.0)
        kept = torch.cat([kept, measured_NF[measured_NF > bound]])
        if len(kept) > 2 * keep:  # what falls below the best `keep` so far can never come back
            kept = kept.topk(keep + 1, sorted=False).values
            bound = float(kept.min())
    if len(kept) <= keep:
        return 0.0
    return float(kept.topk(keep + 1).values[-1])


def matched_thresholds(w: dict[str, Tensor], rows_ND: Tensor, k: float) -> tuple[str, float, Tensor]:
    """Return the name of the matching to k (see above), the cut, and the thresholds [n_features]."""
    own_F, zero_F = w["threshold"], torch.zeros_like(w["threshold"])
    if bool((own_F == own_F[0]).all()):
        cut = pooled_cut(w, rows_ND, k, unit_F=torch.ones_like(own_F), above_F=zero_F)
        return "threshold", cut, torch.full_like(own_F, cut)
    cut = pooled_cut(w, rows_ND, k, unit_F=own_F, above_F=zero_F)
    if math.isfinite(cut):
        return "factor", cut, torch.where(own_F.isinf(), own_F, cut * own_F)
    unit_F = 1 / w["W_dec"].norm(dim=1).clamp(min=1e-8)
    cut = pooled_cut(w, rows_ND, k, unit_F=unit_F, above_F=own_F)
    return "largest", cut, torch.maximum(own_F, cut * unit_F)


def score(w: dict[str, Tensor], rows_ND: Tensor, *, k: int | None, threshold: Tensor | None) -> Score:
    """Score w on rows_ND with the k largest affinities of a row, or with strict thresholds [n_features]."""
    mean_D = rows_ND.double().mean(dim=0)
    error = variance = 0.0
    firings = 0
    fired_F = torch.zeros(len(w["b_enc"]), dtype=torch.bool)
    for x_ND in rows_ND.split(CHUNK):
        pre_NF = x_ND @ w["W_enc"] + w["b_enc"]
        if threshold is None:
            value, feature = pre_NF.relu().topk(k, dim=1)
            code_NF = torch.zeros_like(pre_NF).scatter_(1, feature, value)
        else:
            code_NF = pre_NF.masked_fill_(pre_NF <= threshold, 0.0)
        fires_NF = code_NF > 0
        firings += int(fires_NF.sum())
        fired_F |= fires_NF.any(dim=0)
        x_hat_ND = code_NF @ w["W_dec"] + w["b_dec"]
        error += float((x_ND.double() - x_hat_ND).square().sum())
        variance += float((x_ND.double() - mean_D).square().sum())
    return Score(fvu=error / variance, l0=firings / len(rows_ND), dead=float((~fired_F).double().mean()))


@torch.no_grad()
def score_directory(sae: Path, held_out: Path, *, k: int) -> dict[str, object]:
    """Score DIR/sae.safetensors + DIR/sae.json.

    Returns:
        {"own": ..., "matched": ...} of Score fields, "matching" and "cut" (see above; "none" for top-k), and "l0": the
        own path's L0 on the calibration half, which a search for k may look at.
    """
    w = load_file(sae / "sae.safetensors")
    rule = json.loads((sae / "sae.json").read_text())["inference"]
    calibration_ND, evaluation_ND = halves(held_out)
    if rule == "topk":
        own = asdict(score(w, evaluation_ND, k=k, threshold=None))
        return {"inference": rule, "own": own, "matched": own, "matching": "none", "cut": None, "l0": k}
    own = asdict(score(w, evaluation_ND, k=None, threshold=w["threshold"]))
    matching, cut, threshold_F = matched_thresholds(w, calibration_ND, k)
    matched = asdict(score(w, evaluation_ND, k=None, threshold=threshold_F))
    l0 = score(w, calibration_ND, k=None, threshold=w["threshold"]).l0
    return {"inference": rule, "own": own, "matched": matched, "matching": matching, "cut": cut, "l0": l0}

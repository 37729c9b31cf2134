"""Algebra between conventions: bias before or after the shift by `b_dec`, decoder rows of any norm or of norm one.

All of it is computed in float64 and cast to fp32 once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.sae.autoencoder import SparseAutoencoder

UNIT_WITHIN = 1e-6
"""Distance of a row's norm from 1 up to which it counts as a unit row: fp32 rounding leaves about 1e-7."""


class NotFinite(CheckpointError):
    """An SAE has numbers that are not finite. `native_sae` raises it, and `load` adds the file's name."""


def shifted_bias(sae: SparseAutoencoder) -> Tensor:
    """Return b_enc + b_dec @ W_enc [n_features], the bias of an encoder that reads x - b_dec."""
    return (sae.b_enc.detach().double() + sae.b_dec.detach().double() @ sae.W_enc.detach().double()).float()


def has_unit_rows(W_dec: Tensor) -> bool:
    """Return whether all rows of W_dec [n_features, d_model] have norm 1, or 0."""
    norm_F = W_dec.detach().double().norm(dim=1)
    return bool(((norm_F - 1).abs().le(UNIT_WITHIN) | norm_F.eq(0)).all())


def has_zero_rows(W_dec: Tensor) -> bool:
    """Return whether a row of W_dec [n_features, d_model] is zero."""
    return bool(W_dec.detach().eq(0).all(dim=1).any())


def native_sae(
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None = None,
    k: float,
    shifts_input: bool,
    folds_rows: bool,
) -> SparseAutoencoder:
    """Return the native form of an SAE of another convention.

    Where neither folding applies, the tensors are kept bit for bit. Unit rows are never folded.

    Args:
        W_enc: [d_model, n_features].
        b_enc: [n_features].
        W_dec: [n_features, d_model].
        b_dec: [d_model].
        threshold: [n_features], compared with pre-activations before any folding; negative ones count as 0. None for an
            SAE that keeps the k largest.
        k: number of active features a token; 0 where it is not known.
        shifts_input: whether the encoder reads x - b_dec. Then `b_enc` takes up the shift.
        folds_rows: whether rows are scaled to norm 1, and the encoder and thresholds with them. False where the foreign
            program compares pre-activations of different features without their rows' norms.

    Raises:
        NotFinite: a number is not finite. Thresholds may be +inf.
    """
    W_enc, b_enc, W_dec, b_dec = (tensor.detach() for tensor in (W_enc, b_enc, W_dec, b_dec))
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    _check_finite(tensors, threshold)
    if shifts_input:
        b_enc = b_enc.double() - b_dec.double() @ W_enc.double()
    cut = torch.zeros_like(b_enc) if threshold is None else threshold.detach().clamp_min(0)
    if folds_rows and not has_unit_rows(W_dec):
        norm_F = W_dec.double().norm(dim=1)
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        W_enc, b_enc, cut = W_enc.double() * norm_F, b_enc.double() * norm_F, cut.double() * norm_F
        W_dec = W_dec.double() / norm_F[:, None]
    W_enc, b_enc, W_dec, b_dec = (tensor.float().contiguous() for tensor in (W_enc, b_enc, W_dec, b_dec))
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    _check_finite(tensors, cut)  # float64 holds numbers that fp32 does not
    return SparseAutoencoder(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=cut.float(),
        k=k,
        inference="topk" if threshold is None else "threshold",
    ).eval()


def _check_finite(tensors: Mapping[str, Tensor], threshold: Tensor | None) -> None:
    """Refuse numbers that are not finite. Thresholds may be +inf."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if threshold is not None and threshold.isnan().any():
        bad.append("threshold")
    if bad:
        raise NotFinite(
            f"{', '.join(bad)}: holds numbers that are not finite in float32, so the SAE cannot be used. Give another."
        )


def gated_encoder(W_enc: Tensor, *, b_mag: Tensor, b_gate: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor]:
    """Return encoder [d_model, n_features] and thresholds [n_features] of a gated SAE; `b_mag` is its bias.

    A feature is open where x W + b_gate > 0, and its value is relu(e^r x W + b_mag). With pre = e^r x W + b_mag, it is
    open where pre > b_mag - e^r b_gate.
    """
    scale_F = r_mag.double().exp()
    return W_enc.double() * scale_F, b_mag.double() - scale_F * b_gate.double()

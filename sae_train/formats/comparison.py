"""Compare codes and reconstructions of another program with those of an SAE, and make tokens on which errors show.

The SAE's own values are computed in float64, so the differences are those of the other program alone. They come from
rounding in float32 where the programs compute the same function.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sae_train.sae.autoencoder import SparseAutoencoder

BAND = 1e-5
"""Half the width of the band around the cut, over the root mean square of active codes. Rounding decides in it."""
MOST_CODES = 1e-5
MOST_RECONSTRUCTION = 1e-6
AT_THE_CUT = 5e-4
"""Relative distance from the cut at which probes have a pre-activation: a threshold that is off by 0.1% shows."""
BLOCK_BYTES = 64 * 2**20
"""Bytes of a float64 matrix that is held at a time, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """How far an export, as a reader opened it, is from the SAE that was exported. `compare` makes it."""

    reader: str
    """'sae-lens 6.54.12' where that program's own loader was used, else 'built-in reader'."""
    codes: float
    """Largest difference of a code where both fire, over the root mean square of active codes."""
    reconstruction: float
    """Largest norm of a difference of reconstructions, over the norm of the token's reconstruction."""
    support_differences: int
    """Pairs of token and feature, outside the band around the cut, of which one side fires and the other does not."""
    firings: int
    """Pairs that fire."""
    most_codes: float = MOST_CODES
    """Bound on `codes`: 1e-5, or twice the error of the SAE itself in float32 where that is larger."""
    most_reconstruction: float = MOST_RECONSTRUCTION
    """Bound on `reconstruction`: 1e-6, or twice the error of the SAE itself in float32 where that is larger."""

    @property
    def is_equal(self) -> bool:
        """Whether rounding explains all differences. NaN is a difference."""
        near = self.codes <= self.most_codes and self.reconstruction <= self.most_reconstruction
        return near and self.support_differences == 0


@torch.no_grad()
def compare(sae: SparseAutoencoder, x_ND: Tensor, parts: Iterable[tuple[Tensor, Tensor]], *, reader: str) -> Verified:
    """Return the differences of codes and reconstructions from an SAE's own in float64.

    Activations of large norm make the float32 codes of any program inexact, the SAE's own included. The band around
    the cut and the bounds grow with the SAE's own error then. Inside the band either support is right, and the
    reconstruction is compared with one of the support given.

    Args:
        sae: the SAE that was exported, in float32.
        x_ND: raw activations [n, d_model].
        parts: dense codes [m, n_features] and reconstructions [m, d_model] of consecutive stretches of `x_ND`.
        reader: where the codes come from.

    Raises:
        ValueError: the shapes are other ones, or the stretches are not as long as `x_ND`.
    """
    active = sae.encode_sparse(x_ND).value.double()
    scale = float(active.square().mean().sqrt()) if len(active) else 1.0
    codes, reconstruction, own_codes, own_reconstruction, different, first = 0.0, 0.0, 0.0, 0.0, 0, 0
    for code_NF, x_hat_ND in parts:
        rows_ND = x_ND[first : first + len(code_NF)]
        first += len(code_NF)
        check_shapes(sae, rows_ND, code_NF, x_hat_ND)
        pre_NF = _product(rows_ND, sae.W_enc) + sae.b_enc.double()
        own_NF = sae.encode(rows_ND)
        own_error = _code_error(own_NF, pre_NF, own_NF != 0) / scale
        own_codes = _larger(own_codes, own_error)
        own_reconstruction = _larger(
            own_reconstruction, _reconstruction_error(sae, sae.decode(own_NF), pre_NF.where(own_NF != 0, 0))
        )

        cut = _cut(sae, pre_NF)
        fires_NF, given_NF = pre_NF > cut, code_NF != 0
        near_NF = (pre_NF - cut).abs() <= _bound(BAND, own_error) * scale
        different += int((fires_NF.ne(given_NF) & ~near_NF).sum())
        codes = _larger(codes, _code_error(code_NF, pre_NF, fires_NF & given_NF) / scale)
        support_NF = torch.where(near_NF, given_NF, fires_NF)
        reconstruction = _larger(reconstruction, _reconstruction_error(sae, x_hat_ND, pre_NF.where(support_NF, 0)))
    if first != len(x_ND):
        raise ValueError(f"codes of {first} tokens for {len(x_ND)}")
    return Verified(
        reader=reader,
        codes=codes,
        reconstruction=reconstruction,
        support_differences=different,
        firings=len(active),
        most_codes=_bound(MOST_CODES, own_codes),
        most_reconstruction=_bound(MOST_RECONSTRUCTION, own_reconstruction),
    )


def _bound(least: float, own: float) -> float:
    return least if own <= least else 2 * own


def _code_error(code_NF: Tensor, pre_NF: Tensor, pairs_NF: Tensor) -> float:
    """Return the largest error of a code among some pairs."""
    return float((code_NF.double() - pre_NF).abs().where(pairs_NF, 0).max()) if pre_NF.numel() else 0.0


def _reconstruction_error(sae: SparseAutoencoder, x_hat_ND: Tensor, code_NF: Tensor) -> float:
    """Return the largest norm of an error of a reconstruction, over the norm of the reconstruction in float64."""
    exact_ND = _product(code_NF, sae.W_dec) + sae.b_dec.double()
    norm_N = exact_ND.norm(dim=1)
    error_N = (x_hat_ND.double() - exact_ND).norm(dim=1) / torch.where(norm_N > 0, norm_N, 1)
    return float(error_N.max()) if len(error_N) else 0.0


def _larger(one: float, other: float) -> float:
    """Return the larger one of two numbers; NaN where one is NaN."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def check_shapes(sae: SparseAutoencoder, x_ND: Tensor, code_NF: Tensor, x_hat_ND: Tensor) -> None:
    """Raise a ValueError unless codes and reconstructions have the shapes of an SAE's."""
    if code_NF.shape != (len(x_ND), sae.n_features) or x_hat_ND.shape != x_ND.shape:
        given = f"codes {tuple(code_NF.shape)} and reconstructions {tuple(x_hat_ND.shape)}"
        raise ValueError(f"{given} for activations {tuple(x_ND.shape)} and {sae.n_features} features")


def stretches(sae: SparseAutoencoder, x_ND: Tensor) -> Iterator[Tensor]:
    """Yield rows of `x_ND` whose dense codes are small enough to be held."""
    yield from x_ND.split(max(1, BLOCK_BYTES // (8 * sae.n_features)))


def _product(x_NI: Tensor, W_IO: Tensor) -> Tensor:
    """Return x @ W in float64, with a few columns of W in float64 at a time."""
    step = max(1, BLOCK_BYTES // (8 * len(W_IO)))
    x_NI = x_NI.double()
    return torch.cat([x_NI @ W_IO[:, first : first + step].double() for first in range(0, W_IO.shape[1], step)], dim=1)


def _cut(sae: SparseAutoencoder, pre_NF: Tensor) -> Tensor:
    """Return the values above which features fire, [n_features] or [n, 1].

    Under `topk` the cut lies in the middle between the last value that is kept and the next one, so that rounding
    matters only where these two are close.
    """
    if sae.inference == "threshold":
        return sae.threshold.double()
    k = min(round(sae.k), sae.n_features)
    if k == sae.n_features:
        return pre_NF.new_zeros(len(pre_NF), 1)
    last_N2 = pre_NF.topk(k + 1, dim=1).values[:, -2:]
    return torch.where(last_N2[:, 1:] > 0, last_N2.mean(dim=1, keepdim=True), 0)


@torch.no_grad()
def probes(sae: SparseAutoencoder, n_tokens: int = 1024, *, seed: int = 0) -> Tensor:
    """Return tokens [n_tokens, d_model] for which an SAE fires.

    Each is `b_dec` plus a sum of k decoder rows (under `topk` 2 k, so that k matters), plus noise. A row's weight is
    one to three times that with which a typical feature alone passes the cut. With thresholds, half of the tokens are
    then moved along the encoder column of one of their features, until its pre-activation is 0.05% above or below the
    threshold.

    Args:
        sae: in fp32, on raw activations.
        n_tokens: number of tokens.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    per_token = round(sae.k or 8) * (2 if sae.inference == "topk" else 1)
    rows, D = max(1, min(per_token, sae.n_features, 512)), sae.d_model
    gain_F = (sae.W_enc.t() * sae.W_dec).sum(dim=1)
    needed_F = (sae.threshold - sae.b_enc - sae.b_dec @ sae.W_enc).abs() / gain_F
    usable_F = needed_F.isfinite() & (needed_F > 0)
    size = float(needed_F[usable_F].median()) if usable_F.any() else 1.0
    candidates = usable_F.nonzero()[:, 0] if usable_F.any() else torch.arange(sae.n_features)
    feature_NR = candidates[torch.randint(len(candidates), (n_tokens, rows), generator=generator)]
    weight_NR = size * (1 + 2 * torch.rand(n_tokens, rows, generator=generator))
    x_ND = sae.b_dec + functional.embedding_bag(feature_NR, sae.W_dec, per_sample_weights=weight_NR, mode="sum")
    x_ND += 0.1 * size / math.sqrt(D) * torch.randn(n_tokens, D, generator=generator)
    if sae.inference == "threshold":
        moved = x_ND[: n_tokens // 2]
        moved += _to_the_cut(sae, moved, feature_NR[: len(moved), 0], generator)
    return x_ND


def _to_the_cut(sae: SparseAutoencoder, x_ND: Tensor, feature_N: Tensor, generator: torch.Generator) -> Tensor:
    """Return the shift of each token that brings one feature's pre-activation close to its threshold."""
    column_ND = sae.W_enc.t()[feature_N].double()
    pre_N = (x_ND.double() * column_ND).sum(dim=1) + sae.b_enc[feature_N].double()
    side_N = 2.0 * torch.randint(2, (len(x_ND),), generator=generator) - 1
    target_N = sae.threshold[feature_N].double() * (1 + AT_THE_CUT * side_N)
    size_N = column_ND.square().sum(dim=1)
    step_N = torch.where(target_N.isfinite() & (size_N > 0), (target_N - pre_N) / size_N, 0)
    return (step_N[:, None] * column_ND).to(x_ND.dtype)

"""Pre-activations that a product in bf16 has screened: near ones of all pairs, exact ones of those that may be kept.

A processor with bf16 products computes the encoder's five times as fast as in fp32, and what is written and read again
is half as long. Of the result little is kept, so only that is computed once more, in fp32, a row product a pair.
The near ones come with a bound on their error, so no pair is missed: what is kept, and its values, is what the whole
product in the run's precision would have given, but for the order of its sums. That holds for factors whose squares are
fp32 numbers, neither 0 nor infinite, as those of scaled activations are.

Letters: N tokens, F features, D width, P padded width, C candidates.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.backend import has_numba, uses_numba
from sae_train.kernels.screened import FEW, SUM_ROUNDOFF, TINY, Screened
from sae_train.kernels.workspace import Workspace

TILE = 32
"""Numbers of a row that AMX takes at once."""


def screen(
    x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, precision: str, out: Tensor, workspace: Workspace | None = None
) -> Screened:
    """Return x W^T + b, screened; good for as long as neither W nor what was written to `out` is changed.

    Args:
        x_ND: fp32.
        W_FD: fp32.
        b_F: fp32.
        precision: of what is exact: float32, or bf16 for factors rounded to that.
        out: [N, F] bf16 to write the near pre-activations to.
        workspace: which knows W's rows in bf16, and is told x's.
    """
    with torch.no_grad():
        workspace = workspace or Workspace()
        x, W = rounded_rows(x_ND, x_ND.new_ones(len(x_ND))), _known_rows(W_FD, b_F, workspace)
        if uses_numba(x_ND):
            workspace.note(x_ND, padded=x.padded)
        torch.mm(x.padded, W.padded.t(), out=out)
        return screened(out, x_ND, W_FD, b_F, rounded=(x, W), precision=precision)


class Rounded(NamedTuple):
    """Rows in bf16, and behind each a number, so that a product takes the bias in its stride."""

    padded: Tensor
    """[rows, P]: those, then zeros."""
    norm: Tensor
    """[rows] of what they were, fp32."""
    missed: Tensor
    """[rows] norms of what rounding took from them, fp32."""


def rounded_rows(rows: Tensor, last: Tensor) -> Rounded:
    """Return fp32 rows [R, D] in bf16, each with a number of `last` [R] behind it."""
    n_rows, width = rows.shape
    padded = -(-(width + 1) // TILE) * TILE
    if uses_numba(rows, last):
        from sae_train.kernels import numba_rows

        return Rounded(*numba_rows.rounded(rows, last, padded=padded))
    bf16 = rows.new_zeros(n_rows, padded, dtype=torch.bfloat16)
    bf16[:, :width], bf16[:, width] = rows, last
    return Rounded(bf16, rows.norm(dim=1), (rows - bf16[:, :width]).norm(dim=1))


def _known_rows(rows: Tensor, last: Tensor, workspace: Workspace) -> Rounded:
    """Return what `rounded_rows` does, of rows that may have been rounded when they were last written."""
    found: Rounded | None = workspace.noted(rows, "rounded")
    if found is not None:
        found.padded[:, rows.shape[1]] = last
        return found
    found = rounded_rows(rows, last)
    if uses_numba(rows):
        workspace.note(rows, rounded=found)
    return found


def screened(
    near_NF: Tensor, x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, rounded: tuple[Rounded, Rounded], precision: str
) -> Screened:
    """Return what `screen` does for near pre-activations from anywhere.

    By Cauchy and Schwarz |x^ w^ - x w| is at most |x^ - x| |w^| + |x| |w^ - w|, ^ for rounded; to it come the rounding
    of the bias and of both sums, the near one's with the bias in it.

    Args:
        rounded: rows of x and of W.
    """
    x, W = rounded
    width, x_NP, W_FP = x_ND.shape[1], x_ND, W_FD
    if precision == "bf16":
        x_NP, W_FP = x.padded, W.padded
    error_N, error_F = _errors(x, W, b_F, summands=width + 1, are_rounded=precision == "bf16")
    return Screened(
        near_NF=near_NF,
        x_NP=x_NP,
        W_FP=W_FP,
        b_F=b_F,
        width=width,
        error_N1=error_N.unsqueeze(1),
        error_1F=error_F.unsqueeze(0),
    )


def _errors(x: Rounded, W: Rounded, b_F: Tensor, *, summands: int, are_rounded: bool) -> tuple[Tensor, Tensor]:
    """Return the error of a token's near pre-activations at most [N], and of a feature's [F].

    Args:
        are_rounded: whether exact ones are of rounded rows.
    """
    if uses_numba(b_F):
        from sae_train.kernels import numba_rows

        bounds = SUM_ROUNDOFF * summands, summands * TINY
        return numba_rows.errors(x[1:], W[1:], b_F, bounds=bounds, are_rounded=are_rounded)
    near_F = b_F.bfloat16().float()
    bias_F = (b_F - near_F).abs() + SUM_ROUNDOFF * summands * near_F.abs()

    def error(norm_x: Tensor, missed_x: Tensor, norm_W: Tensor, missed_W: Tensor) -> Tensor:
        rounded_x, rounded_W = norm_x + missed_x, norm_W + missed_W
        sums = SUM_ROUNDOFF * summands * rounded_x * rounded_W
        if are_rounded:
            missed_x, missed_W = torch.zeros_like(missed_x), torch.zeros_like(missed_W)
        return missed_x * rounded_W + norm_x * missed_W + sums + summands * TINY * (1 + rounded_x + rounded_W)

    error_N = error(x.norm, x.missed, W.norm.max(), W.missed.max()) + bias_F.max()
    return error_N, error(x.norm.max(), x.missed.max(), W.norm, W.missed) + bias_F


def can_screen(*, n_features: int, kept_a_token: float, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether pre-activations are screened rather than computed whole: where that is faster.

    Args:
        n_features: of this rank.
        kept_a_token: entries that selection may keep of each token, on average.
    """
    is_plain = has_numba(device) and dtype == torch.float32
    return is_plain and kept_a_token <= FEW * n_features and has_bf16_products()


@functools.cache
def has_bf16_products() -> bool:
    """Return whether this processor has AMX, and torch's products make use of it.

    AVX-512 BF16 alone took longer than fp32 on Intel (oneDNN kept to it: 102 ms for 65); on AMD nobody has measured it.
    """
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch's own, so perhaps not for ever
    return has_amx is not None and has_amx() and torch.backends.mkldnn.is_available()

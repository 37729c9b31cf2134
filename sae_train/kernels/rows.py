"""What a step wants to know of rows of activations: their norms and sum, and what a reconstruction misses of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.backend import uses_numba

SUMMED_TOGETHER = 256
"""Rows that are added in their own precision; sums of so many are added in float64."""


class Missed(NamedTuple):
    """Without a graph."""

    error: Tensor
    """x - (x_hat + bias) [..., N, D]."""
    norm: Tensor
    """[..., N] of its rows."""


@torch.no_grad()
def missed(x_ND: Tensor, x_hat: Tensor, bias_D: Tensor | None = None) -> Missed:
    """Return what reconstructions x_hat + bias miss, x_hat being [N, D] or [G, N, D]."""
    bias_D = x_ND.new_zeros(x_ND.shape[1]) if bias_D is None else bias_D
    if uses_numba(x_ND, x_hat, bias_D) and x_ND.is_contiguous() and x_hat.is_contiguous():
        from sae_train.kernels import numba_rows

        return Missed(*numba_rows.missed(x_ND, x_hat, bias_D))
    error = x_ND - (x_hat + bias_D)
    return Missed(error, torch.linalg.vector_norm(error, dim=-1))


@torch.no_grad()
def norms_and_sum(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of each row [N], and the sum of all rows [D] float64."""
    if uses_numba(x_ND):
        from sae_train.kernels import numba_rows

        norm_N, sum_CD = numba_rows.norms_and_sums(x_ND, together=SUMMED_TOGETHER)
    else:
        norm_N = torch.linalg.vector_norm(x_ND, dim=1)
        sum_CD = torch.stack([part.sum(0) for part in x_ND.split(SUMMED_TOGETHER)])
    return norm_N, sum_CD.sum(0, dtype=torch.float64)


@torch.no_grad()
def scaled_and_sum(rows: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [..., D] times a scalar, and the sum of the result [D]; the sum of an fp32 one has an order."""
    if not uses_numba(rows, factor):
        scaled = rows * factor
        return scaled, scaled.flatten(0, -2).sum(0)
    from sae_train.kernels import numba_rows

    scaled, sum_CD = numba_rows.scaled_and_sums(rows, float(factor), together=SUMMED_TOGETHER)
    return scaled, sum_CD.sum(0)

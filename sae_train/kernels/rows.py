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
    """x - x_hat [..., N, D]."""
    norm: Tensor
    """[..., N] of its rows."""


@torch.no_grad()
def missed(x_ND: Tensor, x_hat: Tensor) -> Missed:
    """Return what reconstructions [N, D] or [G, N, D] miss."""
    if uses_numba(x_ND, x_hat) and x_ND.is_contiguous() and x_hat.is_contiguous():
        from sae_train.kernels import numba_rows

        return Missed(*numba_rows.missed(x_ND, x_hat))
    error = x_ND - x_hat
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

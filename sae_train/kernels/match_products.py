"""One dot product a match: of a token's row and a feature's row."""

import functools
import warnings

import torch
from torch import Tensor

from sae_train.kernels.backend import uses_triton
from sae_train.kernels.bags import zero_unused

GATHERED = 1 << 24
"""Numbers of either side that are gathered at once on a device without Triton."""


def row_products(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, token_M: Tensor, start_N: Tensor) -> Tensor:
    """Return each match's product of its token's row and its feature's row of W [M], 0 in unused slots; no graph.

    >>> rows, W = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> feature, token = torch.tensor([0, 1, 1]).int(), torch.tensor([0, 0, 1]).int()
    >>> row_products(rows, W, feature, token, start_N=torch.tensor([0, 2, 3]).int())
    tensor([1., 2., 4.])

    Rows are of any float type. Triton's products of bf16 rows are fp32. Slots are as in `Matches`.
    """
    with torch.no_grad():
        if uses_triton(rows_ND.device):
            from sae_train.kernels import triton_match_products

            return triton_match_products.row_products(rows_ND, W_FD, feature_M, start_N)
        if rows_ND.device.type == "cpu" and rows_ND.dtype in (torch.float32, torch.float64):
            return _sampled(rows_ND.contiguous(), W_FD, feature_M, start_N)
        return zero_unused(_gathered(rows_ND, W_FD, feature_M, token_M), start_N)


def _sampled(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, start_N: Tensor) -> Tensor:
    """Return the products as a dense product that is sampled at the places of a sparse matrix."""
    used = int(start_N[-1])
    _silence_beta_warning()
    size, zeros = (len(rows_ND), len(W_FD)), rows_ND.new_zeros(used)
    places = torch.sparse_csr_tensor(start_N, feature_M[:used], zeros, size=size, check_invariants=False)
    product = torch.sparse.sampled_addmm(places, rows_ND, W_FD.t(), beta=0).values()
    return torch.nn.functional.pad(product, (0, len(feature_M) - used))


def _gathered(rows_ND: Tensor, W_FD: Tensor, feature_M: Tensor, token_M: Tensor) -> Tensor:
    """Return the products from gathered rows, in chunks whose size does not depend on values."""
    step = max(1, GATHERED // max(1, rows_ND.shape[1]))
    chunks = zip(token_M.split(step), feature_M.split(step), strict=True)
    return torch.cat([(rows_ND.index_select(0, t) * W_FD.index_select(0, f)).sum(1) for t, f in chunks])


@functools.cache
def _silence_beta_warning() -> None:
    """Trigger torch's warning about sparse CSR tensors, which it gives once a process, where nobody sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)

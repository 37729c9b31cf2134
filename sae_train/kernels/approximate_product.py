"""Pre-activations from a bf16 product, which only find candidates.

Selection keeps 1.1 times its budget of the approximate pre-activations. These candidates get values by fp32 row
products of fp32 factors, and the cut is made over the values. With AMX the bf16 product takes a sixth of the time.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.match_products import row_products
from sae_train.kernels.matches import Matches

MORE = 1.1
"""Candidates over the budget of each cut."""


class Approximate(NamedTuple):
    """Approximate pre-activations and the factors that exact ones are computed from.

    `approximate` creates it, and the `select_*` functions read it in the place of pre-activations.
    It is valid until its factors or its memory change.
    """

    bf16_NF: Tensor
    """[N, F] bf16."""
    x_ND: Tensor
    W_FD: Tensor
    b_F: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.bf16_NF.shape

    def exact(self, found: Matches) -> tuple[Tensor, Tensor]:
        """Return the flat index [M] of each candidate and its fp32 pre-activation; N*F and 0 in unused slots."""
        n_tokens, width = self.bf16_NF.shape
        value_M = row_products(self.x_ND, self.W_FD, found.feature, found.token, found.start)
        is_used = torch.arange(len(value_M), device=value_M.device) < found.start[-1]
        index_M = found.token.long() * width + found.feature
        value_M = torch.where(is_used, value_M + self.b_F.index_select(0, found.feature), 0)
        return torch.where(is_used, index_M, n_tokens * width), value_M


PreActivations = Tensor | Approximate
"""Of a batch [N, F]: exact ones, or approximate ones with the factors of exact ones."""


def approximate(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, out: Tensor | None = None) -> Approximate:
    """Return x W^T + b by a product in bf16, without a graph.

    >>> found = approximate(torch.tensor([[1.0, 0.001]]), torch.ones(1, 2), torch.zeros(1))
    >>> found.bf16_NF
    tensor([[1.]], dtype=torch.bfloat16)
    >>> slots = torch.zeros(1).int()
    >>> found.exact(Matches(torch.ones(1), slots, slots, torch.tensor([0, 1]).int()))
    (tensor([0]), tensor([1.0010]))

    Args:
        out: [N, F] bf16 to write to. A step that passes the same tensor again saves page faults.
    """
    with torch.no_grad():
        x_ND, W_FD, b_F = x_ND.detach(), W_FD.detach(), b_F.detach()
        bf16_NF = torch.addmm(b_F.bfloat16(), x_ND.bfloat16(), W_FD.bfloat16().t(), out=out)
        return Approximate(bf16_NF, x_ND, W_FD, b_F)


def more_than(budget: int) -> int:
    """Return the number of candidates for a budget."""
    return math.ceil(MORE * budget)

"""The activations that one step learns from, as a rank holds them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.harvest.batch import Batch
from sae_train.ranks.interface import Ranks


@dataclass(frozen=True, slots=True)
class RowBatch:
    """One batch's tokens that the ranks of a row of the grid share. `Trainer` makes it; every `Learner` reads it.

    Letters: N tokens of the row, n tokens that this rank harvested, D d_model.
    """

    x_ND: Tensor
    """Normalised activations."""
    gradient_ND: Tensor | None
    """The language model's gradient at each activation, where the run harvests gradients."""
    own: slice
    """The tokens of the row that this rank harvested."""
    norm_N: Tensor
    """Norms of the activations that this rank harvested, [n]."""
    sum_D: Tensor
    """Sum of the activations that this rank harvested, float64."""


def gathered(own: Batch, *, ranks: Ranks) -> RowBatch:
    """Return the batch of a row of ranks. Collective.

    Args:
        own: the tokens that this rank harvested, n of them.
        ranks: whose `features` are the ranks of the row.
    """
    row, n_own = ranks.features, len(own)
    both = own.map(lambda own_ND: row.gather(own_ND).flatten(0, 1))
    return RowBatch(
        x_ND=both.x_ND,
        gradient_ND=both.gradient_ND,
        own=slice(row.rank * n_own, (row.rank + 1) * n_own),
        norm_N=torch.linalg.vector_norm(own.x_ND, dim=1),
        sum_D=own.x_ND.sum(0, dtype=torch.float64),
    )

"""The activations that one step learns from, as a rank holds them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.harvest.batch import Batch
from sae_train.ranks.interface import Ranks


@dataclass(frozen=True, slots=True)
class RowBatch:
    """One batch's tokens that the ranks of a row of the grid share. `Trainer` makes it; every `Learner` reads it.

    Letters: N tokens of the row, n tokens that this rank counts, D d_model.
    """

    x_ND: Tensor
    """Normalised activations."""
    gradient_ND: Tensor | None
    """The language model's gradient at each activation, where the run harvests gradients."""
    own: slice
    """The tokens of the row that this rank counts in its statistics: those that it harvested, or all of them."""
    norm_N: Tensor
    """Norms of these activations, [n]."""
    sum_D: Tensor
    """Sum of these activations, float64."""


def gathered(own: Batch, *, ranks: Ranks, counts_all: bool) -> RowBatch:
    """Return the batch of a row of ranks. Collective.

    Args:
        own: the tokens that this rank harvested, n of them.
        ranks: whose `features` are the ranks of the row.
        counts_all: whether this rank's statistics are of all tokens of the row, because no other rank has the SAE.
    """
    row, n_own = ranks.features, len(own)
    both = own.map(lambda own_ND: row.gather(own_ND).flatten(0, 1))
    counted = slice(0, len(both)) if counts_all else slice(row.rank * n_own, (row.rank + 1) * n_own)
    return RowBatch(
        x_ND=both.x_ND,
        gradient_ND=both.gradient_ND,
        own=counted,
        norm_N=torch.linalg.vector_norm(both.x_ND[counted], dim=1),
        sum_D=both.x_ND[counted].sum(0, dtype=torch.float64),
    )

"""Rows that training takes from a stream: activations, and gradients where a run harvests them.

Letters: N rows, D d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Normalised activations, one a row, and perhaps the gradient at each of them.

    A stream makes one for every step, and the trainer reads it. A pool keeps its unread rows in another.
    """

    x_ND: Tensor
    """Normalised activations."""
    gradient_ND: Tensor | None = None
    """Gradients of the language model's loss at the same tokens, scaled. None where the run harvests none."""

    @classmethod
    def empty(cls, *shape: int, gradients: bool, dtype: torch.dtype, device: torch.device) -> "Batch":
        """Return uninitialised rows of `shape` [..., N, D], with room for gradients if `gradients`."""
        x_ND = torch.empty(shape, dtype=dtype, device=device)
        return cls(x_ND, torch.empty_like(x_ND) if gradients else None)

    def __len__(self) -> int:
        return len(self.x_ND)

    def __getitem__(self, index: Any) -> "Batch":
        """Return some of the rows. A slice gives a view, as it does for a tensor."""
        return self.map(lambda rows_ND: rows_ND[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch of `function`'s results for the activations and for the gradients."""
        return Batch(function(self.x_ND), None if self.gradient_ND is None else function(self.gradient_ND))

    def copy_(self, other: "Batch") -> None:
        """Overwrite the rows with those of `other`, which has the same shape."""
        self.x_ND.copy_(other.x_ND)
        if self.gradient_ND is not None:
            assert other.gradient_ND is not None
            self.gradient_ND.copy_(other.gradient_ND)

"""Memory that the SAEs of a run share: only one of them computes at a time."""

import torch
from torch import Tensor


class Scratch:
    """A matrix that is overwritten by every step of every SAE. `build_trainer` makes one for all learners.

    It grows to the largest matrix that was asked for. A fresh matrix a step would cost page faults on a CPU.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def matrix(self, n_rows: int, n_columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised matrix [n_rows, n_columns]. The next call may return the same memory."""
        held, size = self._held.get(dtype), n_rows * n_columns
        if held is None or len(held) < size:
            held = self._held[dtype] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(n_rows, n_columns)

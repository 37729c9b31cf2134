"""Rows that lie in several tensors, as those of a folder of files do, gathered by index.

Letters: P parts, R rows of all parts, N rows that are asked for, D width.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor


class RowTable:
    """Rows of several tensors, one after another.

    Attributes:
        starts: [P + 1] int64, the first row of each part, and R.
    """

    def __init__(self, parts: Iterable[Tensor]) -> None:
        """Args:
        parts: at least one [., D] each, on a CPU, of any number format; perhaps files that are read only where they are
            asked for. They stay where they are in memory while the table is used.
        """
        self._parts = tuple(parts)
        self._width = self._parts[0].shape[1]
        assert all(part.shape[1] == self._width for part in self._parts)
        self.starts = torch.tensor([0, *map(len, self._parts)]).cumsum(0)

    def rows(self, index_N: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return the rows [N, D] at int64 indices of 0..R-1, in their order."""
        if len(self._parts) == 1:
            return self._parts[0].index_select(0, index_N).to(dtype)
        out_ND = torch.empty(len(index_N), self._width, dtype=dtype)
        ascending_N, order = index_N.sort()
        bounds = torch.searchsorted(ascending_N, self.starts).tolist()
        for part, (low, high) in enumerate(pairwise(bounds)):
            if low < high:
                place = ascending_N[low:high] - self.starts[part]
                out_ND.index_copy_(0, order[low:high], self._parts[part].index_select(0, place).to(dtype))
        return out_ND

    @torch.no_grad()
    def normalised(self, index_N: Tensor, centre_D: Tensor, scale: float) -> Tensor:
        """Return (row - centre) / scale of the rows at int64 indices of 0..R-1 [N, D], in the centre's format."""
        assert centre_D.shape == (self._width,)
        return (self.rows(index_N, dtype=centre_D.dtype) - centre_D).div_(scale)

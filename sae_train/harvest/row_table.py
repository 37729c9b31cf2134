"""Rows that lie in several tensors, gathered by index.

Letters: P parts, R rows of all parts, N rows that are gathered, D width.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor


class RowTable:
    """Rows of several tensors, one after another. `TensorTable` makes one of the tensors of a folder's files.

    Attributes:
        starts: [P + 1] int64, the first row of each part, and R.
    """

    def __init__(self, parts: Iterable[Tensor]) -> None:
        """Args:
        parts: at least one [., D] each, on a CPU, of any number format. They may be mapped files.
        """
        self._parts = tuple(parts)
        self._width = self._parts[0].shape[1]
        assert all(part.shape[1] == self._width for part in self._parts)
        self.starts = torch.tensor([0, *map(len, self._parts)]).cumsum(0)

    def rows(self, index_N: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return the rows [N, D] at int64 indices of 0..R-1, in their order.

        Every part is read in ascending order. Example: with parts of 2 rows each, indices [3, 0] give the second row
        of the second part, then the first row of the first.
        """
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

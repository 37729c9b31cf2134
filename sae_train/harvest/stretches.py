"""How text is shared out over lanes: bounded pieces in one keyed order, cut into stretches of equal length.

Every lane gives an equal share of each batch. So that what is trained on has the corpus's own mixture, each lane must
hold the same mixture and the same amount: dealing documents by their number would follow any period of the file, and
dealing whole documents would let a long one fill a lane. Length is measured in tokens where lanes have so few pieces
that these may differ much in tokens a byte; else in bytes. Nothing here reads text. Letters: P pieces.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sae_train.sae.random import keyed_order

LEAST_PIECE_BYTES = 4 * 1024
BYTES_A_TOKEN = 4
"""Of usual text, roughly: for how long a piece is to be beside a context."""
PIECES_A_LANE = 8
"""A lane of a short text still holds about as many pieces, so that lanes have the same mixture."""
WINDOW_SHARE = 4
"""A cut may move on to the next line end or blank within this part of a piece."""
LANE_WINDOW_SHARE = 16
"""And within this part of a lane's stretch."""


def piece_bytes_of(total_bytes: int, *, lanes: int, context_length: int) -> int:
    """Return how long pieces are at most: 4 kB or a context's text, less in a text that is short for its lanes."""
    context = BYTES_A_TOKEN * context_length
    return min(max(LEAST_PIECE_BYTES, context), max(context, total_bytes // (PIECES_A_LANE * lanes)))


Measure = Callable[[Tensor], Tensor | None]
"""Returns how long pieces are, int64 [P], given document, first byte and last byte + 1 of each, [P, 3]; None: bytes."""


def _in_bytes(_segments: Tensor) -> None:
    return None


class Stretches:
    """The pieces of every lane.

    Attributes:
        lanes: how many stretches.
        window: bytes within which a cut moves on to a line end or a blank.
    """

    def __init__(
        self, n_bytes: Tensor, *, measure: Measure = _in_bytes, lanes: int, context_length: int, seed: int
    ) -> None:
        """Args:
        n_bytes: int64 [documents]; 0 for those that no lane is to read.
        measure: what stretches are to have equally much of; None: bytes.
        lanes: how many stretches.
        context_length: tokens a context.
        seed: data.seed, which draws the order of the pieces.
        """
        total = int(n_bytes.sum())
        piece_bytes = piece_bytes_of(total, lanes=lanes, context_length=context_length)
        self.lanes = lanes
        self.window = min(piece_bytes // WINDOW_SHARE, total // (LANE_WINDOW_SHARE * lanes))
        step = max(1, piece_bytes - self.window)
        self._n_bytes = n_bytes
        self._n_pieces = (n_bytes + step - 1) // step
        self._first = self._n_pieces.cumsum(0) - self._n_pieces
        self._order = keyed_order(int(self._n_pieces.sum()), seed, "pieces")
        pieces = self._pieces(self._order)
        length_P = measure(pieces)
        length_P = pieces[:, 2] - pieces[:, 1] if length_P is None else length_P
        self._ends = length_P.clamp(min=1).cumsum(0)  # a piece without any length would belong to no lane
        whole = int(self._ends[-1]) if len(self._ends) else 0
        self._bounds = [whole * lane // lanes for lane in range(lanes + 1)]

    def segments(self, lane: int) -> Tensor:
        """Return a lane's pieces, int64 [n, 3]: document, first byte, last byte + 1; the outer ones may be cut."""
        low, high = self._bounds[lane], self._bounds[lane + 1]
        if low == high:
            return torch.empty(0, 3, dtype=torch.int64)
        first = int(torch.searchsorted(self._ends, low, right=True))
        last = int(torch.searchsorted(self._ends, high, right=False))
        document_P, start_P, stop_P = self._pieces(self._order[first : last + 1]).unbind(dim=1)
        ends_P = self._ends[first : last + 1]
        begins_P = torch.cat([self._ends[first - 1 : first] if first else ends_P.new_zeros(1), ends_P[:-1]])
        length_P, n_bytes_P = ends_P - begins_P, stop_P - start_P
        cut_start_P = start_P + (low - begins_P).clamp(min=0) * n_bytes_P // length_P
        cut_stop_P = torch.minimum(stop_P, start_P + (high - begins_P) * n_bytes_P // length_P)
        return torch.stack([document_P, cut_start_P, cut_stop_P], dim=1)

    def _pieces(self, number_P: Tensor) -> Tensor:
        """Return document, first byte and last byte + 1 of pieces, int64 [P, 3]."""
        document_P = torch.searchsorted(self._first, number_P, right=True) - 1
        part_P = number_P - self._first[document_P]
        n_bytes_P, n_parts_P = self._n_bytes[document_P], self._n_pieces[document_P]
        stops = part_P * n_bytes_P // n_parts_P, (part_P + 1) * n_bytes_P // n_parts_P
        return torch.stack([document_P, *stops], dim=1)

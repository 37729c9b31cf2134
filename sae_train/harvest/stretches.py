"""How text is shared out over lanes: bounded pieces in one keyed order, cut into stretches of equal length.

Every lane gives an equal share of each batch. So that what is trained on has the corpus's own mixture, each lane must
hold the same mixture and the same amount: dealing documents by their number would follow any period of the file, and
dealing whole documents would let a long one fill a lane. Length is counted in tokens where the text is so short that
counting them is quick and a lane's few pieces may differ much in tokens a byte; else in bytes. Nothing here reads text.
Letters: P pieces.
"""

import torch
from torch import Tensor

from sae_train.harvest.keys import keyed_order

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


class Stretches:
    """The pieces of every lane.

    Attributes:
        lanes: how many stretches.
        window: bytes within which a cut moves on to a line end or a blank.
    """

    def __init__(
        self, n_bytes: Tensor, *, n_tokens: Tensor | None = None, lanes: int, context_length: int, seed: int
    ) -> None:
        """Args:
        n_bytes: int64 [documents]; 0 for those that no lane is to read.
        n_tokens: int64 [documents], what stretches are to have equally much of; None: bytes.
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
        self._length = n_bytes if n_tokens is None else torch.where(n_bytes > 0, n_tokens, 0)
        self._n_pieces = (n_bytes + step - 1) // step
        self._first = self._n_pieces.cumsum(0) - self._n_pieces
        self._order = keyed_order(int(self._n_pieces.sum()), seed, "pieces")
        start_P, stop_P = self._spans(self._order, self._length)
        self._ends = (stop_P - start_P).cumsum(0)
        whole = int(self._length.sum())
        self._bounds = [whole * lane // lanes for lane in range(lanes + 1)]

    def segments(self, lane: int) -> Tensor:
        """Return a lane's pieces, int64 [n, 3]: document, first byte, last byte + 1; the outer ones may be cut."""
        low, high = self._bounds[lane], self._bounds[lane + 1]
        first = int(torch.searchsorted(self._ends, low, right=True))
        last = int(torch.searchsorted(self._ends, high, right=False))
        if low == high:
            return torch.empty(0, 3, dtype=torch.int64)
        number_P = self._order[first : last + 1]
        start_P, stop_P = self._spans(number_P, self._n_bytes)
        length_P = torch.sub(*reversed(self._spans(number_P, self._length)))
        begins_P = self._ends[first : last + 1] - length_P  # where they lie in the row of all pieces
        n_bytes_P, length_P = stop_P - start_P, length_P.clamp(min=1)
        cut_start_P = start_P + (low - begins_P).clamp(min=0) * n_bytes_P // length_P
        cut_stop_P = torch.minimum(stop_P, start_P + (high - begins_P) * n_bytes_P // length_P)
        return torch.stack([self._document(number_P), cut_start_P, cut_stop_P], dim=1)

    def _document(self, number_P: Tensor) -> Tensor:
        """Return the document of each piece, [P]."""
        return torch.searchsorted(self._first, number_P, right=True) - 1

    def _spans(self, number_P: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Return where in its document each piece begins and ends, [P], in the unit of the documents' `length`."""
        document_P = self._document(number_P)
        part_P = number_P - self._first[document_P]
        length_P, n_parts_P = length[document_P], self._n_pieces[document_P]
        return part_P * length_P // n_parts_P, (part_P + 1) * length_P // n_parts_P

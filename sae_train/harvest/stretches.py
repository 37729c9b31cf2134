"""The shares of text that lanes get: bounded pieces in one keyed order, cut into stretches of equal length.

Every lane gives an equal share of each batch. For batches with the corpus's own mixture, each lane must hold the same
mixture and the same amount of text. Documents dealt by their number would follow any period of the file, and a long
document dealt whole would fill a lane. Length is measured in tokens where lanes have few pieces, which may differ in
tokens a byte, else in bytes. Nothing here reads text. Letters: P pieces.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sae_train.sae.random import keyed_order

LEAST_PIECE_BYTES = 4 * 1024
BYTES_A_TOKEN = 4
"""Rough bytes of a token of usual text, to compare a piece with a context."""
PIECES_A_LANE = 8
"""Rough pieces of a lane of a short text, so that lanes have the same mixture."""
WINDOW_SHARE = 4
"""A cut moves on to a line end or blank within at most this fraction (1/4) of a piece."""
LANE_WINDOW_SHARE = 16
"""A cut moves on within at most this fraction (1/16) of a lane's stretch."""


def piece_bytes_of(total_bytes: int, *, lanes: int, context_length: int) -> int:
    """Return the most bytes of a piece: 4 KiB or a context's text, less in a text that is short for its lanes."""
    context = BYTES_A_TOKEN * context_length
    return min(max(LEAST_PIECE_BYTES, context), max(context, total_bytes // (PIECES_A_LANE * lanes)))


Measure = Callable[[Tensor], Tensor | None]
"""Maps pieces [P, 3] (document, first byte, last byte + 1) to their lengths, int64 [P], or to None for bytes."""


def _in_bytes(_segments: Tensor) -> None:
    return None


class Stretches:
    """The pieces of every lane. `Corpus` makes it, and each `Lane` reads its own.

    Attributes:
        lanes: number of stretches.
        window: bytes within which a cut moves on to a line end or a blank.
    """

    def __init__(
        self, n_bytes: Tensor, *, measure: Measure = _in_bytes, lanes: int, context_length: int, seed: int
    ) -> None:
        """Args:
        n_bytes: int64 [documents], lengths of the documents; 0 for those that no lane reads.
        measure: measures pieces. All stretches get the same length.
        lanes: number of stretches.
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
        """Return a lane's pieces, int64 [n, 3]: document, first byte, last byte + 1.

        The first and the last piece may be cut, and the neighbouring lane then has the rest.
        """
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

"""How similar decoder rows are to each other."""

import torch
from torch import Tensor

from sae_train.evaluation.metric import Metric, Subject
from sae_train.ranks.interface import Ranks

COMPARED_ROWS = 1024
"""Rows of W_dec that are compared at a time."""


class DecoderCosine(Metric):
    """decoder_cosine_max: the mean over features of the largest cosine to another feature's decoder row."""

    in_rows = ("decoder_cosine_max",)

    def __init__(self, subject: Subject) -> None:
        self._W_dec_FD, self._n_features = subject.sae.W_dec, subject.n_features

    def figures(self, ranks: Ranks) -> dict[str, float]:
        cosine_F = decoder_cosine_max(self._W_dec_FD, n_features=self._n_features, ranks=ranks)
        return {"decoder_cosine_max": float(ranks.features.sum(cosine_F.double().sum())) / self._n_features}


@torch.no_grad()
def decoder_cosine_max(W_dec_FD: Tensor, *, n_features: int, ranks: Ranks) -> Tensor:
    """Return [F]: the largest cosine of each of this rank's decoder rows to another feature's row. Collective.

    Rows have unit norm. The row's shards are broadcast one by one, so that a rank holds two at most.
    """
    row = ranks.features
    largest_F = W_dec_FD.new_full((len(W_dec_FD),), -1.0)
    for column, (low, high) in enumerate(row.slices(n_features)):
        own = column == row.rank
        other_FD = row.broadcast(
            W_dec_FD.detach() if own else W_dec_FD.new_empty(high - low, W_dec_FD.shape[1]), column
        )
        for first in range(0, len(W_dec_FD), COMPARED_ROWS):
            cosine = W_dec_FD[first : first + COMPARED_ROWS] @ other_FD.T
            if own:
                cosine.diagonal(first).fill_(-1.0)
            compared_F = largest_F[first : first + COMPARED_ROWS]
            torch.maximum(compared_F, cosine.max(1).values, out=compared_F)
    return largest_F

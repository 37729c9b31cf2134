"""The forward pass of an SAE whose features are sharded over the ranks of a row.

Each rank brings its own tokens. The row gathers them, every rank encodes all of them with its features, and the parts
of their reconstructions are summed over the row. One process is a row of one rank.

Letters: N this rank's tokens, R the row's tokens, D d_model, F this rank's features.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import CHUNK_BYTES, SparseAutoencoder, joined
from sae_train.sae.code import SparseCode


class Reconstruction(NamedTuple):
    """The whole SAE's result for some tokens. `reconstruct` creates it; metrics read it."""

    x_hat_ND: Tensor
    """[N, D] reconstructions of this rank's tokens."""
    l0_N: Tensor
    """[N] int64 number of features of the whole dictionary that fire on each of these tokens."""
    fired_F: Tensor
    """[F] int64 number of the row's tokens on which each of this rank's features fires."""


@torch.no_grad()
def reconstruct(sae: SparseAutoencoder, raw_ND: Tensor, *, n_features: int, ranks: Ranks) -> Reconstruction:
    """Return the whole SAE's reconstruction of this rank's tokens. Collective over the row.

    Args:
        sae: this rank's features, and the whole `b_dec`.
        raw_ND: [N, D] this rank's raw activations. Each rank of the row may bring a different number, or none.
        n_features: width of the whole dictionary.
        ranks: the grid.
    """
    row = ranks.features
    counts = row.gather(torch.tensor(len(raw_ND), device=raw_ND.device)).tolist()
    first = sum(counts[: row.rank])
    own = slice(first, first + len(raw_ND))
    code = _encode(sae, row.gather_rows(raw_ND).to(sae.W_enc.dtype), n_features=n_features, ranks=ranks)
    part_RD = kernels.decode(code.value, sae.W_dec, code.feature, code.token, code.start)
    return Reconstruction(
        x_hat_ND=row.sum(part_RD)[own] + sae.b_dec,
        l0_N=row.sum(code.start.diff().to(torch.int64))[own],
        fired_F=code.firing_counts(),
    )


def _encode(sae: SparseAutoencoder, rows_RD: Tensor, *, n_features: int, ranks: Ranks) -> SparseCode:
    """Return this rank's features of the code; over the row the codes obey the SAE's rule."""
    if sae.inference == "threshold" or len(rows_RD) == 0:
        return sae.encode_sparse(rows_RD, check_finite=False)  # an error on one rank would leave the others waiting
    matches = _largest(sae, rows_RD, n_features=n_features, ranks=ranks)
    return joined(matches, shape=(len(rows_RD),), n_features=sae.n_features)


def _largest(sae: SparseAutoencoder, rows_RD: Tensor, *, n_features: int, ranks: Ranks) -> Iterator[kernels.Matches]:
    """Yield the k largest of each token over all features, stretch by stretch, the same stretches on every rank."""
    k = min(round(sae.k), n_features)
    widest = -(-n_features // ranks.features.size)
    for stretch_RD in torch.split(rows_RD, max(1, CHUNK_BYTES // (widest * rows_RD.element_size()))):
        pre_RF = torch.addmm(sae.b_enc, stretch_RD, sae.W_enc)
        matches = kernels.select_rows(pre_RF, k=k, capacity=k * len(pre_RF), n_features=n_features, ranks=ranks)
        used = int(matches.start[-1])
        yield kernels.Matches(matches.value[:used], matches.feature[:used], matches.token[:used], matches.start)

"""Nested dictionaries: prefixes reconstruct by themselves (Matryoshka, Bussmann et al. 2025, arXiv 2503.17547).

General features come first, because the smallest prefix has to do with them alone. Selection, codes and the exported
autoencoder are those of any other run; only the loss differs: the sum over prefixes, unweighted, as in the paper.
"""

from itertools import pairwise

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import MatryoshkaConfig, NestingConfig
from sae_train.errors import ConfigError
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, DenseCode
from sae_train.sae.losses import squared_error
from sae_train.sae.trainable import TrainableAutoencoder, sum_of_shares

SEARCHED = 4096
"""How far from the given n_features one that all prefixes divide is looked for."""


def prefix_sizes(nesting: NestingConfig, *, n_features: int) -> tuple[int, ...]:
    """Return how many features each prefix has, ascending, the last all; just the last without nesting.

    Raises:
        ConfigError: a share of the features is not a whole number of them.
    """
    if not isinstance(nesting, MatryoshkaConfig):
        return (n_features,)
    sizes = _sizes(nesting.prefixes, n_features)
    if sizes is not None:
        return sizes
    share = next(share for share in nesting.prefixes if _sizes([share], n_features) is None)
    problem = f"nesting.prefixes: {share:g} of n_features={n_features} is {share * n_features:g}, not a whole number."
    below = range(n_features - 1, max(0, n_features - SEARCHED), -1)
    above = range(n_features + 1, n_features + SEARCHED)
    near = (next((n for n in where if _sizes(nesting.prefixes, n)), None) for where in (below, above))
    found = " or ".join(str(n) for n in near if n is not None)
    raise ConfigError(f"{problem} {f'Nearest n_features: {found}.' if found else 'Choose other shares.'}")


def _sizes(shares: list[float], n_features: int) -> tuple[int, ...] | None:
    """Return the prefixes' sizes; None where one is not whole or empty."""
    sizes = [round(share * n_features) for share in shares]
    whole = all(abs(size - share * n_features) < 1e-6 * n_features for size, share in zip(sizes, shares, strict=True))
    return tuple(sizes) if whole and sizes[0] > 0 else None


def reconstruct(
    dictionary: TrainableAutoencoder, x_ND: Tensor, code: Code, *, sizes: tuple[int, ...], n_tokens: int, ranks: Ranks
) -> tuple[kernels.Missed, Tensor]:
    """Return what the reconstruction from all features misses [N, D], and the loss.

    That is the sum of `reconstruction_loss` over prefixes, a scalar.

    Args:
        sizes: of the prefixes, as `prefix_sizes` gives them.
        n_tokens: of the global batch.
    """
    has_one = len(sizes) == 1
    if has_one:
        x_hat = dictionary.decode(code, ranks=ranks, bias=False)
    else:
        x_hat = decode_prefixes(dictionary, code, sizes, ranks=ranks)
    missed = kernels.missed(x_ND, x_hat, dictionary.b_dec)
    of_all = missed if has_one else kernels.Missed(*(each[-1] for each in missed))
    return of_all, squared_error(x_hat, missed, dictionary.b_dec) / n_tokens


def decode_prefixes(dictionary: TrainableAutoencoder, code: Code, sizes: tuple[int, ...], *, ranks: Ranks) -> Tensor:
    """Return the reconstructions from the first sizes[g] features [G, N, D] without the bias; differentiable.

    A token's matches are sorted by feature, so those of one group of features between two prefixes stand together: a
    bag for each token and group costs the matches once, and the running sum over groups makes prefixes of them.

    Args:
        sizes: of the prefixes, over all ranks' features.
        ranks: whose `features` hold the other shares.
    """
    n_tokens, n_groups = code.n_tokens, len(sizes)
    lo, hi = ranks.features.slice(sizes[-1])
    ends = torch.tensor([min(max(size, lo), hi) - lo for size in sizes[:-1]], dtype=torch.int32)
    if isinstance(code, DenseCode):
        between = pairwise([0, *ends.tolist(), hi - lo])
        own = [code.value[:, a:b] @ dictionary.W_dec[a:b] for a, b in between]
        rows = torch.stack(own, dim=1)
        return _prefixes(rows, ranks)
    group_M = torch.bucketize(code.feature, ends.to(code.feature.device), right=True, out_int32=True)
    bag_M = code.token * n_groups + group_M
    used_M = torch.arange(len(bag_M), device=bag_M.device) < code.start[-1]
    bounds = torch.arange(n_tokens * n_groups + 1, dtype=torch.int32, device=bag_M.device)
    start = torch.searchsorted(torch.where(used_M, bag_M, n_tokens * n_groups), bounds, out_int32=True)
    places = code.feature, torch.where(used_M, bag_M, 0), start
    rows = dictionary.bags(code, dictionary.W_dec, *places)
    return _prefixes(rows.view(n_tokens, n_groups, -1), ranks)


def _prefixes(groups_NGD: Tensor, ranks: Ranks) -> Tensor:
    """Return the running sums over groups, of all ranks' features [G, N, D]."""
    return sum_of_shares(groups_NGD, ranks).cumsum(1).transpose(0, 1)

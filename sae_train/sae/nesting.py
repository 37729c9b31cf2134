"""Nested dictionaries: prefixes reconstruct by themselves (Matryoshka, Bussmann et al. 2025, arXiv 2503.17547).

General features come first, because the smallest prefix has to do with them alone. Selection, codes and the exported
autoencoder are those of any other run; only the loss differs: the sum over prefixes, unweighted, as in the paper.
"""

from itertools import pairwise

import torch
from torch import Tensor

from sae_train.config import MatryoshkaConfig, NestingConfig
from sae_train.errors import ConfigError
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, DenseCode
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


def decode_prefixes(sae: TrainableAutoencoder, code: Code, sizes: tuple[int, ...], *, ranks: Ranks) -> Tensor:
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
        own = [code.value[:, a:b] @ sae.W_dec[a:b] for a, b in between]
        rows = torch.stack(own, dim=1)
        return _prefixes(rows, ranks)
    group_M = torch.bucketize(code.feature, ends.to(code.feature.device), right=True, out_int32=True)
    bag_M = code.token * n_groups + group_M
    used_M = torch.arange(len(bag_M), device=bag_M.device) < code.start[-1]
    bounds = torch.arange(n_tokens * n_groups + 1, dtype=torch.int32, device=bag_M.device)
    start = torch.searchsorted(torch.where(used_M, bag_M, n_tokens * n_groups), bounds, out_int32=True)
    places = code.feature, torch.where(used_M, bag_M, 0), start
    rows = sae.bags(code, sae.W_dec, *places)
    return _prefixes(rows.view(n_tokens, n_groups, -1), ranks)


def _prefixes(groups_NGD: Tensor, ranks: Ranks) -> Tensor:
    """Return the running sums over groups, of all ranks' features [G, N, D]."""
    return sum_of_shares(groups_NGD, ranks).cumsum(1).transpose(0, 1)

"""Nested dictionaries: prefixes reconstruct by themselves (Matryoshka, Bussmann et al. 2025, arXiv 2503.17547).

General features come first, because the smallest prefix must reconstruct with them alone. Selection, codes and the
exported autoencoder do not differ from any other run. Only the loss does: it is the unweighted sum over prefixes, as in
the paper.
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
"""Largest distance from the given n_features at which a message suggests another one."""


def prefix_sizes(nesting: NestingConfig, *, n_features: int) -> tuple[int, ...]:
    """Return the number of features in each prefix, ascending, the last with all. Without nesting there is one prefix.

    Example: prefixes [0.25, 0.5, 1] of 2048 features give (512, 1024, 2048), nesting=none gives (2048,).

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
    """Return the prefixes' sizes; None where one is not a whole number or is empty."""
    sizes = [round(share * n_features) for share in shares]
    whole = all(abs(size - share * n_features) < 1e-6 * n_features for size, share in zip(sizes, shares, strict=True))
    return tuple(sizes) if whole and sizes[0] > 0 else None


def decode_prefixes(sae: TrainableAutoencoder, code: Code, sizes: tuple[int, ...], *, ranks: Ranks) -> Tensor:
    """Return the reconstructions from the first sizes[g] features [G, N, D] without the bias; differentiable.

    A group is the features between two prefixes. A token's matches are sorted by feature, so the matches of a group are
    consecutive. Each token and group is one bag, which costs the matches once. The running sum over groups gives the
    prefixes.

    Args:
        sae: the features of this rank.
        code: matches of this rank's features.
        sizes: features of each prefix, over all ranks.
        ranks: the grid of ranks. Those of a row hold the other features.
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
    """Return the running sums over groups [G, N, D], each summed over the ranks of a row."""
    return sum_of_shares(groups_NGD, ranks).cumsum(1).transpose(0, 1)

"""Orders that depend on what they are for alone: never on ranks, nor on what was drawn before."""

import torch

from sae_train.sae.keyed import keyed_generator


def keyed_order(n: int, *key: int | str) -> torch.Tensor:
    """Return a permutation of 0..n-1 that only `key` decides: (seed, purpose, ...); int64 on the CPU."""
    return torch.randperm(n, generator=keyed_generator(*key))

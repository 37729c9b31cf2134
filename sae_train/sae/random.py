"""Random draws keyed by (seed, purpose, step, ...): the same on every rank, in every layout and after a resume."""

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """Return a 63-bit seed that depends on `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator whose seed depends on `key` alone."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_order(n: int, *key: int | str) -> torch.Tensor:
    """Return a permutation of 0 to n - 1 that depends on `key` alone, int64 on the CPU."""
    return torch.randperm(n, generator=keyed_generator(*key))


def keyed_uniform(*key: int | str) -> float:
    """Return a multiple of 2^-20 in [0, 1). Its sum with a count below 2^32 is exact in float64."""
    return (keyed_seed(*key) >> 43) / 2.0**20

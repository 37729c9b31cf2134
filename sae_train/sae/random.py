"""Random draws that depend on what they are for, never on who draws them or when.

A draw is keyed by (seed, purpose, step, ...), so it is the same on every rank, in every layout and after a resume.
"""

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """Return a 63-bit seed that only `key` decides."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator that only `key` decides."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_order(n: int, *key: int | str) -> torch.Tensor:
    """Return a permutation of 0..n-1 that only `key` decides; int64 on the CPU."""
    return torch.randperm(n, generator=keyed_generator(*key))


def keyed_uniform(*key: int | str) -> float:
    """Return a number of [0, 1) on a grid of 2^-20, so that adding it to a count below 2^32 is exact in float64."""
    return (keyed_seed(*key) >> 43) / 2.0**20

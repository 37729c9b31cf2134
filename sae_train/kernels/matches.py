"""Matches: the kept token-feature pairs of a batch as plain tensors, and the one way to lay them out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Matches(NamedTuple):
    """Sorted by token, then feature; unused slots sit at the end and hold 0."""

    value: Tensor
    """[M] affinities, detached."""
    feature: Tensor
    """[M] int32."""
    token: Tensor
    """[M] int32, local."""
    start: Tensor
    """[N+1] int32: token i holds slots start[i] to start[i+1]."""


def pack(index_C: Tensor, value_C: Tensor, *, shape: tuple[int, int], capacity: int | None) -> Matches:
    """Lay out pairs given by ascending flat index token * F + feature; `capacity` None makes M their number."""
    n_tokens, n_features = shape
    used = len(index_C)
    slots = used if capacity is None else capacity
    if used > slots:
        raise ValueError(f"{used} matches do not fit into {slots} slots")
    value = value_C.new_zeros(slots)
    feature = torch.zeros(slots, dtype=torch.int32, device=index_C.device)
    token = torch.zeros_like(feature)
    value[:used] = value_C
    token_C = torch.div(index_C, n_features, rounding_mode="floor")
    token[:used] = token_C
    feature[:used] = index_C - token_C * n_features
    bounds = torch.arange(n_tokens + 1, dtype=torch.int32, device=index_C.device)
    start = torch.searchsorted(token[:used], bounds, out_int32=True)
    return Matches(value, feature, token, start)


def flat_nonzero(flag_NF: Tensor) -> Tensor:
    """Return the ascending flat indices where `flag_NF` holds; eight flags at a time, as few of them hold."""
    flat = flag_NF.reshape(-1)
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64).nonzero().squeeze(1)
    inside = flat[:whole].view(-1, 8)[words].reshape(-1).nonzero().squeeze(1)
    index = words[inside >> 3] * 8 + (inside & 7)
    if whole == len(flat):
        return index
    return torch.cat([index, flat[whole:].nonzero().squeeze(1) + whole])

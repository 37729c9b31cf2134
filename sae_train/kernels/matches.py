"""Matches: the kept token-feature pairs of a batch as plain tensors, and the one way to lay them out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Matches(NamedTuple):
    """Sorted by token, then feature; unused slots sit at the end and hold 0.

    `select_*` create them and products over matches read them. Token 0 with features 1 and 3 and token 1 with feature
    0, in four slots: value [5, 6, 7, 0], feature [1, 3, 0, 0], token [0, 0, 1, 0], start [0, 2, 3].
    """

    value: Tensor
    """[M] affinities, detached."""
    feature: Tensor
    """[M] int32."""
    token: Tensor
    """[M] int32, local."""
    start: Tensor
    """[N+1] int32: token i holds slots start[i] to start[i+1]."""


def no_matches(like: Tensor, *, n_tokens: int, capacity: int) -> Matches:
    """Return slots that all are unused, values of `like`'s dtype."""
    feature = torch.zeros(capacity, dtype=torch.int32, device=like.device)
    start = torch.zeros(n_tokens + 1, dtype=torch.int32, device=like.device)
    return Matches(like.new_zeros(capacity), feature, torch.zeros_like(feature), start)


class FeatureOrder:
    """The order of a code's matches by feature, computed once and shared by all products over these matches.

    A code owns it. Features that it was given must not be changed in place.
    """

    def __init__(self) -> None:
        self._of: tuple[tuple[int, int, int], Tensor] | None = None
        self._found: tuple[Tensor, Tensor]

    def __call__(self, feature_M: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
        """Return `by_feature(feature_M, n_features)`, cached for the memory of `feature_M`."""
        of = len(feature_M), feature_M.data_ptr(), n_features
        if self._of is None or self._of[0] != of:
            self._of, self._found = (of, feature_M), by_feature(feature_M, n_features)  # kept, so that it stays there
        return self._found


def fp32(values: Tensor) -> Tensor:
    """Return values in fp32 where they are bf16."""
    return values.float() if values.dtype == torch.bfloat16 else values


def by_feature(feature_M: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Return the matches' slots by feature, then token [M], and where in them each feature begins [F+1] int32.

    >>> by_feature(torch.tensor([2, 0, 2]), 3)
    (tensor([1, 0, 2]), tensor([0, 1, 1, 3], dtype=torch.int32))
    """
    ascending, order = feature_M.sort(stable=True)
    bounds = torch.arange(n_features + 1, dtype=feature_M.dtype, device=feature_M.device)
    return order, torch.searchsorted(ascending, bounds, out_int32=True)


def pack(
    index_C: Tensor, value_C: Tensor, keep_C: Tensor, *, shape: tuple[int, int], capacity: int | None = None
) -> Matches:
    """Lay out the pairs where `keep_C` holds, without reading their number.

    >>> index, value, keep = torch.tensor([1, 2, 3]), torch.tensor([5.0, 0.0, 6.0]), torch.tensor([True, False, True])
    >>> found = pack(index, value, keep, shape=(2, 2), capacity=3)
    >>> found.value, found.feature.tolist(), found.token.tolist(), found.start.tolist()
    (tensor([5., 6., 0.]), [1, 1, 0], [0, 1, 0], [0, 1, 2])

    Args:
        index_C: flat index token * F + feature, ascending where `keep_C` holds.
        value_C: of each; the matches' values are detached.
        keep_C: bool.
        shape: N, F.
        capacity: M, at least the number of pairs that are kept; None stands for C.
    """
    n_tokens, width = shape
    slots = len(index_C) if capacity is None else capacity
    if len(index_C) == 0:
        return no_matches(value_C, n_tokens=n_tokens, capacity=slots)
    where = torch.nonzero_static(keep_C, size=slots, fill_value=0).squeeze(1)
    is_used = torch.arange(slots, device=where.device) < keep_C.sum()
    index = index_C.index_select(0, where)
    token = torch.div(index, max(1, width), rounding_mode="floor")
    bounds = torch.arange(n_tokens + 1, device=where.device)
    start = torch.searchsorted(torch.where(is_used, token, n_tokens), bounds, out_int32=True)
    parts = (value_C.detach().index_select(0, where), (index - token * width).int(), token.int())
    value, feature, token = (torch.where(is_used, part, 0) for part in parts)
    return Matches(value, feature, token, start)

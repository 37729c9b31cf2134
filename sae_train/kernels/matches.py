"""Matches: the kept token-feature pairs of a batch as plain tensors, and the one way to lay them out."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.backend import DTYPES, has_numba, uses_numba


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


def no_matches(like: Tensor, *, n_tokens: int, capacity: int) -> Matches:
    """Return slots that all are unused, values of `like`'s dtype."""
    feature = torch.zeros(capacity, dtype=torch.int32, device=like.device)
    start = torch.zeros(n_tokens + 1, dtype=torch.int32, device=like.device)
    return Matches(like.new_zeros(capacity), feature, torch.zeros_like(feature), start)


class FeatureOrder:
    """The order of matches by feature, then token: found when first asked for, shared by all products over the matches.

    What it found is of one tensor of features; asked about another one it looks again.
    """

    def __init__(self) -> None:
        self._of: tuple[Tensor, int, int] | None = None
        self._found: tuple[Tensor, Tensor]

    def __call__(self, feature_M: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
        """Return the matches' slots in that order [M], and where in it each feature begins [F+1] int32."""
        if self._of is None or not _is_same(self._of[0], feature_M) or self._of[1:] != (feature_M._version, n_features):
            self._of, self._found = (feature_M, feature_M._version, n_features), by_feature(feature_M, n_features)
        return self._found


def _is_same(a: Tensor, b: Tensor) -> bool:
    return len(a) == len(b) and a.data_ptr() == b.data_ptr()


def by_feature(feature_M: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Return the matches' slots by feature, then token [M], and where in them each feature begins [F+1] int32."""
    if has_numba(feature_M.device):
        from sae_train.kernels import numba_groups

        order, start_F = numba_groups.by_group(feature_M, n_features)
        return order, start_F.int()
    ascending, order = feature_M.sort(stable=True)
    bounds = torch.arange(n_features + 1, dtype=torch.int32, device=feature_M.device)
    return order, torch.searchsorted(ascending, bounds, out_int32=True)


def kept(index_C: Tensor, value_C: Tensor, keep_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index and the value of those entries that are to be kept, in order.

    Args:
        keep_C: bool.
    """
    if uses_numba(value_C):
        from sae_train.kernels import numba_cut

        return numba_cut.kept(index_C, value_C, keep_C)
    keep = keep_C.nonzero().squeeze(1)
    return index_C[keep], value_C[keep]


def pack(
    index_C: Tensor, value_C: Tensor, keep_C: Tensor | None, *, shape: tuple[int, int], capacity: int | None
) -> Matches:
    """Lay out the pairs that are to be kept.

    Args:
        index_C: ascending flat index token * F + feature.
        value_C: of each; the matches' are detached.
        keep_C: bool; None keeps all.
        shape: N, F.
        capacity: M; None makes it their number.

    Raises:
        ValueError: they are more than that.
    """
    n_tokens, n_features = shape
    used = len(index_C) if keep_C is None else int(keep_C.count_nonzero())
    slots = used if capacity is None else capacity
    if used > slots:
        raise ValueError(f"{used} matches do not fit into {slots} slots")
    value = value_C.new_zeros(slots)
    feature = torch.zeros(slots, dtype=torch.int32, device=index_C.device)
    token = torch.zeros_like(feature)
    if uses_numba(value_C):
        from sae_train.kernels import numba_cut

        keep_C = torch.ones(used, dtype=torch.bool) if keep_C is None else keep_C
        start = torch.empty(n_tokens + 1, dtype=torch.int32)
        places = {"value_M": value, "feature_M": feature, "token_M": token, "start_N": start}
        numba_cut.pack(index_C, value_C, keep_C, n_features=max(1, n_features), **places)
        return Matches(value, feature, token, start)
    index_C, value_C = (index_C, value_C) if keep_C is None else kept(index_C, value_C, keep_C)
    value[:used] = value_C.detach()
    token_C = torch.div(index_C, n_features, rounding_mode="floor")
    token[:used] = token_C
    feature[:used] = index_C - token_C * n_features
    bounds = torch.arange(n_tokens + 1, dtype=torch.int32, device=index_C.device)
    start = torch.searchsorted(token[:used], bounds, out_int32=True)
    return Matches(value, feature, token, start)


def flat_reaching(entries_NF: Tensor, bound: Tensor) -> Tensor:
    """Return the ascending flat indices of the entries that reach `bound`; see `few_reaching`."""
    index = few_reaching(entries_NF, bound, most=math.inf)
    assert index is not None
    return index


def few_reaching(entries_NF: Tensor, bound: Tensor, *, most: float) -> Tensor | None:
    """Return the ascending flat indices of the entries that reach `bound`; None where they are more than `most`.

    Args:
        entries_NF: of bf16 ones NaN may be among what is found, and counted.
        bound: of their dtype, scalar, [N, 1] or [1, F].
    """
    if entries_NF.dtype == bound.dtype and entries_NF.dtype in DTYPES and has_numba(entries_NF.device):
        from sae_train.kernels import numba_scan

        rows = bound.expand(len(entries_NF), 1) if bound.dim() == 0 else bound
        return numba_scan.flat_reaching(entries_NF, rows, most=most)
    index = flat_nonzero(entries_NF >= bound)
    return index if len(index) <= most else None


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

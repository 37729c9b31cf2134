"""What could be among the k largest of each row of screened pre-activations, in one pass over them; bounds of columns.

Maxima over groups of a row bound its cut from below (candidates.py); while the row is in cache it is held against that.
Letters: N tokens, F features, G groups, T threads, B columns of a block.
"""

import torch
from numba import carray, float32, int16, int32, int64, njit, uint16, uint32
from torch import Tensor

from sae_train.kernels.numba_rows import nearest
from sae_train.kernels.numba_scan import INFINITY, bits_between, collected, find, found_by_thread
from sae_train.kernels.numba_team import Kernel, at, bits_of, number, run, share, thread, wide

COLUMNS = 32
"""Columns that are turned into rows together: as many bf16 as a cache line has."""


def leading_of_rows(
    near_NF: Tensor, error_N1: Tensor, k: int, *, size: int, of_near: float, of_exact: float
) -> tuple[Tensor, Tensor]:
    """Return what at least k exact entries of each row reach [N, 1], or 0; and the ascending flat indices of the near
    entries whose exact ones may reach it.

    Args:
        near_NF: bf16.
        error_N1: fp32, how far near ones were from exact ones at most, before they were rounded.
        size: entries of a group.
        of_near: share of a near one that is left of what it was before, at least.
        of_exact: share of an exact one that is left of what its sum was, at least.
    """
    n_tokens, n_features = near_NF.shape
    n_threads, n_groups = torch.get_num_threads(), n_features // size + n_features % size
    near_NF, error_N1 = near_NF.view(torch.uint16).contiguous(), error_N1.contiguous()
    maximum_TG = torch.empty(n_threads, n_groups, dtype=torch.int16)
    bound_N, share_2 = error_N1.new_empty(n_tokens), torch.tensor([of_near, of_exact], dtype=torch.float32)
    given = size, k, near_NF, error_N1, share_2, maximum_TG, bound_N
    index = collected(_leading, *given, shape=(n_tokens, n_features))
    assert index is not None
    return bound_N.unsqueeze(1), index


def kth_of_columns(maxima_GF: Tensor, k_F: Tensor) -> Tensor:
    """Return the k_F[j]-th largest of each column, 0 where there are fewer positive ones, infinity's bits for k of 0.

    Args:
        maxima_GF: bits of bf16, int16.
        k_F: int64.
    """
    n_groups, n_features = maxima_GF.shape
    n_threads, bound_F = torch.get_num_threads(), torch.zeros(n_features, dtype=torch.int16)
    moved_TBG = torch.empty(n_threads, COLUMNS, n_groups, dtype=torch.int16)
    given = maxima_GF.contiguous(), k_F.contiguous(), moved_TBG, bound_F
    run(_kth_of_columns, n_groups, n_features, n_threads, *given)
    return bound_F


@njit
def _raise(maximum_G, row_G):
    wide()
    for group in range(len(row_G)):
        maximum_G[group] = max(maximum_G[group], row_G[group])


@njit
def _maxima(row_F, size: int, maximum_G):
    """Write the maxima of groups; entry i is of group i modulo their number, and what is left over stays single."""
    n_whole = len(row_F) // size
    maximum_G[:n_whole] = row_F[:n_whole]
    for member in range(1, size):
        _raise(maximum_G, row_F[member * n_whole : (member + 1) * n_whole])
    maximum_G[n_whole:] = row_F[size * n_whole :]


@njit
def _n_reaching(number_G, least):
    wide()
    n = int32(0)
    for group in range(len(number_G)):
        n = int32(n + (number_G[group] >= least))
    return n


@njit
def _kth_largest(number_G, k: int):
    """Return the k-th largest of int16, 0 where there are not so many positive ones; bit after bit of it."""
    found = 0
    for place in range(14, -1, -1):
        tried = found | 1 << place
        if _n_reaching(number_G, int16(tried)) >= k:
            found = tried
    return int16(found)


@njit
def _clear_nans(number_G):
    for group in range(len(number_G)):
        number_G[group] = number_G[group] if number_G[group] <= int16(INFINITY) else int16(0)


@Kernel
def _kth_of_columns(words):
    n_groups, n_features = words[0], words[1]
    maxima_GF, k_F = carray(at(words[3]), (n_groups, n_features), int16), carray(at(words[4]), n_features, int64)
    moved_BG = carray(at(words[5]), (words[2], COLUMNS, n_groups), int16)[thread()]
    bound_F = carray(at(words[6]), n_features, int16)
    begin, end = share(n_features)
    for first in range(begin, end, COLUMNS):
        width = min(COLUMNS, end - first)
        for group in range(n_groups):
            for column in range(width):
                moved_BG[column, group] = maxima_GF[group, first + column]
        for column in range(width):
            _clear_nans(moved_BG[column])
            k = k_F[first + column]
            if k == 0:
                bound_F[first + column] = int16(INFINITY)
            else:
                bound_F[first + column] = _kth_largest(moved_BG[column], k)


@Kernel
def _leading(words):
    n_tokens, n_features, n_threads, size, k = words[0], words[1], words[2], words[6], words[7]
    index_C, count_T = found_by_thread(words)
    n_groups = n_features // size + n_features % size
    near_NF = carray(at(words[8]), (n_tokens, n_features), uint16)
    ordered_NF = carray(at(words[8]), (n_tokens, n_features), int16)  # as integers positive floats are in order
    error_N, share_2 = carray(at(words[9]), n_tokens, float32), carray(at(words[10]), 2, float32)
    maximum_G = carray(at(words[11]), (n_threads, n_groups), int16)[thread()]
    bound_N = carray(at(words[12]), n_tokens, float32)
    begin, end = share(n_tokens)
    n_found = 0
    for token in range(begin, end):
        error = error_N[token]
        _maxima(ordered_NF[token], size, maximum_G)
        _clear_nans(maximum_G)
        low = number(uint16(_kth_largest(maximum_G, k))) * share_2[0] - error
        bound_N[token] = low if low > 0 else float32(0)  # nor where it is NaN
        near_bound = uint16(nearest(bits_of(bound_N[token] * share_2[1] - error)) >> uint32(16))
        lowest, highest = bits_between(near_bound)
        n_found = find(near_NF[token], lowest, highest, token * n_features, index_C, n_found)
    count_T[thread()] = n_found

"""A cut among candidates, and what is kept of them, on a CPU.

Letters: C candidates, K those that are kept, M slots of matches, N tokens, B bins, or bounds.
"""

import torch
from numba import carray, float32, int32, int64, njit, uint8, uint32
from torch import Tensor

from sae_train.kernels.numba_groups import find
from sae_train.kernels.numba_team import Kernel, at, run, share, thread

LOW_BITS = 16
"""Of an fp32 number; what is above them, the sign not counted, says which bin it is counted in."""
N_BINS = 1 << (31 - LOW_BITS)


def kth_largest(value_C: Tensor, k: int) -> Tensor:
    """Return the k-th largest of fp32 values, a scalar; 0 where fewer than k are positive, which NaN is not."""
    cut, count_B = value_C.new_zeros(()), torch.zeros(N_BINS, dtype=torch.int64)
    run(_cut, len(value_C), k, value_C.contiguous(), count_B, value_C.new_empty(len(value_C)), cut)
    return cut


def reaching(index_C: Tensor, value_C: Tensor, bound: Tensor, *, n_features: int) -> Tensor:
    """Return which entries reach the bound of their token, or of their feature [C] bool.

    Args:
        index_C: ascending flat index.
        value_C: fp32.
        bound: fp32 [N, 1] or [1, F].
        n_features: F.
    """
    keep_C, is_per_feature = torch.empty(len(index_C), dtype=torch.bool), bound.shape == (1, n_features)
    given = index_C.contiguous(), value_C.contiguous(), bound.contiguous()
    run(_reaching, len(index_C), bound.numel(), n_features, int(is_per_feature), *given, keep_C)
    return keep_C


def kept(index_C: Tensor, value_C: Tensor, keep_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries that are to be kept, in order; see matches.kept."""
    n_kept = int(keep_C.count_nonzero())
    index, value = index_C.new_empty(n_kept), value_C.new_empty(n_kept)
    run(_kept, *_given(index_C, value_C, keep_C), index, value)
    return index, value


def pack(
    index_C: Tensor,
    value_C: Tensor,
    keep_C: Tensor,
    *,
    n_features: int,
    value_M: Tensor,
    feature_M: Tensor,
    token_M: Tensor,
    start_N: Tensor,
) -> None:
    """Write the entries that are to be kept to slots of matches, which are as many or more, and where tokens begin."""
    n_slots, n_bounds = len(value_M), len(start_N)
    given = _given(index_C, value_C, keep_C)
    run(_pack, *given, n_features, n_slots, n_bounds, value_M, feature_M, token_M, start_N)


def _given(index_C: Tensor, value_C: Tensor, keep_C: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    return len(index_C), index_C.contiguous(), value_C.contiguous(), keep_C.contiguous()


@Kernel
def _cut(words):
    """Count the numbers by their high bits, and look for the cut in its bin: by one thread, as they are few."""
    n_entries, k = words[0], words[1]
    if thread() != 0:
        return
    value_C, bits_C = carray(at(words[2]), n_entries, float32), carray(at(words[2]), n_entries, uint32)
    count_B, moved_C = carray(at(words[3]), N_BINS, int64), carray(at(words[4]), n_entries, float32)
    for entry in range(n_entries):
        if value_C[entry] > 0:
            count_B[bits_C[entry] >> LOW_BITS] += 1
    bin_of_cut, missing = N_BINS - 1, k
    while bin_of_cut >= 0 and count_B[bin_of_cut] < missing:
        missing -= count_B[bin_of_cut]
        bin_of_cut -= 1
    if bin_of_cut < 0:
        return
    n_moved = 0
    for entry in range(n_entries):
        if value_C[entry] > 0 and bits_C[entry] >> LOW_BITS == bin_of_cut:
            moved_C[n_moved] = value_C[entry]
            n_moved += 1
    carray(at(words[5]), 1, float32)[0] = find(moved_C[:n_moved], missing)


@Kernel
def _reaching(words):
    n_entries, n_bounds, n_features, is_per_feature = words[0], words[1], words[2], words[3]
    index_C, value_C = carray(at(words[4]), n_entries, int64), carray(at(words[5]), n_entries, float32)
    bound_B, keep_C = carray(at(words[6]), n_bounds, float32), carray(at(words[7]), n_entries, uint8)
    low, high = share(n_entries)
    token = index_C[low] // n_features if low < high else 0
    for entry in range(low, high):
        while index_C[entry] >= (token + 1) * n_features:
            token += 1
        place = index_C[entry] - token * n_features if is_per_feature else token
        keep_C[entry] = value_C[entry] >= bound_B[place]


@njit
def _set(keep_C):
    """Return how many flags are set."""
    total = 0
    for entry in range(len(keep_C)):
        total += keep_C[entry]
    return total


@njit
def _entries(words):
    """Return what `_given` gives."""
    n_entries = words[0]
    index_C, value_C = carray(at(words[1]), n_entries, int64), carray(at(words[2]), n_entries, float32)
    return index_C, value_C, carray(at(words[3]), n_entries, uint8)


@Kernel
def _kept(words):
    index_C, value_C, keep_C = _entries(words)
    low, high = share(len(keep_C))
    place = _set(keep_C[:low])
    n_kept = place + _set(keep_C[low:])
    index_K, value_K = carray(at(words[4]), n_kept, int64), carray(at(words[5]), n_kept, float32)
    for entry in range(low, high):
        if keep_C[entry]:
            index_K[place], value_K[place] = index_C[entry], value_C[entry]
            place += 1


@Kernel
def _pack(words):
    index_C, value_C, keep_C = _entries(words)
    n_features, n_slots, n_bounds = words[4], words[5], words[6]
    value_M, feature_M = carray(at(words[7]), n_slots, float32), carray(at(words[8]), n_slots, int32)
    token_M, start_N = carray(at(words[9]), n_slots, int32), carray(at(words[10]), n_bounds, int32)
    low, high = share(len(keep_C))
    slot, last = _set(keep_C[:low]), low - 1
    while last >= 0 and not keep_C[last]:
        last -= 1
    bound = 0 if last < 0 else index_C[last] // n_features + 1  # the first that no earlier thread sets
    for entry in range(low, high):
        if keep_C[entry]:
            while index_C[entry] >= bound * n_features:
                start_N[bound] = slot
                bound += 1
            value_M[slot], token_M[slot] = value_C[entry], bound - 1
            feature_M[slot] = index_C[entry] - (bound - 1) * n_features
            slot += 1
    if high == len(keep_C):  # what is left over; of several threads that come to the end all write the same
        while bound < n_bounds:
            start_N[bound] = slot
            bound += 1

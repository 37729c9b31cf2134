"""Which of many entries reach a bound, in one pass over them.

The bits of bf16, as unsigned integers, are in order among positive numbers, and in reverse among negative ones above
those. So what reaches a bound are the bits between two others, and twice as many are compared at once as of fp32.
"""

import math

import torch
from numba import carray, float32, int64, njit, uint16, uint64
from torch import Tensor

from sae_train.kernels.numba_team import WORD, Kernel, at, between, first_bit, of, run, share, thread, wide

INFINITY, NEGATIVE_ZERO, LAST = 0x7F80, 0x8000, 0xFFFF
"""Bits of bf16 numbers; the last is none."""
FEW = 16
"""One entry of so many is made room for at first; where more reach the bound, they are looked for twice."""


def flat_reaching(entries_NF: Tensor, bound: Tensor, *, most: float) -> Tensor | None:
    """Return the ascending flat indices of the entries that reach `bound`; None where they are more than `most`.

    Args:
        entries_NF: fp32; or bf16, NaN of which are found, too, where a bound is not positive.
        bound: alike, [N, 1] or [1, F].
    """
    n_tokens, n_features = entries_NF.shape
    if bound.shape not in ((n_tokens, 1), (1, n_features)):
        raise ValueError(f"a bound of shape {tuple(bound.shape)} for entries {n_tokens}, {n_features}")
    if entries_NF.dtype == torch.bfloat16:
        scan, entries_NF = _scan_bf16, entries_NF.view(torch.uint16)
        low, high = _bits_between(bound)
    else:
        scan, low, high = _scan_fp32, bound, torch.full_like(bound, torch.inf)
    entries_NF, low, high = (each.contiguous() for each in (entries_NF, low, high))
    is_per_column = int(bound.shape != (n_tokens, 1))
    return collected(scan, is_per_column, entries_NF, low, high, shape=(n_tokens, n_features), most=most)


def collected(scan: Kernel, *given: Tensor | int, shape: tuple[int, int], most: float = math.inf) -> Tensor | None:
    """Return the ascending flat indices that a scan's threads find; None where they are more than `most`.

    Args:
        scan: a kernel that takes the shape and what `found_by_thread` makes of six words, then what is given.
        shape: tokens and features; each thread looks at its share of the tokens.
    """
    n_tokens, n_features = shape
    n_threads = torch.get_num_threads()
    room = 1 + n_tokens * n_features // (FEW * n_threads)
    while True:
        count_T = torch.zeros(n_threads, dtype=torch.int64)
        index_TC = torch.empty(n_threads, room, dtype=torch.int64)
        run(scan, n_tokens, n_features, n_threads, room, count_T, index_TC, *given)
        counts = count_T.tolist()
        if sum(counts) > most:
            return None
        if max(counts) <= room:
            return torch.cat([index_C[:count] for index_C, count in zip(index_TC, counts, strict=True)])
        room = max(counts)


def _bits_between(bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest bits of what reaches a bf16 bound; of NaN none."""
    low, high = (torch.empty(bound.shape, dtype=torch.uint16) for _ in range(2))
    run(_bounds, bound.numel(), bound.contiguous(), low, high)
    return low, high


@njit
def bits_between(bits):
    """Return what `_bits_between` does of one bound, given as its bits."""
    magnitude = bits & uint16(0x7FFF)
    if magnitude > INFINITY:
        return uint16(LAST), uint16(0)
    if bits == magnitude and bits > 0:
        return uint16(bits), uint16(INFINITY)
    return uint16(0), uint16(max(bits, uint16(NEGATIVE_ZERO)))


@Kernel
def _bounds(words):
    bits = carray(at(words[1]), words[0], uint16)
    low, high = carray(at(words[2]), words[0], uint16), carray(at(words[3]), words[0], uint16)
    begin, end = share(words[0])
    for i in range(begin, end):
        low[i], high[i] = bits_between(bits[i])


@njit
def found_by_thread(words):
    """Return where this thread's indices go, and where how many each thread found."""
    n_threads, room = words[2], words[3]
    index_C = carray(at(words[5]), (n_threads, room), int64)[thread()]
    return index_C, carray(at(words[4]), n_threads, int64)


@njit
def find(row_F, low, high, first: int, index_C, n_found: int):
    """Write `first` plus the place of each entry between two to index_C[n_found] and on, while there is room.

    Args:
        row_F: entries.
        low: of their type, one for all or one for each.
        high: alike.

    Returns:
        How many have been found.
    """
    wide()
    end = len(row_F) // WORD * WORD
    for place in range(0, len(row_F), WORD):
        flags = between(row_F, place, low, high) if place < end else _between_last(row_F, place, low, high)
        while flags != 0:
            if n_found < len(index_C):
                index_C[n_found] = first + place + first_bit(flags)
            n_found += 1
            flags &= flags - uint64(1)
    return n_found


@njit
def _between_last(row_F, place, low, high):
    """Return what `between` does, of the fewer than WORD entries at a row's end."""
    flags = uint64(0)
    for entry in range(place, len(row_F)):
        if of(low, entry) <= row_F[entry] <= of(high, entry):
            flags |= uint64(1) << uint64(entry - place)
    return flags


@njit
def _scan(words, dtype):
    """Write the indices of this thread's entries between the bounds, while there is room, and count them."""
    n_tokens, n_features, is_per_column = words[0], words[1], words[6]
    index_C, count_T = found_by_thread(words)
    entries_NF = carray(at(words[7]), (n_tokens, n_features), dtype)
    n_bounds = n_features if is_per_column else n_tokens
    low, high = carray(at(words[8]), n_bounds, dtype), carray(at(words[9]), n_bounds, dtype)
    begin, end = share(n_tokens)
    n_found = 0
    for token in range(begin, end):
        first = token * n_features
        if is_per_column:
            n_found = find(entries_NF[token], low, high, first, index_C, n_found)
        else:
            n_found = find(entries_NF[token], low[token], high[token], first, index_C, n_found)
    count_T[thread()] = n_found


@Kernel
def _scan_bf16(words):
    _scan(words, uint16)


@Kernel
def _scan_fp32(words):
    _scan(words, float32)

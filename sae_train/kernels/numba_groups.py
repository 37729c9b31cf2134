"""Entries by group, and the leading ones of each: counting in place of sorting.

Letters: C entries, G groups, T threads.
"""

import torch
from numba import carray, float32, int32, int64, njit, uint8
from torch import Tensor

from sae_train.kernels.numba_team import Kernel, at, run, share, thread


def by_group(group_C: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Return the entries by group, each group's in order [C] int64, and where in them each group begins [G+1] int64.

    Args:
        group_C: each of 0..n_groups-1.
    """
    group_C, n_threads = group_C.int().contiguous(), torch.get_num_threads()
    count_TG = torch.zeros(n_threads, n_groups, dtype=torch.int32)
    run(_count, n_groups, len(group_C), n_threads, group_C, count_TG)
    through_TG = count_TG.cumsum(0, dtype=torch.int32)
    start_G = torch.zeros(n_groups + 1, dtype=torch.int64)
    torch.cumsum(through_TG[-1], 0, out=start_G[1:])
    order_C, next_TG = torch.empty(len(group_C), dtype=torch.int64), through_TG.sub_(count_TG).add_(start_G[:-1])
    run(_place, n_groups, len(group_C), n_threads, group_C, next_TG, order_C)
    return order_C, start_G


def leading(value_C: Tensor, group_C: Tensor, budget_G: Tensor) -> Tensor:
    """Return which of the positive entries are among their group's budget_G[g] largest; ties to the earlier entry.

    Args:
        value_C: fp32.
        budget_G: int64.
    """
    order_C, start_G = by_group(group_C, len(budget_G))
    keep_C = torch.zeros(len(value_C), dtype=torch.bool)
    given = len(budget_G), len(value_C), value_C.contiguous(), order_C, start_G, budget_G.contiguous()
    run(_lead, *given, keep_C, value_C.new_empty(len(value_C)))
    return keep_C


@Kernel
def _count(words):
    """Count this thread's entries of each group."""
    group_C = carray(at(words[3]), words[1], int32)
    count_G = carray(at(words[4]), (words[2], words[0]), int32)[thread()]
    low, high = share(words[1])
    for entry in range(low, high):
        count_G[group_C[entry]] += 1


@Kernel
def _place(words):
    """Write this thread's entries where they belong: in each group behind those of the threads before."""
    group_C = carray(at(words[3]), words[1], int32)
    next_G = carray(at(words[4]), (words[2], words[0]), int32)[thread()]
    order_C = carray(at(words[5]), words[1], int64)
    low, high = share(words[1])
    for entry in range(low, high):
        order_C[next_G[group_C[entry]]] = entry
        next_G[group_C[entry]] += 1


@njit
def find(value_E, k: int):
    """Return the k-th largest of the values (Hoare 1961, FIND); they are moved about."""
    left, right, place = 0, len(value_E) - 1, k - 1
    while left < right:
        pivot = value_E[(left + right) // 2]
        i, j = left, right
        while i <= j:
            while value_E[i] > pivot:
                i += 1
            while value_E[j] < pivot:
                j -= 1
            if i <= j:
                value_E[i], value_E[j] = value_E[j], value_E[i]
                i += 1
                j -= 1
        if place <= j:
            right = j
        elif place >= i:
            left = i
        else:
            break
    return value_E[place]


@Kernel
def _lead(words):
    n_groups, n_entries = words[0], words[1]
    value_C, order_C = carray(at(words[2]), n_entries, float32), carray(at(words[3]), n_entries, int64)
    start_G, budget_G = carray(at(words[4]), n_groups + 1, int64), carray(at(words[5]), n_groups, int64)
    keep_C = carray(at(words[6]), n_entries, uint8)
    low, high = share(n_groups)
    moved_C = carray(at(words[7]), n_entries, float32)
    for group in range(low, high):
        begin, end, budget = start_G[group], start_G[group + 1], budget_G[group]
        if end - begin <= budget:
            for place in range(begin, end):
                keep_C[order_C[place]] = 1
        elif budget > 0:
            for place in range(begin, end):
                moved_C[place] = value_C[order_C[place]]
            cut = find(moved_C[begin:end], budget)
            left = budget
            for place in range(begin, end):
                left -= value_C[order_C[place]] > cut
            for place in range(begin, end):
                value = value_C[order_C[place]]
                if value > cut or (value == cut and left > 0):
                    keep_C[order_C[place]] = 1
                    left -= value == cut

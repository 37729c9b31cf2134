"""What the C library does with memory that a step has freed."""

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt(3)."""
LARGEST_ON_HEAP = 32 << 20
"""Bytes up to which glibc lets memory come from the heap rather than from the kernel."""


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step: given back, it comes page by page again, each a fault.

    Nothing is asked where there is no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)

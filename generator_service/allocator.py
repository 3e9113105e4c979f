"""Keeps freed memory in the process, where glibc would give it back to the kernel and fault it in again.

A denoising step on a CPU frees and allocates the same large arrays over and over; the page faults cost up to a sixth of
its time. Knows nothing of torch.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
KEPT = 2**28  # bytes free at the top of the heap before some are given back
LARGEST_ON_HEAP = 2**25  # bytes; glibc's own limit: larger arrays are mapped each time


def keep_freed_memory() -> None:
    """Call before the first large allocation. Does nothing on other C libraries."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in (
        (M_ARENA_MAX, 1),
        (M_MMAP_THRESHOLD, LARGEST_ON_HEAP),
        (M_TRIM_THRESHOLD, KEPT),
        (M_TOP_PAD, KEPT // 4),
    ):
        mallopt(option, value)

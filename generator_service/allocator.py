"""Keeps freed memory in the process, where glibc would give it back to the kernel and fault it in again.

A denoising step on a CPU frees and allocates the same large arrays over and over, and the compute thread's own arena
gives them back each time: requests then ran at 0.84 of a bare loop's speed, and at 0.96 with this
(`tests/benchmarks/bench_service.py`). Knows nothing of torch.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
KEPT = 2**28  # bytes free at the top of the heap before some are given back
LARGEST_ON_HEAP = 2**25  # bytes; glibc's own limit: larger arrays are mapped each time


def keep_freed_memory() -> bool:
    """Call before the first large allocation. False on other C libraries, where it does nothing."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in (
        (M_ARENA_MAX, 1),
        (M_MMAP_THRESHOLD, LARGEST_ON_HEAP),
        (M_TRIM_THRESHOLD, KEPT),
        (M_TOP_PAD, KEPT // 4),
    ):
        accepted = mallopt(option, value)
        assert accepted, (option, value)
    return True

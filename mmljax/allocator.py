"""The C library's allocator, set for training on CPU."""

from __future__ import annotations

import ctypes
import os
import sys

_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have the process keep memory that was freed, and return whether it does from now on.

    XLA allocates the work space of a step anew for every step. By default glibc maps such large
    blocks from the kernel and unmaps them, and the kernel zeroes each page at its first use: with
    EfficientNet-Lite0 at 112 px and a batch of 32 that is 190,000 page faults, a quarter of the
    step's time on two cores (docs/results.md). The process's memory then stays at its peak.

    Nothing is changed where an accelerator's driver is present, where the C library is not glibc,
    or where a variable ``MALLOC_...`` of the environment says how to allocate.
    """
    if sys.platform != "linux" or any(map(os.path.exists, _DRIVERS)):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or any(
        x.startswith("MALLOC_") for x in os.environ
    ):
        return False
    options = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}  # one arena; no trimming
    return all(libc.mallopt(option, value) for option, value in options.items())

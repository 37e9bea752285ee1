"""Limits of memory: checks of sizes before any work, and a budget of pixels for decoding."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmljax.config import DataConfig
from mmljax.errors import UserError
from mmljax.text import size_text

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def total_memory() -> int:
    """Bytes of memory that this machine has, or that its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        total = min(total, int(_CGROUP.read_text()))
    return total


def available_memory() -> int:
    """Bytes of memory that can be allocated now; all of it where Linux's estimate is absent."""
    with suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        return min(int(free.split()[1]) * 1024, total_memory())
    return total_memory()


def check_memory(needed: int, available: int, *, what: str, cure: str) -> None:
    """Refuse what needs more memory than there is.

    Args:
      needed: bytes.
      available: bytes.
      what: what needs them, with its flag or file.
      cure: what to do.

    Raises:
      UserError: with both figures.
    """
    if needed > available:
        raise UserError(
            f"{what} needs {size_text(needed)} of memory, but {size_text(available)} is available; "
            f"{cure}"
        )


def check_sizes(data: DataConfig, *, processes: int = 1) -> None:
    """Refuse sizes that no evaluation or no machine can take. Nothing is read or allocated.

    Args:
      data: of the run.
      processes: over which each batch is divided.

    Raises:
      UserError: if ``resize_size`` is below ``image_size``, or if the batches in host memory
        (uint8, ``prefetch`` + 2 at once) or one resized image (float32) are larger than the
        memory of this machine.
    """
    flag = "--config.data"
    if data.resize_size < data.image_size:
        raise UserError(
            f"{flag}.resize_size={data.resize_size} is below {flag}.image_size={data.image_size}; "
            "raise it to at least the size of the crop"
        )
    available = total_memory()
    check_memory(
        data.resize_size**2 * 3 * 4,
        available,
        what=f"one image at {flag}.resize_size={data.resize_size}",
        cure="lower the size",
    )
    for name in ("batch_size", "eval_batch_size"):
        batch = getattr(data, name)
        check_memory(
            batch * data.image_size**2 * 3 * (data.prefetch + 2) // processes,
            available,
            what=f"{flag}.{name}={batch} at {flag}.image_size={data.image_size} with "
            f"{flag}.prefetch={data.prefetch}",
            cure="lower one of them",
        )


class PixelBudget:
    """Bounds the pixels that several threads decode at once.

    Args:
      limit: pixels. An image of more than that is decoded when no other one is.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free = limit
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until ``pixels`` more may be decoded, and hold them for the length of the block."""
        pixels = min(pixels, self.limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()

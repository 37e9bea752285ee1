"""Atomic writes: a reader, or a process that is killed, sees the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield the path of a partial file beside ``path``, which replaces it when the block ends.

    The partial file is flushed to the disk before it is renamed. If the block raises, ``path`` is
    left as it was and the partial file is removed.

    Args:
      path: the file to write; its folder exists.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Replace a file by ``contents``; text is written as UTF-8."""
    data = contents.encode() if isinstance(contents, str) else contents
    with written_atomically(path) as partial:
        partial.write_bytes(data)

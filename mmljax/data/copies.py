"""Local copies of folders at an address, for readers that take files on the disk alone."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mmljax.data import paths
from mmljax.errors import UserError
from mmljax.files import acquire_lock, working_copy, written_atomically
from mmljax.text import one_line, size_text

_log = logging.getLogger(__name__)

_AT_ONCE = 8  # files


class _File(NamedTuple):
    name: str  # below the folder
    size: int
    modified: int  # ns


def local_copy(address: str, folder: str) -> Path:
    """A copy of ``address/folder``, made, completed or brought up to date.

    It lies below the user's cache, in a folder of that name. A file whose size and time of change
    are those at the address is not copied again, and one that is gone from there is removed. One
    process of a machine copies; the others wait for it.

    Args:
      address: of the folder around, such as ``gs://bucket/tfds``.
      folder: path below it.

    Returns:
      The local counterpart of ``address``. It holds nothing where the address has no such folder.

    Raises:
      UserError: if a file cannot be read, or the disk has too little room.
    """
    address = address.rstrip("/")
    root = working_copy(address, kind="data")
    target = root / folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with acquire_lock(root / ".lock", wait=True):
            there = list(_walk(paths.join(address, folder)))
            missing = [file for file in there if not _is_same(target / file.name, file)]
            needed, free = sum(file.size for file in missing), shutil.disk_usage(root).free
            if needed > free:
                raise UserError(
                    f"{address}/{folder} needs {size_text(needed)} in {root}, which has "
                    f"{size_text(free)}; free some, or set XDG_CACHE_HOME to a larger disk"
                )
            _remove_others(target, {file.name for file in there})
            if missing:
                _log.info("copying %s of %s to %s", size_text(needed), address, root)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda file: _copy(f"{address}/{folder}", target, file), missing))
    except OSError as error:
        raise UserError(
            f"{address}/{folder} cannot be copied to {root} ({one_line(error)}); check the "
            "address, your access and the disk"
        ) from error
    return root


def _walk(folder: str, below: str = "") -> Iterator[_File]:
    inside = paths.folders_in(folder)
    for name in paths.list_folder(folder).files:
        if name not in inside:
            size, modified = paths.size_and_change(paths.join(folder, name))
            yield _File(below + name, size, modified)
    for name in inside:
        yield from _walk(paths.join(folder, name), f"{below}{name}/")


def _is_same(path: Path, file: _File) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == (file.size, file.modified)


def _remove_others(target: Path, names: set[str]) -> None:
    for path in target.rglob("*"):
        if path.is_file() and path.relative_to(target).as_posix() not in names:
            path.unlink()


def _copy(address: str, target: Path, file: _File) -> None:
    path = target / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as partial:
        paths.copy(f"{address}/{file.name}", partial)
        os.utime(partial, ns=(file.modified, file.modified))

"""Files and folders by name: local ones, and those of every file system that TensorFlow knows.

A name with ``://`` in it, such as ``gs://bucket/data``, goes through ``tf.io.gfile``; any other one
is local and needs no TensorFlow. A file that cannot be read is an ``OSError``; a folder that exists
and cannot be listed is a ``UserError``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmljax.data.tensorflow_devices import import_tensorflow
from mmljax.errors import UserError, require

_SHOWN = 200  # characters of a name in an error
_MANGLED = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")
_LISTINGS = 16  # folders listed at once: a bucket answers many questions as fast as one

_T = TypeVar("_T")


class Listing(NamedTuple):
    """Names in a folder, each list sorted."""

    files: list[str]
    folders: list[str]
    others: list[str]  # links that are broken or circular, and what is neither file nor folder


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a name belongs to a file system other than the local one."""
    return "://" in os.fspath(path)


def is_address(path: Path | str) -> bool:
    """Whether a path is an address.

    Raises:
      UserError: if it was one before it was made a ``Path``, which makes ``:/`` of ``://``.
    """
    if (found := _MANGLED.match(os.fspath(path))) is not None:
        address = f"{found[1]}://{os.fspath(path)[found.end() :]}"
        raise UserError(f"{path} is an address with one /; give it as the text {address!r}")
    return is_remote(path)


def join(folder: str | os.PathLike[str], name: str) -> str:
    """The path of ``name`` below a folder, with ``/``."""
    return os.path.join(os.fspath(folder), name)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder of that name exists and can be reached."""
    if is_remote(path):
        return _remote(lambda gfile: gfile.isdir(os.fspath(path)))
    return os.path.isdir(path)


def read(path: str | os.PathLike[str]) -> bytes:
    """The contents of a file.

    Raises:
      OSError: if it cannot be read.
    """
    if not is_remote(path):
        try:
            return Path(path).read_bytes()
        except ValueError as error:  # the name holds a NUL
            raise OSError(str(error)) from error

    def contents(gfile: Any) -> bytes:
        with gfile.GFile(os.fspath(path), "rb") as file:
            return file.read()

    return _remote(contents)


def size_and_change(address: str) -> tuple[int, int]:
    """Bytes of a remote file, and when it was last changed in ns.

    Raises:
      OSError: if it cannot be looked at.
    """
    found = _remote(lambda gfile: gfile.stat(address))
    return found.length, found.mtime_nsec


def copy(address: str, path: Path) -> None:
    """Copy a remote file to the disk, in pieces.

    Raises:
      OSError: if it cannot be read or written.
    """
    _remote(lambda gfile: gfile.copy(address, os.fspath(path), overwrite=True))


def list_folder(folder: str | os.PathLike[str]) -> Listing:
    """The names in a folder; none if it is absent.

    On a remote file system that does not mark its folders, they are among the files.

    Raises:
      UserError: if the folder cannot be listed.
    """
    if is_remote(folder):
        names = _listed(folder)
        inside = [name.rstrip("/") for name in names if name.endswith("/")]
        return Listing(sorted(n for n in names if not n.endswith("/")), sorted(inside), [])
    listing = Listing([], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = 0 if _is(entry.is_file) else 1 if _is(entry.is_dir) else 2
                listing[kind].append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return listing
    except (OSError, ValueError) as error:
        raise _unlisted(folder, error) from error
    return Listing(*map(sorted, listing))


def list_each(folders: Sequence[str]) -> list[Listing]:
    """``list_folder`` of many folders, several at once."""
    with ThreadPoolExecutor(_LISTINGS) as pool:
        return list(pool.map(list_folder, folders))


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones (``.name``) are left out."""
    listing = list_folder(folder)
    names = listing.folders
    if is_remote(folder):
        names = sorted([*names, *(n for n in listing.files if is_folder(join(folder, n)))])
    return [name for name in names if not name.startswith(".")]


def absent(root: str | os.PathLike[str], names: Sequence[str]) -> list[int]:
    """Positions of the names below ``root`` that are not files, in order.

    Each folder is listed once, since a call per file takes long.
    """
    folders = [name.rpartition("/")[0] for name in names]
    distinct = sorted(set(folders))
    listed = list_each([join(root, folder) for folder in distinct])
    found = {folder: set(listing.files) for folder, listing in zip(distinct, listed, strict=True)}
    return [
        place
        for place, (folder, name) in enumerate(zip(folders, names, strict=True))
        if name.rpartition("/")[2] not in found[folder]
    ]


def check_unicode(names: Iterable[str], *, where: str) -> None:
    """Refuse names of files that are not valid UTF-8, which no record or table can hold.

    Raises:
      UserError: naming the first such name.
    """
    for name in names:
        if name != name.encode(errors="replace").decode():
            raise UserError(f"{where}: the name {name!r} is not valid UTF-8; rename the file")


def _is(kind: Callable[[], bool]) -> bool:
    """The answer of a directory entry; False for a circular link."""
    try:
        return kind()
    except OSError:
        return False


def _listed(folder: str | os.PathLike[str]) -> list[str]:
    try:
        return _remote(lambda gfile: gfile.listdir(os.fspath(folder)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unlisted(folder, error) from error


def _unlisted(folder: str | os.PathLike[str], error: Exception) -> UserError:
    """The error for a folder that may not be read, or whose name is too long or holds a NUL."""
    name = os.fspath(folder)
    name = name if len(name) < _SHOWN else f"{name[:_SHOWN]}..."
    reason = getattr(error, "strerror", None) or error
    return UserError(f"folder {name!r} cannot be listed ({reason}); check its name and your access")


def _remote(call: Callable[[Any], _T]) -> _T:
    """``call(tf.io.gfile)``, with its errors as those of local files."""
    require("tensorflow", extra="data", purpose="reading names with ://")
    tf = import_tensorflow()
    try:
        return call(tf.io.gfile)
    except tf.errors.NotFoundError as error:
        raise FileNotFoundError(error.message) from error
    except tf.errors.OpError as error:
        raise OSError(error.message) from error

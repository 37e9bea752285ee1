"""Files and folders by name: local ones, and those of every file system that TensorFlow knows.

A name with ``://`` in it, such as ``gs://bucket/data``, goes through ``tf.io.gfile``; any other one
is local and needs no TensorFlow. All failures to read a file are ``OSError``; a folder that cannot
be listed, though it is there, is a ``UserError``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from mmljax.errors import UserError

_SHOWN = 200  # characters of a name in an error
_LISTINGS = 16  # folders listed at once: a bucket answers many questions as fast as one

_T = TypeVar("_T")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a name is of a file system other than the local one."""
    return "://" in os.fspath(path)


def join(folder: str | os.PathLike[str], name: str) -> str:
    """The path of what is called ``name``, with ``/``, below a folder."""
    return os.path.join(os.fspath(folder), name)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is a folder of that name."""
    if is_remote(path):
        return _remote(lambda gfile: gfile.isdir(os.fspath(path)))
    return Path(path).is_dir()


def read(path: str | os.PathLike[str]) -> bytes:
    """The contents of a file.

    Raises:
      OSError: if it cannot be read.
    """
    if not is_remote(path):
        return Path(path).read_bytes()

    def contents(gfile: Any) -> bytes:
        with gfile.GFile(os.fspath(path), "rb") as file:
            return file.read()

    return _remote(contents)


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in a folder, sorted; without those that a dot hides."""
    if is_remote(folder):
        listed = _listed(folder)
        names = [
            name.rstrip("/")
            for name in listed
            if name.endswith("/") or is_folder(join(folder, name))
        ]
    else:
        names = [entry.name for entry in _entries(folder) if _is(entry.is_dir)]
    return sorted(name for name in names if not name.startswith("."))


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the files in a folder, sorted; none if there is no such folder.

    On a remote file system that does not mark its folders, theirs are among them.
    """
    if is_remote(folder):
        return sorted(name for name in _listed(folder) if not name.endswith("/"))
    return sorted(entry.name for entry in _entries(folder) if _is(entry.is_file))


def files_in_each(folders: Iterable[str]) -> dict[str, list[str]]:
    """``files_in`` of many folders, several at once."""
    folders = list(folders)
    with ThreadPoolExecutor(_LISTINGS) as pool:
        return dict(zip(folders, pool.map(files_in, folders), strict=True))


def absent(root: str | os.PathLike[str], names: Sequence[str]) -> list[int]:
    """Which names below ``root`` are of no file: their places, in order.

    One listing per folder, as a call per file takes long.
    """
    folders = [name.rpartition("/")[0] for name in names]
    paths = {folder: join(root, folder) for folder in set(folders)}
    listed = files_in_each(paths.values())
    found = {folder: set(listed[path]) for folder, path in paths.items()}
    return [
        place
        for place, (folder, name) in enumerate(zip(folders, names, strict=True))
        if name.rpartition("/")[2] not in found[folder]
    ]


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise _unlisted(folder, error) from error


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry says; of a link in a circle, that it is nothing."""
    with contextlib.suppress(OSError):
        return kind()
    return False


def _listed(folder: str | os.PathLike[str]) -> list[str]:
    try:
        return _remote(lambda gfile: gfile.listdir(os.fspath(folder)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unlisted(folder, error) from error


def _unlisted(folder: str | os.PathLike[str], error: Exception) -> UserError:
    """Of a folder whose name is too long or holds a NUL, or that one may not read."""
    name = os.fspath(folder)
    name = name if len(name) < _SHOWN else f"{name[:_SHOWN]}..."
    reason = getattr(error, "strerror", None) or error
    return UserError(f"folder {name!r} cannot be listed ({reason}); check its name and your access")


def _remote(call: Callable[[Any], _T]) -> _T:
    """``call(tf.io.gfile)``, its errors as those of local files."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"names with :// are read by TensorFlow ({error}); pip install 'mmljax[data]', or copy "
            "the data to a local folder"
        ) from error
    tf.config.set_visible_devices([], "GPU")
    try:
        return call(tf.io.gfile)
    except tf.errors.NotFoundError as error:
        raise FileNotFoundError(error.message) from error
    except tf.errors.OpError as error:
        raise OSError(error.message) from error

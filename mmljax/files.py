"""Atomic writes, locks between processes, and the place of files that come from an address."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from mmljax.errors import UserError
from mmljax.text import one_line

_log = logging.getLogger(__name__)


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


class Locked(Exception):
    """Another process holds a lock; the text names the process."""


def acquire_lock(path: Path, *, wait: bool = False) -> IO[str]:
    """Lock a file for this process and return it open; closing it, or any exit, releases the lock.

    Args:
      path: the lock file, which is made if absent; its folder exists.
      wait: until the lock is free, however long that takes.

    On a file system without locks a warning is logged, and nothing is locked.

    Raises:
      Locked: if another process holds the lock and ``wait`` is false.
      OSError: if the file cannot be made.
    """
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise Locked(file.read().strip()) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): start no second process there", path, error)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the file was removed in between
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file


@contextlib.contextmanager
def replacing(folder: Path, names: Sequence[str], *, flag: str) -> Iterator[Path]:
    """A folder in which files are made before they replace those of an earlier command.

    They are made in ``folder/.partial`` and moved one by one, the last of ``names`` at the end, and
    that of an earlier command is removed before. A process killed before the move leaves the old
    files; during it, whole files without the last one.

    Args:
      folder: made if absent.
      names: of the files; what is not made is removed.
      flag: that named the folder, for errors.

    Raises:
      UserError: if the folder cannot be written, or another command writes it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with acquire_lock(folder / ".lock"):
            partial = folder / ".partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
            partial.mkdir()
            try:
                yield partial
                (folder / names[-1]).unlink(missing_ok=True)
                for name in names:
                    if (partial / name).exists():
                        os.replace(partial / name, folder / name)
                    else:
                        (folder / name).unlink(missing_ok=True)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                (folder / ".lock").unlink()
    except Locked as holder:
        raise UserError(
            f"{flag}={folder} is being written by {holder}; wait for it to end, or name another"
        ) from None
    except OSError as error:
        raise UserError(f"{flag}={folder} cannot be written: {one_line(error)}") from error


def working_copy(address: str, *, kind: str) -> Path:
    """The folder below the user's cache that holds files of an address."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    return cache / "mmljax" / kind / digest / address.rpartition("/")[2]

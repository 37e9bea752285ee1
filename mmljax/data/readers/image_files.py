"""Lists of image files that belong to no data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmljax.data.decoding import SUFFIXES, UNREAD
from mmljax.data.paths import check_unicode, list_folder
from mmljax.errors import UserError
from mmljax.types import Split

_SHOWN = 3  # names in the warning of what is left out

_log = logging.getLogger(__name__)


def list_images(paths: Sequence[str | os.PathLike[str]], *, flag: str) -> Split:
    """Image files by their paths, and those in all folders below a folder.

    Left out with a warning, which counts them and names the first: links to folders (they are
    not followed), and images that are broken or circular links, or no regular files. So are
    pictures whose kind is not read (``UNREAD``), with a warning of their own.

    Args:
      paths: files, which must exist, and folders, of which the files of ``SUFFIXES`` count
        (in any case of letters; hidden ones do not).
      flag: that names the paths, for errors.

    Returns:
      Images in the order of the paths, those of a folder sorted by name. The name of an image is
      its path below the folder, with ``/``, if one folder is given, and else its path as given.
      Labels are -1.

    Raises:
      UserError: if a path is absent, a folder cannot be listed, there is no image, or a name is
        not valid UTF-8.
    """
    found: list[tuple[str, str]] = []
    left_out: list[str] = []
    for path in map(Path, paths):
        if os.path.isdir(path):
            inside, others = _below(path)
            left_out += [str(path / name) for name in others]
            if not inside:
                warn_left_out(_log, flag, left_out)
                raise UserError(
                    f"{flag}: {path} holds no image; the names of images end in "
                    f"{', '.join(SUFFIXES)}"
                )
            root = "" if len(paths) == 1 else path.as_posix() + "/"
            found += [(str(path / name), root + name) for name in inside]
        elif os.path.isfile(path):
            found.append((str(path), path.as_posix()))
        else:
            raise UserError(
                f"{flag}: {str(path)[:200]} does not exist or cannot be reached; name an image or "
                "a folder of images"
            )
    check_unicode((name for _, name in found), where=flag)
    warn_left_out(_log, flag, left_out)
    images, names = (np.array(column) for column in zip(*found, strict=True))
    return Split(images, np.full(len(found), -1, np.int32), names)


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image: by its suffix, and not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_unread_name(name: str) -> bool:
    """Whether a file of this name is a picture that is not read: by its suffix, and not hidden."""
    return name.lower().endswith(UNREAD) and not name.rpartition("/")[2].startswith(".")


def warn_left_out(log: logging.Logger, where: str, names: Sequence[str]) -> None:
    """Warnings that count what is left out and name the first: links and special files, UNREAD.

    Args:
      log: that takes the warnings.
      where: the flag that named the folder.
      names: of what is left out; no warning if empty.
    """
    unread = [name for name in names if is_unread_name(name)]
    links = [name for name in names if not is_unread_name(name)]
    for found, text in (
        (links, "that are broken, circular or folder links, or no files"),
        (unread, "that are HEIC, TIFF or JPEG XL (convert them to JPEG, WebP or AVIF)"),
    ):
        if found:
            shown = [name.encode(errors="replace").decode() for name in found[:_SHOWN]]
            more = ", ..." if len(found) > _SHOWN else ""
            log.warning("%s: left out %d %s: %s%s", where, len(found), text, ", ".join(shown), more)


def _below(folder: Path) -> tuple[list[str], list[str]]:
    """Paths below a folder, with ``/``: of its images, and of what is left out; both sorted."""
    names: list[str] = []
    left_out: list[str] = []
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        listing = list_folder(folder / parent)
        names += [parent + name for name in listing.files if is_image_name(name)]
        left_out += [parent + name for name in listing.files if is_unread_name(name)]
        left_out += [
            parent + name
            for name in listing.others
            if is_image_name(name) or ("." not in name and os.path.islink(folder / parent / name))
        ]
        for name in listing.folders:
            if not name.startswith("."):
                link = os.path.islink(folder / parent / name)
                (left_out if link else waiting).append(parent + name + ("" if link else "/"))
    return sorted(names), sorted(left_out)

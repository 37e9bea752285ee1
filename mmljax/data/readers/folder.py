"""Data sets that anybody has: a folder of class folders, and a CSV of paths, labels and splits.

Both are read through ``files``, so they may lie in a bucket. No image is decoded here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from mmljax.data import paths as files
from mmljax.data.readers.image_files import SUFFIXES
from mmljax.data.readers.in_shop import Part, make_dataset
from mmljax.errors import UserError
from mmljax.types import Dataset

COLUMNS = ("path", "label", "split")
"""Columns that a CSV must have; others are left alone."""

_FLAG = "--config.data.directory"
_TRAIN, _TEST, _QUERY, _GALLERY = SPLITS = ("train", "test", "query", "gallery")


class _Image(NamedTuple):
    name: str  # path below the folder, with /
    label: str
    split: str


def read_folder(directory: str | os.PathLike[str], *, test_share: float) -> Dataset:
    """Images in one folder per class, below ``train`` and ``test`` or not.

    ``DIR/train/CLASS/*`` with ``DIR/test/CLASS/*`` (searched among themselves) or with
    ``DIR/query/CLASS/*`` and ``DIR/gallery/CLASS/*``; or ``DIR/CLASS/*``, of which a share of the
    classes is held out for the test. Files count whose names end as those of images do
    (``image_files.SUFFIXES``); hidden ones do not.

    Args:
      directory: DIR, local or remote.
      test_share: share of the classes that is held out where DIR has no ``train``: those of which
        the names' SHA-256 is lowest, so that the same are held out on every machine.

    Raises:
      UserError: if there is no such layout, a class has no image, a class is both in training and
        in test, or the share leaves either without a class.
    """
    where = f"{_FLAG}={os.fspath(directory)!r}"
    folders = files.folders_in(directory) if os.fspath(directory) else []
    if not folders:
        raise UserError(
            f"{where} holds no folder; it must hold train/CLASS/ and test/CLASS/, or CLASS/"
        )
    if _TRAIN not in folders:
        held_out = _held_out(folders, test_share, where)
        return _dataset(
            directory, _images(directory, {c: _TEST if c in held_out else _TRAIN for c in folders})
        )
    tests = [split for split in SPLITS[1:] if split in folders]
    if tests not in ([_TEST], [_QUERY, _GALLERY]):
        raise UserError(
            f"{where} holds train and {', '.join(tests) or 'no test'}; beside train there must be "
            "either test, or query and gallery"
        )
    classes: dict[str, str] = {}
    trained = files.folders_in(files.join(directory, _TRAIN))
    for split in (_TRAIN, *tests):
        inside = trained if split == _TRAIN else files.folders_in(files.join(directory, split))
        if not inside:
            raise UserError(f"{where}: {split} holds no folder; it must hold one per class")
        if split != _TRAIN and (shared := set(inside) & set(trained)):
            raise UserError(
                f"{where}: class {min(shared)} is in {split} and in train; test classes must be "
                "unseen"
            )
        classes |= {f"{split}/{name}": split for name in inside}
    return _dataset(directory, _images(directory, classes))


def read_csv(path: str | os.PathLike[str]) -> Dataset:
    """Images that a CSV file lists, with a line of column names: ``path``, ``label``, ``split``.

    Args:
      path: of the file, local or remote. The paths in it are below the folder that it lies in;
        labels are any text; splits are ``train`` with ``test`` (searched among themselves), or
        ``train``, ``query`` and ``gallery``.

    Raises:
      UserError: naming the line, on a row that is malformed, repeated, of an unknown split, or of
        a path that is absent or leaves the folder; on a label both in training and in test; if
        there is no row, or the splits are not such.
    """
    where = f"{_FLAG}={os.fspath(path)!r}"
    try:
        text = files.read(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where} cannot be read ({type(error).__name__}); name a CSV file in UTF-8 with the "
            f"columns {', '.join(COLUMNS)}"
        ) from error
    rows = _rows(text, where)
    images = [_checked(row, line, where) for line, row in rows]
    lines = [line for line, _ in rows]
    _check_rows(images, lines, where)
    root = os.path.dirname(os.fspath(path))
    if absent := files.absent(root or ".", [image.name for image in images]):
        first = absent[0]
        raise UserError(
            f"{where}, line {lines[first]}: {images[first].name} is not in {root or '.'} "
            f"({len(absent)} of {len(images)} are absent); restore the files or take them off the "
            "list"
        )
    return _dataset(root, images)


def _held_out(classes: list[str], share: float, where: str) -> set[str]:
    count = round(share * len(classes))
    if not 0 < count < len(classes):
        raise UserError(
            f"{where} has no folder train, and --config.data.test_share={share:g} of its "
            f"{len(classes)} classes is {count}; set a share that leaves classes on both sides"
        )
    return set(sorted(classes, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


def _images(root: str | os.PathLike[str], folders: dict[str, str]) -> list[_Image]:
    """The images of class folders, each given with its split; a class is its folder's name."""
    listed = files.files_in_each(files.join(root, folder) for folder in folders)
    images = []
    for folder, split in folders.items():
        names = listed[files.join(root, folder)]
        names = [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        if not names:
            raise UserError(
                f"{files.join(root, folder)} holds no image; the names of images end in "
                f"{', '.join(SUFFIXES)}"
            )
        label = folder.rpartition("/")[2]
        images += [_Image(f"{folder}/{name}", label, split) for name in names]
    return images


def _rows(text: str, where: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV by their lines, only the columns that are read."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{where}, line 1: lacks {', '.join(missing)}; the first line must name the "
                f"columns {','.join(COLUMNS)}"
            )
        for row in reader:
            fields = {name: (row[name] or "").strip() for name in COLUMNS}
            rows.append((reader.line_num, fields))
    except csv.Error as error:
        line = reader.line_num + 1  # it counts a line when it has understood it
        raise UserError(f"{where}, line {line}: {error}; mend the row") from error
    if not rows:
        raise UserError(f"{where} lists no image; add a row for each")
    return rows


def _checked(row: dict[str, str], line: int, where: str) -> _Image:
    if empty := [name for name in COLUMNS if not row[name]]:
        raise UserError(f"{where}, line {line}: {', '.join(empty)} is empty; fill it in")
    if row["split"] not in SPLITS:
        raise UserError(
            f"{where}, line {line}: split {row['split']!r} is unknown; known: {', '.join(SPLITS)}"
        )
    path = PurePosixPath(row["path"])
    if path.is_absolute() or ".." in path.parts or files.is_remote(row["path"]):
        raise UserError(
            f"{where}, line {line}: {row['path']!r} leaves the CSV's folder; list paths below it"
        )
    return _Image(path.as_posix(), row["label"], row["split"])


def _check_rows(images: list[_Image], lines: list[int], where: str) -> None:
    seen: dict[str, int] = {}
    trained = {image.label for image in images if image.split == _TRAIN}
    for image, line in zip(images, lines, strict=True):
        if seen.setdefault(image.name, line) != line:
            raise UserError(
                f"{where}, line {line}: {image.name} stands in line {seen[image.name]} too; take "
                "one of them off"
            )
        if image.split != _TRAIN and image.label in trained:
            raise UserError(
                f"{where}, line {line}: label {image.label} is in {image.split} and in train; test "
                "labels must be unseen"
            )
    found = {image.split for image in images}
    if found not in ({_TRAIN, _TEST}, {_TRAIN, _QUERY, _GALLERY}):
        raise UserError(
            f"{where} lists images of {', '.join(s for s in SPLITS if s in found)}; there must be "
            "train, and either test, or query and gallery"
        )


def _dataset(root: str | os.PathLike[str], images: Iterable[_Image]) -> Dataset:
    """The splits in the order of the images; ``test`` searches among itself."""
    by_split: dict[str, list[_Image]] = {}
    for image in images:
        by_split.setdefault(image.split, []).append(image)
    return make_dataset(*(_part(root, by_split[split]) for split in SPLITS if split in by_split))


def _part(root: str | os.PathLike[str], images: list[_Image]) -> Part:
    return Part(
        np.array([files.join(root, image.name) for image in images]),
        np.array([image.label for image in images]),
        np.array([image.name for image in images]),
    )

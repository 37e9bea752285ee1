"""Reader of CSV files of image paths, labels and splits. No image is decoded."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import PurePosixPath

from mmljax.data import paths as files
from mmljax.data.readers.splits import (
    DIRECTORY_FLAG,
    GALLERY,
    QUERY,
    TEST,
    TRAIN,
    ListedImage,
    dataset_of_files,
)
from mmljax.errors import UserError
from mmljax.types import Dataset

COLUMNS = ("path", "label", "split")
"""Columns that a CSV file must have; others are ignored."""

_SPLITS = (TRAIN, TEST, QUERY, GALLERY)


def read_csv(path: str | os.PathLike[str]) -> Dataset:
    """Images that a CSV file lists; its first line names the columns ``path,label,split``.

    Args:
      path: of the file, local or remote. The paths in it are below the folder of the file;
        labels are any text; splits are ``train`` with ``test`` (searched among themselves), or
        ``train``, ``query`` and ``gallery``.

    Raises:
      UserError: naming the line, on a row that is malformed, repeated, of an unknown split, or of
        a path that is absent or outside the folder; on a label both in training and in test; if
        there is no row, or the splits are others.
    """
    where = f"{DIRECTORY_FLAG}={os.fspath(path)!r}"
    rows = read_rows(path, COLUMNS, where=where)
    if not rows:
        raise UserError(f"{where} lists no image; add a row for each")
    images = [_checked(row, line, where) for line, row in rows]
    lines = [line for line, _ in rows]
    _check_rows(images, lines, where)
    root = os.path.dirname(os.fspath(path))
    if absent := files.absent(root or ".", [image.name for image in images]):
        first = absent[0]
        raise UserError(
            f"{where}, line {lines[first]}: {images[first].name} is not in {root or '.'} "
            f"({len(absent)} of {len(images)} are absent); restore the files or remove their rows"
        )
    return dataset_of_files(root, images)


def read_rows(
    path: str | os.PathLike[str], columns: Sequence[str], *, where: str
) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with their line numbers; only the columns that are read.

    Args:
      path: of the file, local or remote; its first line names its columns.
      columns: that it must have; others are ignored.
      where: the flag and the path, for errors.

    Raises:
      UserError: if the file cannot be read or lacks a column, or, naming the line, on a row that is
        malformed.
    """
    try:
        text = files.read(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        noun = "column" if len(columns) == 1 else "columns"
        raise UserError(
            f"{where} cannot be read ({type(error).__name__}); name a CSV file in UTF-8 with the "
            f"{noun} {', '.join(columns)}"
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{where}, line 1: lacks {', '.join(missing)}; the first line must name the "
                f"columns {','.join(columns)}"
            )
        for row in reader:
            fields = {name: (row[name] or "").strip() for name in columns}
            rows.append((reader.line_num, fields))
    except csv.Error as error:
        line = reader.line_num + 1  # a line counts once it is parsed
        raise UserError(f"{where}, line {line}: {error}; correct the row") from error
    return rows


def _checked(row: dict[str, str], line: int, where: str) -> ListedImage:
    if empty := [name for name in COLUMNS if not row[name]]:
        raise UserError(f"{where}, line {line}: {', '.join(empty)} is empty; fill it in")
    if row["split"] not in _SPLITS:
        raise UserError(
            f"{where}, line {line}: split {row['split']!r} is unknown; known: {', '.join(_SPLITS)}"
        )
    path = PurePosixPath(row["path"])
    if path.is_absolute() or ".." in path.parts or files.is_remote(row["path"]):
        raise UserError(
            f"{where}, line {line}: {row['path']!r} leaves the CSV's folder; list paths below it, "
            "without '..'"
        )
    return ListedImage(path.as_posix(), row["label"], row["split"])


def _check_rows(images: list[ListedImage], lines: list[int], where: str) -> None:
    seen: dict[str, int] = {}
    trained = {image.label for image in images if image.split == TRAIN}
    for image, line in zip(images, lines, strict=True):
        if seen.setdefault(image.name, line) != line:
            raise UserError(
                f"{where}, line {line}: {image.name} is listed in line {seen[image.name]} too; "
                "remove one of them"
            )
        if image.split != TRAIN and image.label in trained:
            raise UserError(
                f"{where}, line {line}: label {image.label} is in {image.split} and in train; test "
                "labels must be unseen"
            )
    found = {image.split for image in images}
    if found not in ({TRAIN, TEST}, {TRAIN, QUERY, GALLERY}):
        raise UserError(
            f"{where} lists images of {', '.join(s for s in _SPLITS if s in found)}; there must be "
            "train, and either test, or query and gallery"
        )

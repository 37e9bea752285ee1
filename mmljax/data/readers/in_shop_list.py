"""In-Shop's lists of images and boxes, parsed and checked; the images are not looked at."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import NamedTuple

from mmljax.data import paths as files
from mmljax.data.readers.splits import DIRECTORY_FLAG, SPLITS
from mmljax.errors import UserError

PARTITION = "Eval/list_eval_partition.txt"
"""In-Shop's list of images, items and splits, below the data directory."""

HEADER = "image_name item_id evaluation_status"
"""Second line of that list; the first is the number of rows."""

BOXES = "Anno/list_bbox_inshop.txt"
"""In-Shop's list of bounding boxes, below the data directory."""

BOX_HEADER = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
"""Second line of that list; the first is the number of rows."""

IMAGES = {"train": 25_882, "query": 14_218, "gallery": 12_612}
"""Images of each split of the benchmark."""

ITEMS = {"train": 3_997, "query": 3_985, "gallery": 3_985}
"""Items of each split; query and gallery show the same ones."""

_AGAIN = "fetch the list again, or correct it"
_GET_IN_SHOP = (
    f"{DIRECTORY_FLAG} must name the folder that holds Img/ and Eval/ of the In-Shop Clothes "
    "Retrieval benchmark (on request: https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html)"
)


class InShopRow(NamedTuple):
    """A row of the list of images."""

    name: str  # path below Img/, normalised
    item: str
    split: str
    line: int  # of the list, from 1


class Box(NamedTuple):
    """The bounding box of the clothes in an image: pixels from its upper left corner."""

    left: int
    top: int
    right: int  # beyond the box
    bottom: int


def read_in_shop_list(directory: str | os.PathLike[str]) -> list[InShopRow]:
    """The rows of the list of the In-Shop folder ``directory``, in order.

    Lines may end in LF or CRLF. Paths are normalised (``img/./a.jpg`` is ``img/a.jpg``), so that
    no image is listed twice under two names.

    Raises:
      UserError: if the folder or the list is absent; on a malformed or repeated row, a count
        that is not that of the rows, an empty split, an item both in train and in test.
    """
    where = f"{DIRECTORY_FLAG}={os.fspath(directory)!r}"
    if not os.fspath(directory) or not files.is_folder(directory):
        raise UserError(f"{where} is not a directory; {_GET_IN_SHOP}")
    path = files.join(directory, PARTITION)
    rows = [_row(text, line, path) for line, text in _lines(path, HEADER)]
    _check_list(rows, path)
    return rows


def read_in_shop_boxes(directory: str | os.PathLike[str]) -> dict[str, Box]:
    """The box of each image of the In-Shop folder ``directory``, by the image's name.

    The boxes are in pixels of the low-resolution images.

    Raises:
      UserError: if the list is absent; on a malformed or repeated row, an empty box, or a count
        that is not that of the rows.
    """
    path = files.join(directory, BOXES)
    boxes: dict[str, Box] = {}
    for line, text in _lines(path, BOX_HEADER):
        fields = text.split()
        if len(fields) != 7 or not all(field.isdecimal() for field in fields[1:]):
            raise UserError(f"{path}, line {line}: {text!r} is not {BOX_HEADER!r}; {_AGAIN}")
        name, box = PurePosixPath(fields[0]).as_posix(), Box(*map(int, fields[3:]))
        if box.left >= box.right or box.top >= box.bottom:
            raise UserError(f"{path}, line {line}: the box of {name} is empty; {_AGAIN}")
        if boxes.setdefault(name, box) is not box:
            raise UserError(f"{path}, line {line}: {name} has a box above too; {_AGAIN}")
    return boxes


def _lines(path: str, header: str) -> list[tuple[int, str]]:
    """The rows of a list below its two header lines, stripped, with their line numbers."""
    try:
        lines = files.read(path).decode("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); {_GET_IN_SHOP}"
        ) from error
    if len(lines) < 2 or lines[1].split() != header.split():
        raise UserError(f"{path}, line 2: must be {header!r}; {_AGAIN}")
    if lines[0].strip() != str(len(lines) - 2):
        raise UserError(
            f"{path}, line 1: states {lines[0].strip()!r} rows, but {len(lines) - 2} follow the "
            f"header; {_AGAIN}"
        )
    return [(number, line.strip()) for number, line in enumerate(lines[2:], 3)]


def _row(text: str, line: int, path: str) -> InShopRow:
    fields = text.split()
    if len(fields) != 3:
        raise UserError(f"{path}, line {line}: {text!r} is not {HEADER!r}; {_AGAIN}")
    name, item, split = fields
    if split not in SPLITS:
        raise UserError(
            f"{path}, line {line}: evaluation_status {split!r} is unknown; known: "
            + ", ".join(SPLITS)
        )
    below = PurePosixPath(name)
    if below.is_absolute() or ".." in below.parts or files.is_remote(name):
        raise UserError(
            f"{path}, line {line}: {name!r} leaves the data directory or holds '..'; {_AGAIN}"
        )
    return InShopRow(below.as_posix(), item, split, line)


def _check_list(rows: list[InShopRow], path: str) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        if seen.setdefault(row.name, row.line) != row.line:
            raise UserError(
                f"{path}, line {row.line}: {row.name} is listed in line {seen[row.name]} too; "
                + _AGAIN
            )
    for split in SPLITS:
        if all(row.split != split for row in rows):
            raise UserError(f"{path}: no row is of split {split}; {_AGAIN}")
    train_items = {row.item for row in rows if row.split == "train"}
    for row in rows:
        if row.split != "train" and row.item in train_items:
            raise UserError(
                f"{path}, line {row.line}: item {row.item} is in {row.split} and in train; "
                "test items must be unseen"
            )

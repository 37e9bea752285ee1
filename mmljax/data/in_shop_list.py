"""In-Shop's list of images: parsed and checked, without a look at the images themselves."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mmljax.errors import UserError

PARTITION = "Eval/list_eval_partition.txt"
"""In-Shop's list of images, items and splits, below the data directory."""

HEADER = "image_name item_id evaluation_status"
"""Second line of that list; the first is the number of rows."""

SPLITS = ("train", "query", "gallery")

_FLAG = "--config.data.directory"
_AGAIN = "fetch the list again, or mend it"
_GET_IN_SHOP = (
    f"{_FLAG} must name the folder that holds Img/ and Eval/ of the In-Shop Clothes Retrieval "
    "benchmark (on request: https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html)"
)


class InShopRow(NamedTuple):
    """A row of the list of images."""

    name: str  # path below Img/
    item: str
    split: str
    line: int  # of the list, from 1


def read_in_shop_list(directory: str | os.PathLike[str]) -> list[InShopRow]:
    """The rows of the list of the In-Shop folder ``directory``, in order.

    Raises:
      UserError: if the folder or the list is absent; on a malformed or repeated row, a count
        that is not that of the rows, an empty split, an item both in train and in test.
    """
    where = f"{_FLAG}={os.fspath(directory)!r}"
    if not os.fspath(directory) or not Path(directory).is_dir():
        raise UserError(f"{where} is no directory; {_GET_IN_SHOP}")
    path = Path(directory) / PARTITION
    try:
        lines = path.read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}); {_GET_IN_SHOP}"
        ) from error
    if len(lines) < 2 or lines[1].split() != HEADER.split():
        raise UserError(f"{path}, line 2: must be {HEADER!r}; {_AGAIN}")
    rows = [_row(line, number, path) for number, line in enumerate(lines[2:], 3)]
    if lines[0].strip() != str(len(rows)):
        raise UserError(
            f"{path}, line 1: states {lines[0].strip()!r} rows, but {len(rows)} follow the header; "
            f"{_AGAIN}"
        )
    _check_list(rows, path)
    return rows


def _row(text: str, line: int, path: Path) -> InShopRow:
    fields = text.split()
    if len(fields) != 3:
        raise UserError(f"{path}, line {line}: {text.strip()!r} is not {HEADER!r}; {_AGAIN}")
    name, item, split = fields
    if split not in SPLITS:
        raise UserError(
            f"{path}, line {line}: evaluation_status {split!r} is unknown; known: "
            + ", ".join(SPLITS)
        )
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise UserError(f"{path}, line {line}: {name!r} leaves the data directory; {_AGAIN}")
    return InShopRow(name, item, split, line)


def _check_list(rows: list[InShopRow], path: Path) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        if seen.setdefault(row.name, row.line) != row.line:
            raise UserError(
                f"{path}, line {row.line}: {row.name} stands in line {seen[row.name]} too; {_AGAIN}"
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

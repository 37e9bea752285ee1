"""Reader of the In-Shop Clothes Retrieval benchmark, or any folder in its layout.

No image is decoded, and local folders need no TensorFlow.
"""

from __future__ import annotations

import os

import numpy as np

from mmljax.data import paths as files
from mmljax.data.readers.in_shop_list import PARTITION, InShopRow, read_in_shop_list
from mmljax.data.readers.splits import SPLITS, Part, make_dataset
from mmljax.errors import UserError
from mmljax.types import Dataset


def read_in_shop(directory: str | os.PathLike[str], *, images: str = "img") -> Dataset:
    """The In-Shop Clothes Retrieval benchmark, or any folder in its layout.

    Liu et al., DeepFashion (CVPR 2016). The class is the item id. Images lie in ``Img/img/`` or
    in ``img/``; every image of the list must exist.

    Args:
      directory: a folder with ``Eval/list_eval_partition.txt``.
      images: ``img``, or ``img_highres`` for the images of high resolution, which lie in a folder
        of that name under the same names.

    Returns:
      Splits of paths, in the order of the list.

    Raises:
      UserError: if the folder, the list or an image is absent, or the list contradicts itself.
    """
    rows = read_in_shop_list(directory)
    inner = files.join(directory, "Img")
    root = inner if files.is_folder(files.join(inner, images)) else os.fspath(directory)
    paths = [_below(row.name, images) for row in rows]
    _check_images(rows, paths, root, files.join(directory, PARTITION))
    whole = Part(
        np.array([files.join(root, path) for path in paths]),
        np.array([row.item for row in rows]),
        np.array([row.name for row in rows]),
    )
    splits = np.array([row.split for row in rows])
    return make_dataset(*(Part(*(c[splits == split] for c in whole)) for split in SPLITS))


def _below(name: str, images: str) -> str:
    """The path below the root of an image of the list, which names all of them below ``img/``."""
    return f"{images}/{name.removeprefix('img/')}" if name.startswith("img/") else name


def _check_images(rows: list[InShopRow], paths: list[str], root: str, where: str) -> None:
    lines: dict[str, int] = {}
    for row, path in zip(rows, paths, strict=True):
        if lines.setdefault(path, row.line) != row.line:
            raise UserError(
                f"{where}, line {row.line}: {row.name} is the same file as the image of line "
                f"{lines[path]}; remove one of them"
            )
    if absent := files.absent(root, paths):
        first = rows[absent[0]]
        raise UserError(
            f"image {first.name} ({where}, line {first.line}) is not in {root} "
            f"({len(absent)} of {len(rows)} are absent); unpack Img/img.zip there, or fetch the "
            "images again"
        )

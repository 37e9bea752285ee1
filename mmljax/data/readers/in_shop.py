"""Data sets as lists of images and labels, before decoding: In-Shop's layout, and arrays.

No reader decodes an image, and none needs TensorFlow for local files. Training classes become
``0 .. classes - 1`` in sorted order; query and gallery share a numbering of their own. Other
sources are in ``folders`` and ``tfds_sources``.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from mmljax.data import paths as files
from mmljax.data.readers.in_shop_list import PARTITION, SPLITS, InShopRow, read_in_shop_list
from mmljax.errors import UserError
from mmljax.types import Dataset, Split

_FLAG = "--config.data.directory"
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def read_in_shop(directory: str | os.PathLike[str], *, images: str = "img") -> Dataset:
    """The In-Shop Clothes Retrieval benchmark, or any folder in its layout.

    Liu et al., DeepFashion (CVPR 2016). The class is the item id. Images lie in ``Img/img/`` or
    in ``img/``; every image of the list must be there.

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


def count_small_classes(labels: Int[np.ndarray, " n"], *, size: int) -> int:
    """How many classes have fewer than ``size`` images."""
    return int((np.unique(labels, return_counts=True)[1] < size).sum())


def read_arrays(path: str | os.PathLike[str]) -> Dataset:
    """Images in an ``.npz`` file.

    Args:
      path: a file with ``images`` (uint8, ``[n height width]`` or ``[n height width channels]``),
        ``labels`` (integers ``[n]``, one numbering for all splits) and ``split`` (``[n]``:
        ``train``, ``query``, ``gallery``, or 0, 1, 2). Without gallery rows the queries search
        among themselves.

    Raises:
      UserError: if the file cannot be read or its arrays do not fit that description.
    """
    where = f"{_FLAG}={os.fspath(path)!r}"
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            images, labels, split = (file[key] for key in ("images", "labels", "split"))
    except _UNREADABLE as error:
        raise UserError(
            f"{where} cannot be read as arrays ({error}); name an .npz file "
            "with the arrays images, labels and split, none of them of Python objects"
        ) from error
    _check_arrays(images, labels, where)
    if split.shape != labels.shape:
        raise UserError(
            f"{where}: split {split.shape} must have one entry per label {labels.shape}"
        )
    numbers = split.astype(str)
    for number, name in enumerate(SPLITS):
        numbers[numbers == name] = str(number)
    unknown = ~np.isin(numbers, ["0", "1", "2"])
    if unknown.any():
        raise UserError(f"{where}: split holds {split[unknown][0]!r}; known: {', '.join(SPLITS)}")
    rows = [np.flatnonzero(numbers == str(number)) for number in range(3)]
    for name, found in zip(SPLITS[:2], rows, strict=False):
        if not len(found):
            raise UserError(f"{where}: split marks no image as {name}; mark some")
    shared = np.intersect1d(labels[rows[0]], labels[np.concatenate(rows[1:])])
    if len(shared):
        raise UserError(
            f"{where}: class {shared[0]} has images both in train and in query or gallery; test "
            "classes must be unseen"
        )
    images = _with_channels(images)
    return make_dataset(
        *(Part(images[r], labels[r], _numbered("images", r)) for r in rows if len(r))
    )


def from_arrays(
    train_images: UInt8[np.ndarray, "n ..."],
    train_labels: Int[np.ndarray, " n"],
    test_images: UInt8[np.ndarray, "q ..."],
    test_labels: Int[np.ndarray, " q"],
    *,
    gallery_images: UInt8[np.ndarray, "g ..."] | None = None,
    gallery_labels: Int[np.ndarray, " g"] | None = None,
) -> Dataset:
    """A data set of images in memory, ``[n height width]`` or ``[n height width channels]`` uint8.

    Test and gallery labels share one numbering, that of the training labels is another. Without
    a gallery the test images search among themselves.

    Raises:
      UserError: on images that are not uint8 or do not fit their labels.
    """
    if (gallery_images is None) != (gallery_labels is None):
        raise UserError("gallery_images and gallery_labels must be given both or not at all")
    parts = {
        "train": (train_images, train_labels),
        "test": (test_images, test_labels),
        "gallery": (gallery_images, gallery_labels),
    }
    checked = []
    for name, (images, labels) in parts.items():
        if images is not None and labels is not None:
            _check_arrays(images, labels, name)
            names = _numbered(name, range(len(labels)))
            checked.append(Part(_with_channels(images), labels, names))
    return make_dataset(*checked)


class Part(NamedTuple):
    """One split as a source has it, its classes not numbered yet."""

    images: Any  # numpy [n ...]
    labels: Any  # numpy [n], ids or numbers of any kind
    names: Any  # numpy [n] str


def make_dataset(train: Part, query: Part, gallery: Part | None = None) -> Dataset:
    """A data set of its parts; classes are numbered, those of training and of the rest apart."""
    classes, train_labels = np.unique(train.labels, return_inverse=True)
    tests = [part for part in (query, gallery) if part is not None]
    _, test_labels = np.unique(np.concatenate([p.labels for p in tests]), return_inverse=True)
    query_labels, gallery_labels = np.split(test_labels.astype(np.int32), [len(query.labels)])
    return Dataset(
        train=Split(train.images, train_labels.astype(np.int32), train.names),
        query=Split(query.images, query_labels, query.names),
        gallery=None if gallery is None else Split(gallery.images, gallery_labels, gallery.names),
        classes=len(classes),
    )


def _below(name: str, images: str) -> str:
    """Where an image of the list lies: the list names all of them below ``img/``."""
    return f"{images}/{name.removeprefix('img/')}" if name.startswith("img/") else name


def _check_images(rows: list[InShopRow], paths: list[str], root: str, where: str) -> None:
    if absent := files.absent(root, paths):
        first = rows[absent[0]]
        raise UserError(
            f"image {first.name} ({where}, line {first.line}) is not in {root} "
            f"({len(absent)} of {len(rows)} are absent); unpack Img/img.zip there, or fetch the "
            "images again"
        )


def _check_arrays(images: np.ndarray, labels: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(
            f"{where}: images must be uint8 [n height width] or [n height width channels], found "
            f"{images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels must be {len(images)} integers, one per image, found {labels.dtype} "
            f"{labels.shape}"
        )


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images if images.ndim == 4 else images[..., None]


def _numbered(name: str, numbers: Iterable[int]) -> np.ndarray:
    return np.array([f"{name}[{number}]" for number in numbers])

"""Data sets as lists of images and labels, before decoding: In-Shop's layout, arrays, TFDS.

No reader decodes an image, and none but ``read_tfds`` imports TensorFlow. Training classes become
``0 .. classes - 1`` in sorted order; query and gallery share a numbering of their own.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from mmljax.config import choose
from mmljax.data.in_shop_list import PARTITION, SPLITS, InShopRow, read_in_shop_list
from mmljax.errors import UserError
from mmljax.types import Dataset, Split

_FLAG = "--config.data.directory"
_PREPARE = {"in_shop": "mmljax.data.in_shop.prepare(manual_dir, data_dir)"}
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def read_in_shop(directory: str | os.PathLike[str]) -> Dataset:
    """The In-Shop Clothes Retrieval benchmark, or any folder in its layout.

    Liu et al., DeepFashion (CVPR 2016). The class is the item id. Images lie in ``Img/img/`` or
    in ``img/``; every image of the list must be there.

    Args:
      directory: a local folder with ``Eval/list_eval_partition.txt``.

    Returns:
      Splits of paths, in the order of the list.

    Raises:
      UserError: if the folder, the list or an image is absent, or the list contradicts itself.
    """
    rows = read_in_shop_list(directory)
    root = Path(directory)
    root = root / "Img" if (root / "Img" / "img").is_dir() else root
    _check_images(rows, root, Path(directory) / PARTITION)
    parts = ([row for row in rows if row.split == split] for split in SPLITS)
    return _dataset(*(_in_shop_part(part, root) for part in parts))


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
    return _dataset(*(_Part(images[r], labels[r], _numbered("images", r)) for r in rows if len(r)))


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
            checked.append(_Part(_with_channels(images), labels, names))
    return _dataset(*checked)


def read_tfds(builder_name: str, directory: str | os.PathLike[str]) -> Dataset:
    """A data set that TFDS has prepared: images as the bytes of their files, all in memory.

    Nothing is downloaded or prepared. CUB-200-2011 and Cars196 are split as is the custom of
    metric learning: the first half of the classes trains, the other half tests.

    Args:
      builder_name: ``in_shop``, ``caltech_birds2011``, ``cars196``, ``stanford_online_products``.
      directory: TFDS's ``data_dir``, which holds a folder of that name.

    Raises:
      UserError: if the builder is unknown or not prepared there.
    """
    layout = choose(_TFDS, builder_name, key="config.data.source")
    parts = [_tfds_part(builder_name, directory, layout, split) for split in layout.splits]
    if not layout.first_unseen:
        return _dataset(*parts)
    images, labels, names = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    seen = labels < layout.first_unseen
    return _dataset(*(_Part(images[r], labels[r], names[r]) for r in (seen, ~seen)))


class _Part(NamedTuple):
    images: Any  # numpy [n ...]
    labels: Any  # numpy [n], ids or numbers of any kind
    names: Any  # numpy [n] str


class _Tfds(NamedTuple):
    label: str  # feature that is the class
    name: str  # feature that names an image; "" for none
    splits: tuple[str, ...]
    first_unseen: int  # first test class over all splits; 0 where the splits are disjoint


_TFDS = {
    "in_shop": _Tfds("label", "name", SPLITS, 0),
    "caltech_birds2011": _Tfds("label", "image/filename", ("train", "test"), 100),
    "cars196": _Tfds("label", "", ("train", "test"), 98),
    "stanford_online_products": _Tfds("class_id", "", ("train", "test"), 0),
}


def _dataset(train: _Part, query: _Part, gallery: _Part | None = None) -> Dataset:
    """Number the classes, of the training images and of the rest apart."""
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


def _in_shop_part(rows: list[InShopRow], root: Path) -> _Part:
    paths = np.array([str(root / row.name) for row in rows])
    return _Part(paths, np.array([r.item for r in rows]), np.array([r.name for r in rows]))


def _check_images(rows: list[InShopRow], root: Path, path: Path) -> None:
    """Name the first absent image; one listing per folder, as a call per image takes long."""
    files: dict[str, set[str]] = {}
    for folder in {row.name.rpartition("/")[0] for row in rows}:
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(root / folder) as entries,
        ):
            files[folder] = {entry.name for entry in entries if entry.is_file()}
    absent = []
    for row in rows:
        folder, _, file = row.name.rpartition("/")
        if file not in files.get(folder, ()):
            absent.append(row)
    if absent:
        raise UserError(
            f"image {absent[0].name} ({path}, line {absent[0].line}) is not in {root} "
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


def _tfds_part(
    builder_name: str, directory: str | os.PathLike[str], layout: _Tfds, split: str
) -> _Part:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")
    try:
        builder = tfds.core.read_only_builder.builder_from_files(
            builder_name, data_dir=os.fspath(directory)
        )
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"{_FLAG}={os.fspath(directory)!r} holds no prepared TFDS data set {builder_name!r}; "
            f"prepare it there: {_PREPARE.get(builder_name, f'tfds build {builder_name}')}"
        ) from error
    features = {"image": True, layout.label: True, **({layout.name: True} if layout.name else {})}
    rows = list(
        builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding(features, {"image": tfds.decode.SkipDecoding()}),
            read_config=tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1),
        ).as_numpy_iterator()
    )
    images = np.empty(len(rows), object)
    images[:] = [row["image"] for row in rows]
    labels = np.array([row[layout.label] for row in rows])
    if not layout.name:
        return _Part(images, labels, _numbered(split, range(len(rows))))
    return _Part(images, labels, np.array([row[layout.name].decode() for row in rows]))

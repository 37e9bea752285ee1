"""Data sets of uint8 arrays: from an ``.npz`` file, or already in memory. No TensorFlow."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt8

from mmljax.data.limits import available_memory, check_memory
from mmljax.data.readers.splits import DIRECTORY_FLAG, SPLITS, Part, make_dataset
from mmljax.errors import UserError
from mmljax.text import one_line
from mmljax.types import Dataset

_ARRAYS = ("images", "labels", "split")
_MOST_CHANNELS = 4  # more of them in the last axis than in the second: channels come first
_UNREADABLE = (
    *(OSError, KeyError, TypeError, ValueError, EOFError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


def read_arrays(path: str | os.PathLike[str]) -> Dataset:
    """Images in an ``.npz`` file.

    Args:
      path: a file with ``images`` (uint8, ``[n height width]`` or ``[n height width channels]``),
        ``labels`` (integers ``[n]``, one numbering for all splits) and ``split`` (``[n]``:
        ``train``, ``query``, ``gallery``, or 0, 1, 2). Without gallery rows the queries search
        among themselves.

    Raises:
      UserError: if the file cannot be read, needs more memory than is available, or its arrays do
        not fit that description.
    """
    where = f"{DIRECTORY_FLAG}={os.fspath(path)!r}"
    try:
        images, labels, split = _read(path, where)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"{where} cannot be read as arrays ({one_line(error)}); name an .npz file "
            "with the arrays images, labels and split, none of them of Python objects"
        ) from error
    _check_arrays(images, labels, where)
    rows = _rows_of_splits(labels, split, where)
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

    Test and gallery labels share one numbering; training labels have their own. Without a gallery
    the test images search among themselves.

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


def _read(path: str | os.PathLike[str], where: str) -> list[np.ndarray]:
    """The three arrays, once their headers are known to fit into memory."""
    with zipfile.ZipFile(path) as archive:
        stated = sum(_stated_bytes(archive, name) for name in _ARRAYS)
    check_memory(
        2 * stated,  # the array as read, and its splits
        available_memory(),
        what=f"{where}, whose headers state {stated:,} bytes of arrays,",
        cure="split the file, or store the images as files and read them from a folder",
    )
    with np.load(path, allow_pickle=False) as file:
        return [file[name] for name in _ARRAYS]


def _stated_bytes(archive: zipfile.ZipFile, name: str) -> int:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    return math.prod(shape) * dtype.itemsize


def _rows_of_splits(labels: np.ndarray, split: np.ndarray, where: str) -> list[np.ndarray]:
    """The rows of train, query and gallery; those of the gallery may be empty."""
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
    return rows


def _check_arrays(images: np.ndarray, labels: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise UserError(
            f"{where}: images must be uint8 [n height width] or [n height width channels], found "
            f"{images.dtype} {images.shape}"
        )
    if images.ndim == 4 and images.shape[1] <= _MOST_CHANNELS < images.shape[3]:
        raise UserError(
            f"{where}: images {images.shape} seem to have their channels first; store "
            "images.transpose(0, 2, 3, 1), which is [n height width channels]"
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

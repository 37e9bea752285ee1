"""What every reader shares: splits before numbering, and the data set made of them.

Training classes are numbered ``0 .. classes - 1`` in sorted order. Query and gallery share a
numbering of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mmljax.data import paths as files
from mmljax.types import Dataset, Split

DIRECTORY_FLAG = "--config.data.directory"
TRAIN, TEST, QUERY, GALLERY = "train", "test", "query", "gallery"
SPLITS = (TRAIN, QUERY, GALLERY)


class Part(NamedTuple):
    """One split as a source holds it; classes are not numbered yet."""

    images: Any  # numpy [n ...]
    labels: Any  # numpy [n], ids or numbers of any kind
    names: Any  # numpy [n] str


class ListedImage(NamedTuple):
    """An image file of a folder or of a CSV file."""

    name: str  # path below the root, with /
    label: str
    split: str  # train, test, query or gallery


def make_dataset(train: Part, query: Part, gallery: Part | None = None) -> Dataset:
    """The data set of these splits, with numbered classes."""
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


def dataset_of_files(root: str | os.PathLike[str], images: Iterable[ListedImage]) -> Dataset:
    """The data set of image files below ``root``, each split in the order of ``images``.

    Images of the split ``test`` are queries that search among themselves.
    """
    by_split: dict[str, list[ListedImage]] = {}
    for image in images:
        by_split.setdefault(image.split, []).append(image)
    parts = [by_split[split] for split in (TRAIN, TEST, QUERY, GALLERY) if split in by_split]
    return make_dataset(
        *(
            Part(
                np.array([files.join(root, image.name) for image in part]),
                np.array([image.label for image in part]),
                np.array([image.name for image in part]),
            )
            for part in parts
        )
    )


def count_small_classes(labels: Int[np.ndarray, " n"], *, size: int) -> int:
    """How many classes have fewer than ``size`` images."""
    return int((np.unique(labels, return_counts=True)[1] < size).sum())

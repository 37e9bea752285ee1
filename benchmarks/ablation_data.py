"""The data of the ablation: Omniglot's characters, or the grocery photographs, as arrays."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.omniglot import halve
from mmljax.data.readers import in_shop as sources
from mmljax.errors import UserError
from mmljax.types import Dataset, Split

PIXELS = 32  # of the photographs
TRAIN_ALPHABETS, TUNING_ALPHABETS = 20, 15  # the first ones; of the others none is trained on


@functools.lru_cache
def load(path: str, *, tuning: bool) -> Dataset:
    """Train and test classes of the study; under ``tuning`` both are training classes.

    Raises:
      UserError: on a file of another kind.
    """
    if Path(path).suffix == ".npz":
        return _omniglot(path, tuning=tuning)
    if (Path(path) / "Eval").is_dir():
        return _photographs(path, tuning=tuning)
    raise UserError(
        f"--data={path} is neither omniglot_background_56.npz nor a folder that holds Img/ and "
        "Eval/; unpack the archive first"
    )


def _omniglot(path: str, *, tuning: bool) -> Dataset:
    data = np.load(path)
    images, labels, alphabet = halve(data["images"])[..., None], data["labels"], data["alphabet"]
    last, end = (TUNING_ALPHABETS, TRAIN_ALPHABETS) if tuning else (TRAIN_ALPHABETS, 30)
    train, test = alphabet < last, (alphabet >= last) & (alphabet < end)
    classes, train_labels = np.unique(labels[train], return_inverse=True)
    return Dataset(
        train=_split(images[train], train_labels),
        query=_split(images[test], labels[test]),
        gallery=None,
        classes=len(classes),
    )


def _photographs(path: str, *, tuning: bool) -> Dataset:
    """Images of 32 px; the first three quarters of the training items train under ``tuning``."""
    dataset = sources.read_in_shop(path)
    if not tuning:
        query, gallery = dataset.query, dataset.gallery
        splits = [_decode(split) for split in (dataset.train, query, gallery) if split is not None]
        return Dataset(splits[0], splits[1], splits[2], dataset.classes)
    train = _decode(dataset.train)
    last = dataset.classes * TUNING_ALPHABETS // TRAIN_ALPHABETS
    fits = train.labels < last
    return Dataset(
        _split(train.images[fits], train.labels[fits]),
        _split(train.images[~fits], train.labels[~fits]),
        None,
        last,
    )


def _decode(split: Split) -> Split:
    images = []
    for name in split.images:
        with Image.open(name) as image:
            images.append(np.asarray(image.convert("RGB").resize((PIXELS, PIXELS), Image.BOX)))
    return _split(np.stack(images), split.labels)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    names: Any = np.arange(len(labels)).astype(str)
    return Split(images, labels.astype(np.int32), names)

"""Fingerprints of a data set: small hashes that change when its images or labels do."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from mmljax.data import paths as files
from mmljax.errors import UserError

if TYPE_CHECKING:  # at run time it would import jax, which readers of records do without
    from mmljax.types import Dataset, Split

_CONTENTS = 16  # images of a split of which the contents are hashed
_SIZES = 4096  # local files of a split of which the sizes are hashed


def dataset_fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What a run stores of its data set, so that a resumed run can notice a change.

    The folder of the data set is not part of it, so a set that is moved or copied is the same.

    Returns:
      JSON values. For each split: the numbers of images and classes, and hashes of the names with
      their labels (as numbered), of the order (of training images, on which the batches depend),
      of the sizes of sampled files and of the contents of sampled images.

    Raises:
      UserError: if a sampled image cannot be read.
    """
    splits = {name: getattr(dataset, name) for name in ("train", "query", "gallery", "distractors")}
    found: dict[str, Any] = {}
    for name, split in splits.items():
        if split is not None:
            found[name] = {
                "images": len(split.labels),
                "classes": len(np.unique(split.labels)),
                "labels": _labels(split),
                "order": _digest(np.asarray(split.names).tolist()) if name == "train" else "",
                "sizes": _sizes(split),
                "contents": fingerprint_contents(split),
            }
    return found


_CHANGES = {
    "labels": "names or labels differ",
    "order": "the order of the images differs",
    "sizes": "sizes of sampled files differ",
    "contents": "contents of sampled images differ",
}


def fingerprint_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two results of :func:`dataset_fingerprint`, one line per change.

    >>> old = {"train": {"images": 120, "classes": 20, "labels": "a"}}
    >>> fingerprint_differences(old, {"train": {"images": 121, "classes": 20, "labels": "b"}})
    ['train: 121 images, was 120']
    """
    lines = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            if a != b:
                lines.append(f"{name}: {_described(b)}, was {_described(a)}")
            continue
        counts = [f for f in ("images", "classes") if a.get(f) != b.get(f)]
        lines += [f"{name}: {b.get(field)} {field}, was {a.get(field)}" for field in counts]
        if not counts:  # else all hashes differ too
            changes = [text for key, text in _CHANGES.items() if a.get(key) != b.get(key)]
            lines += [f"{name}: {text}" for text in changes]
    return lines


def fingerprint_names(splits: Sequence[Split]) -> str:
    """16 hexadecimal digits of the names, and of which images share a class.

    Neither the order of the images nor the numbering of the classes plays a part.
    """
    digest = hashlib.sha256()
    numbers: dict[int, int] = {}  # of the classes, as they first appear
    for split in splits:
        order = _by_name(split)
        names = np.asarray(split.names).astype(str)[order].tolist()
        digest.update(f"split of {len(names)}\n".encode())
        for name, label in zip(names, split.labels[order].tolist(), strict=True):
            digest.update(f"{numbers.setdefault(label, len(numbers))} {name}\n".encode())
    return digest.hexdigest()[:16]


def fingerprint_contents(split: Split) -> str:
    """16 hexadecimal digits of the stored contents of 16 images, evenly spaced by name.

    Raises:
      UserError: naming an image that cannot be read.
    """
    digest = hashlib.sha256()
    for row in _sample(split, _CONTENTS):
        image = split.images[row]
        if isinstance(image, str):
            try:
                image = files.read(image)
            except OSError as error:
                raise UserError(f"image {image} cannot be read ({error}); fetch it again") from None
        elif isinstance(image, np.ndarray):
            digest.update(str(image.shape).encode())
            image = image.tobytes()
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:16]


def _labels(split: Split) -> str:
    """A hash of names and numbered labels, whatever their order."""
    order = _by_name(split)
    names, labels = np.asarray(split.names)[order].tolist(), split.labels[order].tolist()
    return _digest(f"{label} {name}" for label, name in zip(labels, names, strict=True))


def _sizes(split: Split) -> str:
    """A hash of the sizes of sampled local files; empty where images are no local files."""
    rows = _sample(split, _SIZES)
    paths = [split.images[row] for row in rows]
    if not isinstance(paths[0], str) or files.is_remote(paths[0]):
        return ""
    try:
        return _digest(str(os.stat(path).st_size) for path in paths)
    except OSError as error:
        raise UserError(f"an image cannot be read ({error}); fetch it again") from None


def _sample(split: Split, count: int) -> Int[np.ndarray, " s"]:
    """At most ``count`` rows of a split, evenly spaced by name."""
    order = _by_name(split)
    return order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]


def _by_name(split: Split) -> Int[np.ndarray, " n"]:
    return np.argsort(np.asarray(split.names).astype(str), kind="stable")


def _digest(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:16]


def _described(split: Any) -> str:
    return f"{split.get('images')} images" if isinstance(split, Mapping) else "none"

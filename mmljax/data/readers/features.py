"""Features of a data set: what a backbone gave for each image, kept in files.

``mmljax features`` writes a folder of:

- ``train.npy``, ``query.npy`` and, if the data set has them, ``gallery.npy`` and
  ``distractors.npy``: the pooled
  features, ``[v n f]`` on the disk, float32 or float16. View 0 is the evaluation crop; those after
  it, which only the training split has, are random crops.
- ``images.npz``: labels and names of the images of each split.
- ``features.json``: what the features were made from. It is written last.

No TensorFlow is needed to read them, and no features are read before they are used.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mmljax.config import Config, to_dict
from mmljax.data.readers.splits import DIRECTORY_FLAG, SPLITS
from mmljax.errors import UserError
from mmljax.files import write_atomically
from mmljax.text import differences, one_line
from mmljax.types import Dataset, Split

IDENTITY, IMAGES = "features.json", "images.npz"
DISTRACTORS = "distractors"
FORMAT = "mmljax features 1"

# What of the model decides its pooled features; the rest is the head's.
_BACKBONE_KEYS = ("backbone", "width", "pretrained", "pixel_norm", "pooling", "compute_dtype")
_CROP_KEYS = ("image_size", "resize_size", "resampling")  # what decides an evaluation crop
# What of the data's config does not decide how a random crop is made.
_NOT_OF_CROPS = (
    *("source", "directory", "check_counts", "test_share", "exclude", "corrupt", "synthetic"),
    *("batch_size", "images_per_class", "composition", "micro_batches", "threads", "prefetch"),
    *_CROP_KEYS,
)


def read_features(config: Config) -> Dataset:
    """The data set of a folder of features, ``images`` being ``[n v f]`` arrays on the disk.

    Args:
      config: of the run; its ``data.directory`` is the folder, as ``mmljax features`` wrote it.

    Raises:
      UserError: if the folder is no complete folder of features, a file of it is missing or
        damaged, or the features are of another backbone or crop than the config names.
    """
    folder = Path(config.data.directory)
    identity = read_identity(folder, where=f"{DIRECTORY_FLAG}={folder}")
    changed = differences(
        {key: identity.get(key) for key in ("model", "data")},
        network_input(config),
        prefix="config",
    )
    if changed:
        raise UserError(
            f"{DIRECTORY_FLAG}={folder} has features of another network or crop than the config "
            f"names ({'; '.join(changed)}); change the config, or make such features"
        )
    found = identity.get(DISTRACTORS)
    if config.evaluation.distractors not in ("", found):
        raise UserError(
            f"--config.evaluation.distractors={config.evaluation.distractors}: "
            f"{DIRECTORY_FLAG}={folder} has features of {found or 'no distractors'}; make them by "
            "mmljax features with this flag"
        )
    wanted_splits = (*SPLITS, DISTRACTORS) if config.evaluation.distractors else SPLITS
    try:
        with np.load(folder / IMAGES, allow_pickle=False) as images:
            splits = {
                name: Split(
                    _mapped(folder / f"{name}.npy"),
                    images[f"{name} labels"],
                    images[f"{name} names"],
                )
                for name in wanted_splits
                if f"{name} labels" in images
            }
        for name, split in splits.items():
            wanted = len(split.labels), identity["views"][name], identity["features"]
            if split.images.shape != wanted or split.images.dtype != identity["dtype"]:
                found = f"{split.images.dtype} {split.images.shape}"
                raise ValueError(f"{name}.npy has {found}, not {identity['dtype']} {wanted}")
        return Dataset(
            splits["train"],
            splits["query"],
            splits.get("gallery"),
            int(identity["classes"]),
            splits.get(DISTRACTORS),
        )
    except (OSError, KeyError, ValueError, EOFError) as error:
        raise UserError(
            f"{DIRECTORY_FLAG}={folder}: its features cannot be read ({one_line(error)}); remove "
            "the folder and make them again with mmljax features"
        ) from error


def read_identity(folder: Path, *, where: str) -> dict[str, Any]:
    """The content of ``features.json``.

    Args:
      folder: of features, or a run on features.
      where: what names the folder, for the error.

    Raises:
      UserError: if the folder has none, or it is not one of ours.
    """
    path = folder / IDENTITY
    if not path.is_file():
        state = "is incomplete" if (folder / PROGRESS).is_file() else f"has no {IDENTITY}"
        raise UserError(
            f"{where} {state}; mmljax features --config CONFIG --output {folder} makes features"
        )
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        if identity["format"] != FORMAT:
            raise ValueError(f"format {identity['format']!r}, not {FORMAT!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{where}: {IDENTITY} cannot be used ({one_line(error)}); make the features again"
        ) from error
    return identity


def copy_identity(folder: Path, run: Path) -> None:
    """Keep with a run what its features were made from, so that its head finds its backbone."""
    write_atomically(run / IDENTITY, (folder / IDENTITY).read_bytes())


PROGRESS = "progress.json"
"""Present while the features are being made: how many rows of each file are complete."""


def network_input(config: Config) -> dict[str, Any]:
    """What of a config decides the features of an evaluation crop."""
    return {
        "model": {key: getattr(config.model, key) for key in _BACKBONE_KEYS},
        "data": {key: getattr(config.data, key) for key in _CROP_KEYS},
    }


def random_crops(config: Config) -> dict[str, Any]:
    """What of a config decides its random crops, besides the size."""
    kept = {k: v for k, v in to_dict(config)["data"].items() if k not in _NOT_OF_CROPS}
    return {**kept, "seed": config.seed}


def _mapped(path: Path) -> Float[np.ndarray, "n v f"]:
    """A file's features, of which the rows that are asked for are read, and no more around them."""
    features = np.load(path, mmap_mode="r")
    features._mmap.madvise(mmap.MADV_RANDOM)
    return np.moveaxis(features, 0, 1)


def gather(
    features: Float[np.ndarray, "n v f"], rows: Int[np.ndarray, " b"], views: Int[np.ndarray, " b"]
) -> Float[np.ndarray, "b f"]:
    """Some rows as float32, without keeping what was read of a mapped file in the process.

    Pages of a file that were touched count as memory of the process until they are given back.
    """
    found = np.asarray(features[rows, views], np.float32)
    mapped = getattr(features, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)
    return found

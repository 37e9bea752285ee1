"""Per-query records of an evaluation, and the stamp that says by which protocol they came about.

Two results may be compared only if their stamps are equal: same images, same preparation, same
rules. The records of a run are its ``queries.npz``, of its last evaluation.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.errors import UserError

if TYPE_CHECKING:  # at run time they would bring jax, which readers of records do without
    from mmljax.config import Config
    from mmljax.types import Dataset, Split

QUERIES = "queries.npz"

_SAMPLES = 16  # images of which the contents are part of the stamp
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile)


class Records(NamedTuple):
    """What each query scored; NumPy, one entry per query."""

    protocol: Mapping[str, Any]
    step: int  # after how many updates
    names: np.ndarray  # [q] str, of the images
    labels: np.ndarray  # [q] their items
    values: Mapping[str, np.ndarray]  # [q] per score, named as in the results; NaN: a lone query


def make_stamp(dataset: Dataset, config: Config) -> dict[str, Any]:
    """What must be equal for two results to be comparable.

    ``data`` changes with any name or grouping of query and gallery images, but neither with their
    order nor with the numbering of the labels; ``images`` with the stored contents of a few of
    them, and so with the variant that was downloaded.
    """
    query, gallery = dataset.query, dataset.gallery
    splits = [query] if gallery is None else [query, gallery]
    return {
        "data": _fingerprint(splits),
        "queries": len(query.labels),
        "gallery": "the other queries" if gallery is None else len(gallery.labels),
        "items": len(np.unique(np.concatenate([split.labels for split in splits]))),
        "images": _contents(query),
        "resize": config.data.resize_size,
        "crop": config.data.image_size,
        "precision": f"{config.model.compute_dtype} network, float32 similarities",
        "lone_queries": "left out of every score, and counted",
        "ties": "irrelevant before relevant",
    }


def stamp_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """One ``field: value in a, value in b`` per field that is not the same."""
    fields = [*a, *(field for field in b if field not in a)]
    return [f"{f}: {a.get(f)!r}, {b.get(f)!r}" for f in fields if a.get(f) != b.get(f)]


def write_records(folder: Path, records: Records) -> Path:
    """Write ``queries.npz`` into the folder, whole or not at all, and return its path."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"value {key}": value for key, value in records.values.items()}
    arrays |= {"name": records.names, "label": records.labels, "step": records.step}
    np.savez_compressed(buffer, protocol=json.dumps(records.protocol), **arrays)
    path = folder / QUERIES
    temporary = path.with_name(QUERIES + ".partial")
    with temporary.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def read_records(path: Path) -> Records:
    """The records of a run's directory, or of a file that lies in it.

    Raises:
      UserError: if there are none, or they cannot be read.
    """
    file = path if path.suffix == ".npz" else (path if path.is_dir() else path.parent) / QUERIES
    if not path.exists() or not file.exists():
        raise UserError(
            f"{file if path.exists() else path} does not exist; name the --workdir of a run that "
            "was evaluated"
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Records(
                protocol=json.loads(str(arrays["protocol"])),
                step=int(arrays["step"]),
                names=arrays["name"],
                labels=arrays["label"],
                values={
                    key.removeprefix("value "): arrays[key]
                    for key in arrays.files
                    if key.startswith("value ")
                },
            )
    except _UNREADABLE as error:
        raise UserError(f"{file} is no file of records ({error}); evaluate the run again") from None


def _fingerprint(splits: list[Split]) -> str:
    """Sixteen hexadecimal digits of which images there are, and which show one item."""
    digest = hashlib.sha256()
    numbers: dict[int, int] = {}  # of the items, as they first appear
    for split in splits:
        names = np.asarray(split.names).astype(str)
        order = np.argsort(names, kind="stable")
        digest.update(f"split of {len(names)}\n".encode())
        for name, label in zip(names[order].tolist(), split.labels[order].tolist(), strict=True):
            digest.update(f"{numbers.setdefault(label, len(numbers))} {name}\n".encode())
    return digest.hexdigest()[:16]


def _contents(split: Split) -> str:
    """Sixteen hexadecimal digits of a few images as they are stored."""
    names = np.asarray(split.names).astype(str)
    order = np.argsort(names, kind="stable")
    digest = hashlib.sha256()
    for place in np.unique(np.linspace(0, len(order) - 1, _SAMPLES).round().astype(int)):
        image = split.images[order[place]]
        if isinstance(image, str):
            try:
                image = Path(image).read_bytes()
            except OSError as error:
                raise UserError(f"image {image} cannot be read ({error}); fetch it again") from None
        elif isinstance(image, np.ndarray):
            digest.update(str(image.shape).encode())
            image = image.tobytes()
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:16]

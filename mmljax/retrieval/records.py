"""Per-query records of an evaluation, and the stamp that says by which protocol they came about.

Two results may be compared only if their stamps are equal: same images, same preparation, same
rules. The records of a run are its ``queries.npz``, of its last evaluation.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.data.fingerprint import fingerprint_contents, fingerprint_names
from mmljax.errors import UserError

if TYPE_CHECKING:  # at run time they would bring jax, which readers of records do without
    from mmljax.config import Config
    from mmljax.retrieval.evaluate import Retrieval
    from mmljax.types import Dataset

QUERIES = "queries.npz"

_UNREADABLE = (
    *(OSError, KeyError, TypeError, ValueError, EOFError, RecursionError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


class Neighbors(NamedTuple):
    """What each query found; NumPy."""

    rows: np.ndarray  # [q k] of the gallery below, nearest first
    similarity: np.ndarray  # [q k]
    names: np.ndarray  # [g] str, of the gallery's images, or of the queries' in self-retrieval
    labels: np.ndarray  # [g]


class Records(NamedTuple):
    """What each query scored; NumPy, one entry per query."""

    protocol: Mapping[str, Any]
    step: int  # after how many updates
    names: np.ndarray  # [q] str, of the images
    labels: np.ndarray  # [q] their items
    values: Mapping[str, np.ndarray]  # [q] per score, named as in the results; NaN: a lone query
    neighbors: Neighbors | None = None  # where they were kept


def make_records(
    stamp: Mapping[str, Any], step: int, dataset: Dataset, result: Retrieval
) -> Records:
    """The records of an evaluation after ``step`` updates."""
    query, gallery = dataset.query, dataset.gallery or dataset.query
    found = Neighbors(result.neighbors, result.similarity, gallery.names, gallery.labels)
    return Records(stamp, step, query.names, query.labels, result.per_query, found)


def make_stamp(dataset: Dataset, config: Config) -> dict[str, Any]:
    """What must be equal for two results to be comparable.

    ``data`` changes with any name or grouping of query and gallery images, but neither with their
    order nor with the numbering of the labels; ``images`` with the stored contents of a few of
    them, and so with the variant that was downloaded.
    """
    query, gallery = dataset.query, dataset.gallery
    splits = [query] if gallery is None else [query, gallery]
    return {
        "data": fingerprint_names(splits),
        "queries": len(query.labels),
        "gallery": "the other queries" if gallery is None else len(gallery.labels),
        "items": len(np.unique(np.concatenate([split.labels for split in splits]))),
        "images": fingerprint_contents(query),
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
    if records.neighbors is not None:
        arrays |= {f"neighbor {k}": v for k, v in records.neighbors._asdict().items()}
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
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            records = Records(
                protocol=json.loads(str(arrays["protocol"])),
                step=int(arrays["step"]),
                names=arrays["name"],
                labels=arrays["label"],
                values={
                    key.removeprefix("value "): arrays[key]
                    for key in arrays.files
                    if key.startswith("value ")
                },
                neighbors=Neighbors(*(arrays[f"neighbor {key}"] for key in Neighbors._fields))
                if "neighbor rows" in arrays.files
                else None,
            )
        _check_records(records)
        return records
    except _UNREADABLE as error:
        raise UserError(f"{file} is no file of records ({error}); evaluate the run again") from None


def _check_records(records: Records) -> None:
    """Refuse arrays that do not fit one another, as a file made by something else may hold."""
    count = (len(records.names),) if records.names.ndim == 1 else ()
    fits = [
        isinstance(records.protocol, dict),
        records.names.dtype.kind == "U",
        records.labels.dtype.kind in "iu" and records.labels.shape == count,
        *(x.dtype.kind == "f" and x.shape == count for x in records.values.values()),
    ]
    if records.neighbors is not None:
        rows, similarity, names, labels = records.neighbors
        fits += [
            rows.dtype.kind in "iu" and rows.ndim == 2 and rows.shape[:1] == count,
            similarity.dtype.kind == "f" and similarity.shape == rows.shape,
            names.ndim == 1 and labels.shape == names.shape,
            not rows.size or (rows.min() >= 0 and rows.max() < names.size),
        ]
    if not all(fits):
        raise ValueError("its arrays do not fit one another")

"""Per-query records of an evaluation, with a hash of the evaluation protocol.

The protocol is a dict of hashes and settings: images, preparation, rules. Scores of equal protocols
are comparable. A run keeps the records of its last evaluation in ``queries.npz``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.data.decoding import DECODING
from mmljax.data.fingerprint import fingerprint_contents, fingerprint_names
from mmljax.errors import UserError
from mmljax.files import write_atomically
from mmljax.text import one_line

if TYPE_CHECKING:  # at run time they import jax, which reading records does not need
    from mmljax.config import Config, RerankConfig
    from mmljax.retrieval.evaluate import Retrieval
    from mmljax.types import Dataset

QUERIES = "queries.npz"

_UNREADABLE = (
    *(OSError, KeyError, TypeError, ValueError, EOFError, RecursionError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


class Neighbors(NamedTuple):
    """The nearest gallery images of each query; NumPy."""

    rows: np.ndarray  # [q k] of the gallery below, nearest first
    similarity: np.ndarray  # [q k]
    names: np.ndarray  # [g] str, of the gallery's images, or of the queries' in self-retrieval
    labels: np.ndarray  # [g]


class Records(NamedTuple):
    """Scores of each query; NumPy, one entry per query."""

    protocol: Mapping[str, Any]
    step: int  # updates before the evaluation
    names: np.ndarray  # [q] str, of the images
    labels: np.ndarray  # [q] their items
    values: Mapping[str, np.ndarray]  # [q] per score, named as in the results; NaN: a lone query
    neighbors: Neighbors | None = None  # None if they were not kept


def make_records(
    protocol: Mapping[str, Any], step: int, dataset: Dataset, result: Retrieval
) -> Records:
    """The records of an evaluation after ``step`` updates."""
    query, gallery = dataset.query, dataset.gallery or dataset.query
    found = Neighbors(result.neighbors, result.similarity, gallery.names, gallery.labels)
    return Records(protocol, step, query.names, query.labels, result.per_query, found)


def evaluation_protocol(dataset: Dataset, config: Config) -> dict[str, Any]:
    """What must be equal for two results to be comparable.

    ``data`` is a hash of the names and the grouping of query and gallery images, and depends
    neither on their order nor on the numbering of the labels; ``distractors``, if there are any, is
    a hash of their names; ``rerank``, if there are any, the second stages with their settings.
    ``images`` is a hash of the stored contents of a few queries, so it tells variants of a data set
    apart. ``decoding`` is how files become pixels; of two runs only one may have turned photographs
    upright.

    Raises:
      UserError: if one of these images cannot be read.
    """
    query, gallery, distractors = dataset.query, dataset.gallery, dataset.distractors
    rerank = config.evaluation.rerank
    splits = [query] if gallery is None else [query, gallery]
    return {
        "data": fingerprint_names(splits),
        "queries": len(query.labels),
        "gallery": "the other queries" if gallery is None else len(gallery.labels),
        "items": len(np.unique(np.concatenate([split.labels for split in splits]))),
        "images": fingerprint_contents(query),
        "decoding": "none" if query.images.ndim > 1 else DECODING,
        "resize": config.data.resize_size,
        "crop": config.data.image_size,
        "resampling": config.data.resampling,
        "precision": f"{config.model.compute_dtype} network, float32 similarities",
        "lone_queries": "left out of every score, and counted",
        "ties": "irrelevant before relevant",
        **({} if distractors is None else {"distractors": fingerprint_names([distractors])}),
        **({"rerank": _rerank_text(rerank)} if rerank.methods else {}),
    }


def _rerank_text(rerank: RerankConfig) -> str:
    settings = dataclasses.asdict(rerank)
    methods = ", ".join(settings.pop("methods"))
    return f"{methods}: " + ", ".join(f"{key} {value:g}" for key, value in settings.items())


def write_records(folder: Path, records: Records) -> Path:
    """Write ``queries.npz`` into the folder atomically and return its path."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"value {key}": value for key, value in records.values.items()}
    arrays |= {"name": records.names, "label": records.labels, "step": records.step}
    if records.neighbors is not None:
        arrays |= {f"neighbor {k}": v for k, v in records.neighbors._asdict().items()}
    np.savez_compressed(buffer, protocol=json.dumps(records.protocol), **arrays)
    path = folder / QUERIES
    write_atomically(path, buffer.getvalue())
    return path


def read_records(path: Path) -> Records:
    """Read the records of a run.

    Args:
      path: the run's directory, a file in it, or ``queries.npz`` itself.

    Raises:
      UserError: if there are none, or they cannot be read.
    """
    file = path if path.suffix == ".npz" else (path if path.is_dir() else path.parent) / QUERIES
    if not path.exists() or not file.exists():
        raise UserError(
            f"{file if path.exists() else path} does not exist; name the directory of a run that "
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
        raise UserError(
            f"{file} is not a file of records ({one_line(error)}); evaluate the run again"
        ) from None


def _check_records(records: Records) -> None:
    """Refuse arrays whose types or shapes do not fit, as a file of another program may hold."""
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
        raise ValueError("types or shapes of its arrays do not fit")

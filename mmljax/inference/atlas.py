"""A run's test images, embeddings and neighbours as one Parquet file for Embedding Atlas.

The file has a row per query and gallery image:

=====================  ===============================================================
``id``                 the image's name
``split``              ``query`` or ``gallery``
``category``           :func:`mmljax.runs.html.category`
``item``               the item's number, as text
``hit@1``              whether a query's nearest gallery image is of its item
``average_precision``  MAP@R of a query
``x``, ``y``           a projection onto a plane
``thumbnail``          ``{bytes, path}``: a JPEG file and the image's name
``neighbors``          ``{ids, distances}``: rows of the table and 1 - cosine, nearest first
=====================  ===============================================================

``hit@1`` and ``average_precision`` are null for gallery images and for queries without a match.
Neighbours are exact, found in float32, and always gallery images, as in the evaluation; those of a
gallery image are other gallery images.
"""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mmljax.data.thumbnails import thumbnail
from mmljax.errors import UserError
from mmljax.files import written_atomically
from mmljax.inference.embed import embed_images, progress_bar
from mmljax.inference.embedder import TrainedEmbedder
from mmljax.mesh import to_host
from mmljax.retrieval.evaluate import Retrieval, retrieval_scores
from mmljax.retrieval.search import sharded_nearest_neighbors
from mmljax.runs.html import category
from mmljax.text import one_line
from mmljax.types import Dataset, Split

FILE = "atlas.parquet"

_SIDE, _QUALITY = 96, 80  # of a thumbnail: pixels, JPEG quality


def principal_plane(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Coordinates along the two directions of greatest variance.

    The sign of each direction makes its largest component positive, so that the result is
    reproducible.
    """
    centered = vectors - vectors.mean(axis=0, dtype=np.float64)
    axes = np.linalg.eigh(centered.T @ centered)[1][:, :-3:-1]
    largest = np.abs(axes).argmax(axis=0)
    return centered @ (axes * np.sign(axes[largest, np.arange(axes.shape[1])]))


def atlas_table(trained: TrainedEmbedder, dataset: Dataset, *, projection: str) -> Any:
    """The ``pyarrow.Table`` of a run's query and gallery images.

    Args:
      trained: the run's network.
      dataset: the one that it was evaluated on.
      projection: ``pca`` or ``umap``.

    Raises:
      UserError: if an image cannot be read, or no query has a match.
    """
    import pyarrow as pa

    splits = {"query": dataset.query}
    if dataset.gallery is not None:
        splits["gallery"] = dataset.gallery
    vectors = {
        name: embed_images(trained, split, skip_corrupt=False)[1] for name, split in splits.items()
    }
    gallery = dataset.gallery and vectors["gallery"]
    result = retrieval_scores(
        vectors["query"],
        dataset.query.labels,
        gallery,
        dataset.gallery and dataset.gallery.labels,
        recall_at=(1,),
        chunk=trained.config.evaluation.gallery_chunk,
        mesh=trained.mesh,
    )
    names = np.concatenate([split.names for split in splits.values()]).astype(str)
    labels = np.concatenate([split.labels for split in splits.values()])
    plane = _project(np.concatenate(list(vectors.values())), projection)
    extra = len(names) - len(dataset.query.names)
    hits, precision = (
        np.append(result.per_query[key], np.full(extra, np.nan)) for key in ("recall@1", "map@r")
    )
    return pa.table(
        {
            "id": pa.array(names, pa.string()),
            "split": np.repeat([*splits], [len(split.names) for split in splits.values()]),
            "category": [category(*row) for row in zip(names.tolist(), labels, strict=True)],
            "item": labels.astype(str),
            "hit@1": pa.array(hits > 0, pa.bool_(), mask=np.isnan(hits)),
            "average_precision": pa.array(precision, pa.float32(), mask=np.isnan(precision)),
            "x": plane[:, 0].astype(np.float32),
            "y": plane[:, 1].astype(np.float32),
            "thumbnail": _thumbnails(splits),
            "neighbors": _neighbor_column(*_neighbors(trained, result, gallery)),
        }
    )


def write_table(table: Any, path: Path, *, made_from: dict[str, Any]) -> None:
    """Write a table as Parquet atomically, with ``made_from`` in its metadata.

    Raises:
      UserError: if the file cannot be written.
    """
    from pyarrow import parquet

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as partial:
            parquet.write_table(
                table.replace_schema_metadata({"mmljax": json.dumps(made_from)}), partial
            )
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({one_line(error)}); name another --output"
        ) from error


def opening_command(path: Path) -> str:
    """The command that opens the file in Embedding Atlas."""
    return (
        f"embedding-atlas {shlex.quote(str(path))} --x x --y y --image thumbnail "
        "--neighbors neighbors"
    )


def _neighbors(
    trained: TrainedEmbedder, result: Retrieval, gallery: Float[np.ndarray, "g d"] | None
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Rows of the table and similarities of the neighbours of queries and gallery images."""
    rows, similarity = result.neighbors, result.similarity
    if gallery is None:
        return rows, similarity
    others = _neighbors_within(trained, gallery, k=rows.shape[1])
    k = others[0].shape[1]
    return (
        np.concatenate([rows[:, :k], others[0]]) + len(rows),
        np.concatenate([similarity[:, :k], others[1]]),
    )


def _neighbors_within(
    trained: TrainedEmbedder, vectors: Float[np.ndarray, "n d"], *, k: int
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Rows and similarities of the nearest others, at most ``k``."""
    found = sharded_nearest_neighbors(
        vectors,
        vectors,
        k=min(k, len(vectors) - 1),
        chunk=trained.config.evaluation.gallery_chunk,
        mesh=trained.mesh,
        self_index=np.arange(len(vectors), dtype=np.int32),
    )
    return to_host(found.indices), to_host(found.similarity)


def _project(vectors: np.ndarray, projection: str) -> np.ndarray:
    if projection == "pca":
        return principal_plane(vectors)
    from umap import UMAP

    return UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors)


def _thumbnails(splits: dict[str, Split]) -> Any:
    """Structs of a JPEG file and a name, the form of images in Hugging Face data sets."""
    import pyarrow as pa

    images = [(split, row) for split in splits.values() for row in range(len(split.names))]
    rows = []
    for split, row in progress_bar(images):
        file = io.BytesIO()
        thumbnail(split, row, side=_SIDE).save(file, "JPEG", quality=_QUALITY)
        rows.append({"bytes": file.getvalue(), "path": str(split.names[row])})
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _neighbor_column(rows: np.ndarray, similarity: np.ndarray) -> Any:
    import pyarrow as pa

    ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
    distances = np.maximum(0, 1 - similarity).astype(np.float32)
    columns = [
        pa.ListArray.from_arrays(ends, pa.array(values.ravel()))
        for values in (rows.astype(np.int64), distances)
    ]
    return pa.StructArray.from_arrays(columns, names=["ids", "distances"])

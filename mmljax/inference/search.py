"""Exact nearest neighbours of query images in a file of embeddings, as tables or a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mmljax.errors import UserError
from mmljax.inference import embed
from mmljax.inference.embedder import TrainedEmbedder
from mmljax.inference.embedding_file import Gallery, read_gallery, read_metadata
from mmljax.inference.parquet_parts import Parts
from mmljax.retrieval.streaming import streamed_nearest_neighbors
from mmljax.types import Split

COLUMNS = ("query", "rank", "similarity", "id", "label")

CHUNK = 32768  # gallery rows on the device at once
_COMPARED = ("config", "step", "weights", "image_size", "resize_size", "embedding_size")


def search(
    gallery: Gallery, names: np.ndarray, vectors: Float[np.ndarray, "q d"], *, k: int
) -> Any:
    """The nearest images of queries, best first, as a ``pyarrow.Table`` of ``COLUMNS``.

    Args:
      gallery: the embeddings to search.
      names: ``[q]`` of the queries.
      vectors: the queries' embeddings.
      k: answers per query; equal similarities are in the order of the gallery.
    """
    import pyarrow as pa

    if len(names):
        queries = jnp.asarray(vectors)
        found = streamed_nearest_neighbors(queries, gallery.vectors, k=k, chunk=CHUNK, unit=True)
        similarity, indices = (np.asarray(x).ravel() for x in found)
    else:
        similarity, indices = np.zeros(0, np.float32), np.zeros(0, np.int32)
    columns = (
        pa.array([str(name) for name in names for _ in range(k)], pa.string()),
        pa.array(np.tile(np.arange(1, k + 1, dtype=np.int32), len(names))),
        pa.array(similarity),
        gallery.ids.take(pa.array(indices)),
        gallery.labels.take(pa.array(indices)),
    )
    return pa.table(dict(zip(COLUMNS, columns, strict=True)))


def check_fit(made_from: dict[str, Any], trained: TrainedEmbedder, *, k: int, where: Path) -> None:
    """Refuse more answers than the file has rows, and embeddings of another size.

    Raises:
      UserError: with what was found.
    """
    if k > made_from["rows"]:
        raise UserError(f"--k={k} is more than the {made_from['rows']} rows of {where}; lower --k")
    ours, theirs = trained.identity["embedding_size"], made_from["embedding_size"]
    if ours != theirs:
        raise UserError(
            f"{where} holds embeddings of size {theirs}, but the run's are of size {ours}; make it "
            "by mmljax embed with this run"
        )


def differences(made_from: dict[str, Any], trained: TrainedEmbedder) -> list[str]:
    """What differs between the network that made a file and the run's, a text each."""
    return [
        f"{key} {made_from.get(key)}, of the run {trained.identity[key]}"
        for key in _COMPARED
        if made_from.get(key) != trained.identity[key]
    ]


def answers(
    trained: TrainedEmbedder,
    queries: Split,
    gallery: Path,
    *,
    k: int,
    rows_per_part: int,
    skip_corrupt: bool,
) -> Iterator[Any]:
    """The tables of :func:`search`, one for each part of the queries."""
    opened = read_gallery(gallery)
    for _, kept, vectors in embed.embedded_parts(
        trained, queries, rows_per_part=rows_per_part, skip_corrupt=skip_corrupt, progress=False
    ):
        yield search(opened, kept.names, vectors, k=k)


def write_answers(
    trained: TrainedEmbedder,
    queries: Split,
    gallery: Path,
    output: Path,
    *,
    k: int,
    rows_per_part: int,
    skip_corrupt: bool,
) -> bool:
    """Write the answers to all queries into a file, or resume writing it; False if it was complete.

    Args:
      trained: the network.
      queries: the query images.
      gallery: the file of embeddings.
      output: ``.parquet``; any other name becomes a file of one JSON object per line.
      k: answers per query.
      rows_per_part: queries between two saves.
      skip_corrupt: whether to leave out queries that cannot be decoded.

    Raises:
      UserError: as :func:`mmljax.inference.embed.write_embeddings`, and if the gallery cannot be
        read.
    """
    identity = {
        "format": "mmljax answers 1",
        **trained.identity,
        "gallery": read_metadata(gallery),
        "queries": len(queries.labels),
        "digest": embed.images_digest(queries),
        "k": k,
        "batch": trained.config.data.eval_batch_size,
        "rows_per_part": rows_per_part,
        "skip_corrupt": skip_corrupt,
    }
    with Parts(output, identity) as parts:
        if parts.finished:
            return False
        opened = read_gallery(gallery)
        for number, kept, vectors in embed.embedded_parts(
            trained, queries, rows_per_part=rows_per_part, skip_corrupt=skip_corrupt, skip=parts.has
        ):
            parts.write(number, search(opened, kept.names, vectors, k=k))
        total = embed.count_parts(trained, queries, rows_per_part=rows_per_part)
        (parts.join if output.suffix == ".parquet" else parts.join_lines)(total)
    return True

"""Nearest neighbours of query images in a file of embeddings, as tables or a file.

The search of float32 embeddings is exact. That of int8 or binary ones is as exact as these; with
``rescore``, the best of them are scored again with float32 embeddings, and each query says whether
its answers are proved to be those of the float32 search.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from mmljax.errors import UserError
from mmljax.inference import embed
from mmljax.inference.embedder import FIRST_OF, TrainedEmbedder
from mmljax.inference.embedding_file import (
    FLOAT32,
    Gallery,
    dtype_of,
    read_gallery,
    read_metadata,
)
from mmljax.inference.parquet_parts import Parts
from mmljax.retrieval.rescoring import rescored_nearest_neighbors
from mmljax.retrieval.streaming import streamed_nearest_neighbors
from mmljax.retrieval.top_k import Neighbors
from mmljax.types import Split

COLUMNS = ("query", "rank", "similarity", "id", "label")
PROVED = "proved"
"""One more column of rescored answers."""

CHUNK = 32768  # gallery rows on the device at once
_COMPARED = (
    *("config", "step", "weights", "embedding_size"),
    *("image_size", "resize_size", "resampling"),
)


def search(
    gallery: Gallery,
    names: np.ndarray,
    vectors: Float[np.ndarray, "q d"],
    *,
    k: int,
    rescore: int | None = None,
    threshold: float | None = None,
) -> Any:
    """The nearest images of queries, best first, as a ``pyarrow.Table`` of ``COLUMNS``.

    A query without an answer at or above the threshold has one row, with the similarity of its
    nearest image, in which rank, id and label are null.

    Args:
      gallery: the embeddings to search.
      names: ``[q]`` of the queries.
      vectors: the queries' embeddings.
      k: answers per query; equal similarities are in the order of the gallery.
      rescore: how many candidates are scored with float32 vectors; adds the column ``proved``.
      threshold: answers of a lower similarity are left out.
    """
    import pyarrow as pa

    similarity, indices = np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
    certain = np.zeros(0, bool)
    if len(names):
        found, certain = _found(gallery, vectors, k=k, rescore=rescore)
        similarity, indices = map(np.asarray, found)
    kept = similarity >= (-np.inf if threshold is None else threshold)
    none = ~kept
    none[:, 1:] = False  # of a query without an answer, the first row stays
    query, rank = np.nonzero(kept | none)
    empty = none[query, rank]
    rows = pa.array(indices[query, rank], mask=empty)
    columns = {
        "query": pa.array([str(name) for name in names[query]], pa.string()),
        "rank": pa.array(rank.astype(np.int32) + np.int32(1), mask=empty),
        "similarity": pa.array(similarity[query, rank]),
        "id": gallery.ids.take(rows),
        "label": gallery.labels.take(rows),
    }
    if rescore is not None:
        columns[PROVED] = pa.array(certain[query])
    return pa.table(columns)


def _found(
    gallery: Gallery, vectors: Float[np.ndarray, "q d"], *, k: int, rescore: int | None
) -> tuple[Neighbors, Bool[np.ndarray, " q"]]:
    """Neighbours in the vectors that the file is searched by, and which of them are proved."""
    if gallery.codes is not None and rescore is not None:
        assert gallery.vectors is not None
        candidates = min(rescore, len(gallery.vectors))
        return rescored_nearest_neighbors(
            vectors, gallery.codes, gallery.vectors, k=k, candidates=candidates, chunk=CHUNK
        )
    searched = gallery.vectors if gallery.codes is None else gallery.codes
    assert searched is not None
    found = streamed_nearest_neighbors(jnp.asarray(vectors), searched, k=k, chunk=CHUNK, unit=True)
    return found, np.full(len(vectors), gallery.codes is None)


def check_fit(
    made_from: dict[str, Any],
    trained: TrainedEmbedder,
    *,
    k: int,
    rescore: int | None,
    where: Path,
) -> None:
    """Refuse numbers of answers and candidates that do not fit, and embeddings of another size.

    Raises:
      UserError: with what was found.
    """
    if k > made_from["rows"]:
        raise UserError(f"--k={k} is more than the {made_from['rows']} rows of {where}; lower --k")
    if rescore is not None and rescore < k:
        raise UserError(f"--rescore={rescore} is below --k={k}; name at least {k} candidates")
    if rescore is not None and dtype_of(made_from) == FLOAT32:
        raise UserError(
            f"--rescore={rescore}: {where} holds float32 embeddings alone, whose search is exact; "
            "omit it, or make the file by mmljax embed --dtype int8"
        )
    ours, theirs = trained.identity["embedding_size"], made_from["embedding_size"]
    if ours == theirs:
        return
    whole = trained.identity.get(FIRST_OF, ours)
    if made_from.get(FIRST_OF, theirs) != whole:
        raise UserError(
            f"{where} holds embeddings of size {theirs}, but the run's are of size {ours}; make it "
            "by mmljax embed with this run"
        )
    cure = "omit --dims" if theirs == whole else f"search with --dims={theirs}"
    again = "without --dims" if ours == whole else f"with --dims={ours}"
    raise UserError(
        f"{where} holds {theirs} dimensions of each embedding, but the queries have {ours}; "
        f"{cure}, or make the file by mmljax embed {again}"
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
    rescore: int | None,
    rows_per_part: int,
    skip_corrupt: bool,
    threshold: float | None = None,
) -> Iterator[Any]:
    """The tables of :func:`search`, one for each part of the queries."""
    opened = read_gallery(gallery, exact=rescore is not None)
    for _, kept, vectors in embed.embedded_parts(
        trained, queries, rows_per_part=rows_per_part, skip_corrupt=skip_corrupt, progress=False
    ):
        yield search(opened, kept.names, vectors, k=k, rescore=rescore, threshold=threshold)


def count_proved(table: Any) -> tuple[int, int]:
    """The queries of rescored answers, and how many are proved to be those of float32."""
    first = np.array([rank in (1, None) for rank in table["rank"].to_pylist()], bool)
    return int(np.sum(first)), int(np.sum(table[PROVED].to_numpy()[first]))


def write_answers(
    trained: TrainedEmbedder,
    queries: Split,
    gallery: Path,
    output: Path,
    *,
    k: int,
    rescore: int | None,
    rows_per_part: int,
    skip_corrupt: bool,
    threshold: float | None = None,
) -> tuple[int, int] | None:
    """Write the answers to all queries into a file, or resume writing it.

    Args:
      trained: the network.
      queries: the query images.
      gallery: the file of embeddings.
      output: ``.parquet``; any other name becomes a file of one JSON object per line.
      k: answers per query.
      rescore: as :func:`search`.
      rows_per_part: queries between two saves.
      skip_corrupt: whether to leave out queries that cannot be decoded.
      threshold: as in :func:`search`.

    Returns:
      The sums of :func:`count_proved`, zeros if nothing is rescored; None if the file was complete.

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
        "rescore": rescore,
        "batch": trained.config.data.eval_batch_size,
        "rows_per_part": rows_per_part,
        "skip_corrupt": skip_corrupt,
        **({} if threshold is None else {"threshold": threshold}),
    }
    with Parts(output, identity) as parts:
        if parts.finished:
            return None
        opened = read_gallery(gallery, exact=rescore is not None)
        for number, kept, vectors in embed.embedded_parts(
            trained, queries, rows_per_part=rows_per_part, skip_corrupt=skip_corrupt, skip=parts.has
        ):
            table = search(opened, kept.names, vectors, k=k, rescore=rescore, threshold=threshold)
            parts.write(number, table)
        total = embed.count_parts(trained, queries, rows_per_part=rows_per_part)
        counts = np.zeros(2, int)
        if rescore is not None:
            for number in range(total):
                counts += count_proved(parts.read(number))
        (parts.join if output.suffix == ".parquet" else parts.join_lines)(total)
    return int(counts[0]), int(counts[1])

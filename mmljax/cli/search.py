"""``python -m mmljax.cli.search``: the nearest images of query images, in a file of embeddings.

The search is exact (:mod:`mmljax.retrieval.streaming`). Memory holds a piece of the queries and a chunk of
the gallery, however large the gallery is. Answers that go to a file are made in pieces: a command
that was broken off goes on when it is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmljax.errors import UserError
from mmljax.inference import embed as offline
from mmljax.inference.embedding_file import Gallery, read_gallery, read_made_from
from mmljax.inference.parquet_parts import Parts

if TYPE_CHECKING:
    from mmljax.inference.embedder import TrainedEmbedder
    from mmljax.types import Split

COLUMNS = ("query", "rank", "similarity", "id", "label")

CHUNK = 32768  # gallery rows on the device at once
_COMPARED = ("config", "step", "weights", "image_size", "resize_size", "embedding_size")


def search(gallery: Gallery, names: np.ndarray, vectors: np.ndarray, *, k: int) -> Any:
    """The nearest images of queries, best first, as a ``pyarrow.Table`` of ``COLUMNS``.

    Args:
      gallery: what to search.
      names: ``[q]`` of the queries.
      vectors: ``[q d]`` their embeddings.
      k: answers per query; equal similarities in the order of the gallery.
    """
    import jax.numpy as jnp
    import pyarrow as pa

    from mmljax.retrieval.streaming import streamed_nearest_neighbors

    if len(names):
        queries = jnp.asarray(vectors)
        found = streamed_nearest_neighbors(queries, gallery.vectors, k=k, chunk=CHUNK)
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
    """Refuse more answers than there are, and embeddings of another size.

    Raises:
      UserError: with what was found.
    """
    if k > made_from["rows"]:
        raise UserError(f"--k={k} answers asked of the {made_from['rows']} in {where}; lower --k")
    ours, theirs = trained.identity["embedding_size"], made_from["embedding_size"]
    if ours != theirs:
        raise UserError(
            f"{where} holds embeddings of size {theirs}, the run's are of size {ours}; make it by "
            "python -m mmljax.cli.embed with this --run"
        )


def differences(made_from: dict[str, Any], trained: TrainedEmbedder) -> list[str]:
    """In what the networks of a file and of the run differ, a line each."""
    return [
        f"{key} {made_from.get(key)}, of the run {trained.identity[key]}"
        for key in _COMPARED
        if made_from.get(key) != trained.identity[key]
    ]


def text_table(rows: list[dict[str, Any]]) -> str:
    """Answers as aligned plain text."""
    cells = [
        [
            row["query"],
            str(row["rank"]),
            f"{row['similarity']:.4f}",
            row["id"],
            "-" if row["label"] is None else str(row["label"]),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    right = (False, True, True, False, True)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [list(COLUMNS), *cells]
    )


def write_answers(
    trained: TrainedEmbedder,
    split: Split,
    gallery: Path,
    output: Path,
    *,
    k: int,
    rows_per_part: int,
    skip_corrupt: bool,
) -> bool:
    """Search for all images of a split into a file, or go on doing so; False if it was whole.

    Args:
      trained: the network.
      split: the queries.
      gallery: the file of embeddings.
      output: ``.parquet``, or else a JSON object per line.
      k: answers per query.
      rows_per_part: queries after which what is done is kept.
      skip_corrupt: whether to leave out queries that cannot be decoded.

    Raises:
      UserError: as :func:`mmljax.cli.embed.write_embeddings`, and if the gallery cannot be read.
    """
    batch = trained.config.data.eval_batch_size
    identity = {
        "format": "mmljax answers 1",
        **trained.identity,
        "gallery": read_made_from(gallery),
        "queries": len(split.labels),
        "digest": offline.digest_of_images(split),
        "k": k,
        "batch": batch,
        "rows_per_part": rows_per_part,
        "skip_corrupt": skip_corrupt,
    }
    parts = Parts(output, identity)
    if parts.finished:
        return False
    slices = offline.pieces(split, rows=rows_per_part, batch=batch)
    opened = read_gallery(gallery)
    with offline.bar(split.labels, unit="image") as bar:
        for number, piece in enumerate(slices):
            rows = offline.rows_of(split, piece)
            if parts.has(number):
                bar.update(len(rows.labels))
                continue
            kept, vectors = offline.embed_images(
                trained, rows, skip_corrupt=skip_corrupt, advance=bar.update
            )
            parts.write(number, search(opened, kept.names, vectors, k=k))
    if output.suffix == ".parquet":
        parts.join(len(slices))
    else:
        parts.join_lines(len(slices))
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer what the options ask."""
    parser = argparse.ArgumentParser(
        prog="python -m mmljax.cli.search",
        description="Find the nearest images of query images in a file that mmljax.cli.embed wrote.",
    )
    offline.add_run_options(parser)
    parser.add_argument("--embeddings", type=Path, required=True, help="Parquet file to search")
    offline.add_image_options(parser)
    offline.add_piece_option(parser)
    parser.add_argument("--k", type=int, default=10, help="answers per query; default 10")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("-"),
        help="file.parquet or file.jsonl to write; default: a table on standard output",
    )
    parser.add_argument(
        "--force", action="store_true", help="search embeddings that another network made"
    )
    options = parser.parse_args(arguments)
    to_file = options.output != Path("-")
    if options.k < 1 or options.rows_per_part < 1:
        parser.error("--k and --rows-per-part must be at least 1")
    if to_file and options.output.suffix not in (".parquet", ".jsonl"):
        parser.error(f"--output={options.output} must end in .parquet or .jsonl")
    offline.require("pyarrow")
    made_from = read_made_from(options.embeddings)
    offline.quiet_libraries()
    from mmljax.inference.embedder import load_embedder

    trained = offline.in_even_batches(load_embedder(options.run, step=options.step))
    check_fit(made_from, trained, k=options.k, where=options.embeddings)
    if differing := differences(made_from, trained):
        text = f"{options.embeddings} was made by another network ({'; '.join(differing)})"
        if not options.force:
            raise UserError(f"{text}; embed the images again with this --run, or ask by --force")
        print(f"warning: {text}", file=sys.stderr)
    split = offline.chosen_images(trained, images=options.images, split=options.split)
    if to_file:
        new = write_answers(
            trained,
            split,
            options.embeddings,
            options.output,
            k=options.k,
            rows_per_part=options.rows_per_part,
            skip_corrupt=options.skip_corrupt,
        )
        state = "" if new else ", whole already"
        print(f"answers in {options.output}{state}", file=sys.stderr)
        return
    gallery = read_gallery(options.embeddings)
    batch = trained.config.data.eval_batch_size
    for piece in offline.pieces(split, rows=options.rows_per_part, batch=batch):
        rows = offline.rows_of(split, piece)
        kept, vectors = offline.embed_images(trained, rows, skip_corrupt=options.skip_corrupt)
        found = search(gallery, kept.names, vectors, k=options.k)
        print(text_table(found.to_pylist()), flush=True)


if __name__ == "__main__":
    offline.run(main)

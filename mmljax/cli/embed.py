"""``python -m mmljax.cli.embed``: the embeddings of images, as a Parquet file.

The file is made in pieces (:mod:`mmljax.inference.parquet_parts`): a command that was broken off goes on when it is
given again, and makes the same file. Memory holds the list of images and one piece.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmljax.errors import UserError
from mmljax.inference import embed as offline
from mmljax.inference.embedding_file import FORMAT, embeddings_table
from mmljax.inference.parquet_parts import Parts

if TYPE_CHECKING:
    from mmljax.inference.embedder import TrainedEmbedder
    from mmljax.types import Split


def write_embeddings(
    trained: TrainedEmbedder,
    split: Split,
    output: Path,
    *,
    source: str,
    rows_per_part: int,
    skip_corrupt: bool,
) -> tuple[int, int] | None:
    """Embed images into a file of :mod:`mmljax.inference.embedding_file`'s columns, or go on doing so.

    Args:
      trained: the network.
      split: the images.
      output: the file.
      source: what the images are, for the metadata.
      rows_per_part: images after which what is done is kept.
      skip_corrupt: whether to leave out images that cannot be decoded.

    Returns:
      How many images are in the file and how many were left out; None if it was whole before.

    Raises:
      UserError: if the output is of something else or cannot be written, an image cannot be
        decoded, or none can.
    """
    batch = trained.config.data.eval_batch_size
    identity = {
        "format": FORMAT,
        **trained.identity,
        "source": source,
        "images": len(split.labels),
        "digest": offline.digest_of_images(split),
        "batch": batch,
        "rows_per_part": rows_per_part,
        "skip_corrupt": skip_corrupt,
    }
    parts = Parts(output, identity)
    if parts.finished:
        return None
    slices = offline.pieces(split, rows=rows_per_part, batch=batch)
    with offline.bar(split.labels, unit="image") as bar:
        for number, piece in enumerate(slices):
            rows = offline.rows_of(split, piece)
            if parts.has(number):
                bar.update(len(rows.labels))
                continue
            kept, vectors = offline.embed_images(
                trained, rows, skip_corrupt=skip_corrupt, advance=bar.update
            )
            parts.write(number, embeddings_table(kept.names, kept.labels, vectors))
    count = sum(map(parts.rows, range(len(slices))))
    if not count:
        raise UserError(f"none of the {len(split.labels)} images can be decoded; name other ones")
    left_out = len(split.labels) - count
    parts.join(len(slices), facts={"rows": count, "left_out": left_out})
    return count, left_out


def main(arguments: Sequence[str] | None = None) -> None:
    """Embed what the options name."""
    parser = argparse.ArgumentParser(
        prog="python -m mmljax.cli.embed",
        description="Embed images with the network of a run; the columns are id, label, embedding. "
        "The same command goes on where it was broken off.",
    )
    offline.add_run_options(parser)
    offline.add_image_options(parser)
    offline.add_piece_option(parser)
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write")
    options = parser.parse_args(arguments)
    if options.rows_per_part < 1:
        parser.error("--rows-per-part must be at least 1")
    offline.require("pyarrow")
    offline.quiet_libraries()
    from mmljax.inference.embedder import load_embedder

    trained = offline.in_even_batches(load_embedder(options.run, step=options.step))
    split = offline.chosen_images(trained, images=options.images, split=options.split)
    done = write_embeddings(
        trained,
        split,
        options.output,
        source=f"split {options.split}" if options.split else "images",
        rows_per_part=options.rows_per_part,
        skip_corrupt=options.skip_corrupt,
    )
    if done is None:
        print(f"{options.output} is whole already", file=sys.stderr)
    else:
        rows, left_out = done
        print(f"{rows} embeddings in {options.output}; {left_out} images left out", file=sys.stderr)


if __name__ == "__main__":
    offline.run(main)

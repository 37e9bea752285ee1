"""Embed images with the network of a run, as a Parquet file.

    mmljax embed RUN --images photos/ --output photos.parquet

The columns are id, label and embedding; --dtype int8 and binary add small copies of the vectors,
which mmljax search then reads in place of them. --dims N keeps the first N dimensions, scaled to
unit length, for which --config.model.matryoshka trains a run. The same command resumes where it was
interrupted, and makes the same file. Memory holds the list of images and the embeddings of one
part.
"""

from __future__ import annotations

import argparse
import sys

from mmljax.cli import options as shared
from mmljax.errors import require
from mmljax.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax embed``."""
    shared.add_run(parser)
    shared.add_step(parser)
    shared.add_dims(parser)
    shared.add_images(parser)
    parser.add_argument(
        "--output", type=shared.local_path, required=True, help="Parquet file to write"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "int8", "binary"),
        default="float32",
        help="of the vectors that a search reads; int8 and binary are kept beside float32",
    )


def run(options: argparse.Namespace) -> int:
    """Embed what the options name."""
    require("pyarrow", extra="offline", purpose="mmljax embed")
    from mmljax.inference import embed

    trained = embed.load(options.run, step=options.step, dims=options.dims)
    done = embed.write_embeddings(
        trained,
        embed.chosen_images(trained, images=options.images, split=options.split),
        options.output,
        source=f"split {options.split}" if options.split else "images",
        rows_per_part=options.rows_per_part,
        skip_corrupt=options.skip_corrupt,
        dtype=options.dtype,
    )
    if done is None:
        text = f"{options.output} is complete already"
    else:
        text = f"{done[0]} embeddings in {options.output}; {done[1]} images left out"
    print(printable(text), file=sys.stderr)
    return 0

"""Write the network of a run as a file that needs only jax and numpy, and check it.

    mmljax export RUN --output exported/

The file is loaded in a process that can import nothing else, and must give the run's embeddings and
neighbours there; receipt.json has the result. The exit code is 1 if it does not. The command runs
on the CPU unless JAX_PLATFORMS is set.
"""

from __future__ import annotations

import argparse
import os

from mmljax.cli import options as shared
from mmljax.errors import UserError, require
from mmljax.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax export``."""
    shared.add_run(parser)
    shared.add_step(parser)
    parser.add_argument("--output", type=shared.local_path, required=True, help="folder to write")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="images for the check, files or folders; default: the run's own queries",
    )
    parser.add_argument(
        "--count", type=shared.at_least(2), default=64, help="how many of them; default 64"
    )


def run(options: argparse.Namespace) -> int:
    """Export and check; 1 if the check fails."""
    require("flatbuffers", extra="offline", purpose="mmljax export")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from mmljax.inference import embed, export

    trained = embed.load(options.run, step=options.step)
    split = embed.chosen_images(trained, images=options.images, split=None)
    split = embed.rows_of(split, slice(options.count))
    if len(split.labels) < 2:
        raise UserError("--images: one image has no neighbours to compare; name at least two")
    receipt = export.export_run(trained, split, options.output)
    text = (
        f"{options.output / export.ARTEFACT}: on {receipt['images']} images the embeddings differ "
        f"by at most {receipt['largest_difference']:.1e}, and "
        f"{receipt['queries_with_equal_neighbors']} have equal neighbours: parity "
        f"{'holds' if receipt['holds'] else 'does NOT hold'}"
    )
    print(printable(text))
    return 0 if receipt["holds"] else 1

"""Write the features of a data set once, to train heads on them in seconds.

    mmljax features --config finetune --config.data.directory=photos --output photos.features
    mmljax train --config heads --config.data.directory=photos.features

The features are those of the config's backbone with its weights, pooled; those of each training
image are of its evaluation crop and of some random crops. The same command resumes where it was
interrupted, and makes the same files. Memory holds the features of one part.
"""

from __future__ import annotations

import argparse
import sys

from mmljax.cli import options as shared
from mmljax.errors import UserError
from mmljax.text import printable, size_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax features``."""
    shared.add_config(parser, workdir=False)
    parser.add_argument("--output", type=shared.local_path, required=True, help="folder to write")
    parser.add_argument(
        "--views",
        type=shared.at_least(0),
        default=4,
        metavar="N",
        help="random crops of each training image; default 4; 0: evaluation's crop alone",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="on the disk"
    )
    shared.add_parts(parser)


def run(options: argparse.Namespace) -> int:
    """Write the features of what the options name."""
    config = shared.load_config(options)
    if config is None:
        raise UserError("--config is missing; for one's own photographs: --config finetune")
    from mmljax.inference.features import write_features

    done = write_features(
        config,
        options.output,
        views=options.views,
        dtype=options.dtype,
        rows_per_part=options.rows_per_part,
        skip_corrupt=options.skip_corrupt,
    )
    if done is None:
        text = f"{options.output} is complete already"
    else:
        size = sum(path.stat().st_size for path in options.output.iterdir())
        text = f"features of {done['features']} channels in {options.output} ({size_text(size)})"
    print(printable(text), file=sys.stderr)
    return 0

"""Write In-Shop Clothes Retrieval, from a manual download, into a few large files.

    mmljax prepare data/inshop data/tfds

A run then reads the large files: --config.data.source=tfds_in_shop
--config.data.directory=data/tfds.
"""

from __future__ import annotations

import argparse

from mmljax.errors import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax prepare``."""
    parser.add_argument(
        "manual_dir", metavar="MANUAL_DIR", help="folder of the download, with Img/ and Eval/"
    )
    parser.add_argument(
        "data_dir", metavar="DATA_DIR", help="folder to write: --config.data.directory of a run"
    )
    parser.add_argument(
        "--variant",
        choices=("low", "high", "cropped"),
        default="low",
        help="images of Img/img, of Img/img_highres, or of Img/img cropped to their boxes",
    )
    parser.add_argument(
        "--no-check-counts",
        action="store_true",
        help="accept other numbers of images than the benchmark's",
    )
    parser.add_argument(
        "--file-format",
        choices=("tfrecord", "array_record"),
        default="tfrecord",
        help="held in memory by a run, or read at random from the files",
    )


def run(options: argparse.Namespace) -> int:
    """Prepare the data set."""
    require("tensorflow_datasets", extra="data", purpose="mmljax prepare")
    from mmljax.data.readers import in_shop_builder as in_shop

    in_shop.prepare(
        options.manual_dir,
        options.data_dir,
        variant=options.variant,
        check_counts=not options.no_check_counts,
        file_format=options.file_format,
    )
    return 0

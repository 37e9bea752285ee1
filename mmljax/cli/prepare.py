"""Write In-Shop Clothes Retrieval, from a manual download, into a few large files.

    python -m mmljax.cli.prepare /data/inshop /data/tfds
    python -m mmljax.main --config configs/inshop.py --config.data.source=tfds_in_shop \\
      --config.data.directory=/data/tfds
"""

from __future__ import annotations

import argparse

from mmljax.errors import UserError
from mmljax.inference import embed as offline


def main() -> None:
    """Parse the arguments and prepare."""
    parser = argparse.ArgumentParser(
        prog="python -m mmljax.cli.prepare",
        description="Write In-Shop Clothes Retrieval, downloaded by hand, into a few large files.",
    )
    parser.add_argument("manual_dir", help="folder that holds Img/ and Eval/")
    parser.add_argument("data_dir", help="where to write: --config.data.directory of a run")
    parser.add_argument(
        "--variant",
        choices=("low", "high", "cropped"),
        default="low",
        help="images of Img/img, of Img/img_highres, or of Img/img cropped to their boxes",
    )
    parser.add_argument(
        "--no-check-counts",
        action="store_true",
        help="for other data in the layout of the benchmark",
    )
    parser.add_argument(
        "--file-format",
        choices=("tfrecord", "array_record"),
        default="tfrecord",
        help="held in memory by a run, or read at random from the files",
    )
    options = parser.parse_args()
    offline.quiet_libraries()
    try:
        from mmljax.data.readers import in_shop_builder as in_shop
    except ImportError as error:
        raise UserError(f"this needs TFDS ({error}); pip install 'mmljax[data]'") from error
    in_shop.prepare(
        options.manual_dir,
        options.data_dir,
        variant=options.variant,
        check_counts=not options.no_check_counts,
        file_format=options.file_format,
    )


if __name__ == "__main__":
    offline.run(main)

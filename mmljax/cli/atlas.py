"""Write the test images and embeddings of a run as one Parquet file for Embedding Atlas.

    mmljax atlas RUN

The test images are embedded with the latest checkpoint. The command prints how to open the file.
"""

from __future__ import annotations

import argparse
import importlib.util

from mmljax.cli import options as shared
from mmljax.errors import UserError, require
from mmljax.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax atlas``."""
    shared.add_run(parser)
    shared.add_step(parser)
    parser.add_argument(
        "--output", type=shared.local_path, help="Parquet file; default: atlas.parquet in RUN"
    )
    parser.add_argument(
        "--projection", choices=("pca", "umap"), default="pca", help="default pca; umap: umap-learn"
    )
    shared.add_directory(parser)


def run(options: argparse.Namespace) -> int:
    """Write the file of the run that the options name, and print how to open it."""
    for module in ("PIL", "pyarrow"):
        require(module, extra="look", purpose="mmljax atlas")
    if options.projection == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError("--projection=umap needs umap-learn: pip install umap-learn")
    from mmljax.inference import atlas, embed
    from mmljax.runs.reader import load_run_data

    dataset = load_run_data(options.run, directory=options.directory)[1]
    trained = embed.load(options.run, step=options.step)
    path = options.output or options.run / atlas.FILE
    table = atlas.atlas_table(trained, dataset, projection=options.projection)
    atlas.write_table(table, path, made_from=trained.identity | {"projection": options.projection})
    print(printable(f"{len(table)} images in {path}; open it by"))
    print(printable(atlas.opening_command(path)))
    return 0

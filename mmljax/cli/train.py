"""Train and evaluate a config, or resume its run.

    mmljax train --config configs/inshop.py --config.data.directory=data/inshop

The same command resumes the run from its last checkpoint.
"""

from __future__ import annotations

import argparse
import logging

from mmljax.cli import options as shared
from mmljax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax train``."""
    shared.add_config(parser)


def run(options: argparse.Namespace) -> int:
    """Train as the options say."""
    config = shared.load_config(options)
    if config is None:
        raise UserError("--config is missing; for a first run: --config quickstart")
    workdir = shared.workdir(options, config)
    from mmljax.mesh import initialize_distributed, is_main_process
    from mmljax.training.loop import train

    initialize_distributed()
    if not is_main_process():
        logging.getLogger("mmljax").setLevel(logging.WARNING)
    train(config, workdir)
    return 0

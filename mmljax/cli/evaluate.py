"""Score a pretrained backbone without training: what fine-tuning must beat.

    mmljax evaluate --config finetune --config.data.directory=photos

The embeddings are the backbone's pooled features, without a head, of unit length. mmljax train
scores them as well, before its first step, and writes them beside the trained network's scores.
"""

from __future__ import annotations

import argparse
import json

from mmljax.cli import options as shared
from mmljax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax evaluate``."""
    shared.add_config(parser, workdir=False)
    parser.add_argument("--json", action="store_true", help="print scores, config and protocol")


def run(options: argparse.Namespace) -> int:
    """Print the scores of the config's pretrained backbone."""
    config = shared.load_config(options)
    if config is None:
        raise UserError("--config is missing; for one's own photographs: --config finetune")
    from mmljax.inference.baseline import score_pretrained
    from mmljax.runs.writer import plain, recall_table

    found = score_pretrained(config)
    if options.json:
        print(json.dumps(plain(found), indent=2, allow_nan=False))
    else:
        print(recall_table({"pretrained": found["scores"]}))
    return 0

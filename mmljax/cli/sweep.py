"""Train heads on features with several seeds and settings side by side.

    mmljax sweep --config heads --config.data.directory=photos.features --seeds 5
    mmljax sweep --config heads --vary model.head=linear,mlp --vary model.dropout=0,0.2

Every combination of the values is trained with every seed, and each run has a directory of its own
below the sweep's. The command ends with a table of means and standard deviations over the seeds.
The same command trains only what is not complete.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmljax.cli import options as shared
from mmljax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax sweep``."""
    shared.add_config(parser)
    parser.add_argument(
        "--seeds",
        type=shared.at_least(1),
        default=1,
        metavar="N",
        help="how many seeds, from --config.seed on; default 1",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="values of a key of the config, such as model.dropout=0,0.2; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Train what the options name, and print the table."""
    config = shared.load_config(options)
    if config is None:
        raise UserError("--config is missing; for a linear head on features: --config heads")
    runs = _runs(options, shared.local_workdir(options, config))
    from mmljax.runs.writer import score_keys
    from mmljax.training.sweep import sweep, sweep_table

    rows = sweep(runs, shared.local_workdir(options, config))
    scored = [row for row in rows if "scores" in row]
    if not scored:
        raise UserError(f"no run of the sweep ended well: {rows[0]['error']}")
    print(sweep_table(rows, score_keys(scored[0]["scores"])), file=sys.stdout)
    return 0


def _runs(options: argparse.Namespace, workdir: Path) -> list[Any]:
    """Every combination of varied values with every seed."""
    from mmljax.config import load_config
    from mmljax.training.sweep import Run

    runs = []
    for values in itertools.product(*map(_values, options.vary)):
        setting = ", ".join(values)
        first = load_config(options.config, [*options.overrides, *values]).seed
        for seed in range(first, first + options.seeds):
            overrides = [*options.overrides, *values, f"seed={seed}"]
            name = "-".join([*(_plain(value) for value in values), f"seed={seed}"])
            run_config = load_config(options.config, overrides)
            runs.append(Run(setting, run_config, workdir / name))
    return runs


def _values(text: str) -> Sequence[str]:
    """``a.b=1,2`` as ``a.b=1`` and ``a.b=2``."""
    key, equals, values = text.partition("=")
    if not equals or not key or key == "seed":
        cure = "--seeds varies the seed" if key == "seed" else "write --vary KEY=V1,V2"
        raise UserError(f"--vary={text} names no values of a key; {cure}")
    return [f"{key}={value}" for value in values.split(",")]


def _plain(value: str) -> str:
    return "".join(c if c.isalnum() or c in "=._+-" else "_" for c in value)

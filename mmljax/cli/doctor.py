"""Check what would stop a run, before it starts.

    mmljax doctor --config configs/inshop.py --config.data.directory=data/inshop

One line per check: ok, warn, FAIL with the cure, or skip with the reason. The exit code is 2 if a
check fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmljax.cli import options as shared
from mmljax.text import printable

if TYPE_CHECKING:
    from mmljax.config import Config
    from mmljax.training.checks import Finding

RUN_CHECKS = ("data", "config", "disk", "input against step")


def examine(config: Config | None, workdir: Path, *, seconds: float) -> Iterator[Finding]:
    """The findings of all checks, one by one; those of a run are skipped without a config."""
    from mmljax.training import checks

    yield checks.check_versions()
    yield checks.check_devices()
    yield checks.check_tensorflow()
    yield checks.check_workdir(workdir)
    dataset, trainer = None, None
    if config is not None:
        found, dataset = checks.check_data(config)
        yield found
    if config is not None and dataset is not None:
        found, trainer = checks.check_config(config, dataset)
        yield found
    if config is not None and dataset is not None and trainer is not None:
        yield checks.check_disk(workdir, trainer.state, kept=config.checkpoint)
        yield checks.check_speed(config, dataset, trainer, workdir, seconds=seconds)
        return
    reason = "no --config is given" if config is None else "an earlier check failed"
    for name in RUN_CHECKS[(config is not None) + (dataset is not None) :]:
        yield checks.Finding("skip", name, reason)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax doctor``."""
    shared.add_config(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="how long the input and the step are timed, each; default 5",
    )


def run(options: argparse.Namespace) -> int:
    """Print the findings as they are made."""
    config = shared.load_config(options)
    failed = False
    for verdict, name, text in examine(
        config, shared.local_workdir(options, config), seconds=options.seconds
    ):
        print(f"{verdict:<5} {name:<19} {printable(text)}", flush=True)
        failed |= verdict == "FAIL"
    return 2 if failed else 0

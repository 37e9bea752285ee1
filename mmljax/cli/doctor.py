"""``python -m mmljax.cli.doctor [--config CONFIG] [--workdir DIR]``: what would keep a run from going.

One line per check: ``ok``, ``warn``, ``FAIL`` with the cure, or ``skip`` with the reason. Exit code
2 if a check failed, else 0. The imports of what checks are deferred, so that ``--help`` is
immediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from mmljax.cli import command
from mmljax.config import Config

if TYPE_CHECKING:
    from mmljax.training.checks import Finding

_SECONDS = flags.DEFINE_float(
    "seconds", 5.0, "For how long the input and the step are timed, each.", lower_bound=0.0
)
flags.adopt_module_key_flags(command)

RUN_CHECKS = ("data", "config", "disk", "input against step")


def examine(config: Config | None, workdir: Path, *, seconds: float) -> Iterator[Finding]:
    """Findings of all checks, one by one; those of a run are skipped where no config is given."""
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
    reason = "no --config is given" if config is None else "what it needs has failed"
    for name in RUN_CHECKS[(config is not None) + (dataset is not None) :]:
        yield checks.Finding("skip", name, reason)


def main(argv: list[str]) -> int:
    """Print the findings as they come."""
    config = command.given_config(argv)
    workdir = command.given_workdir(config)
    command.start_log()
    failed = False
    for verdict, name, text in examine(config, workdir, seconds=_SECONDS.value):
        print(f"{verdict:<5} {name:<19} {text}", flush=True)
        failed |= verdict == "FAIL"
    return 2 if failed else 0


if __name__ == "__main__":
    command.run(main)

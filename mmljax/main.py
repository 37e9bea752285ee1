"""``python -m mmljax.main --config configs/inshop.py``: flags only.

The imports of what trains are deferred, so that ``--help`` is immediate.
"""

from __future__ import annotations

from absl import flags

from mmljax.cli import command
from mmljax.errors import UserError

flags.adopt_module_key_flags(command)


def main(argv: list[str]) -> None:
    """Train as the flags say."""
    config = command.given_config(argv)
    if config is None:
        raise UserError("--config is missing; for a first run: --config configs/quickstart.py")
    command.start_log()
    from mmljax.mesh import initialize_distributed, is_main_process
    from mmljax.training.loop import train

    initialize_distributed()
    if not is_main_process():
        command.only_warnings()
    train(config, command.given_workdir(config))


if __name__ == "__main__":
    command.run(main)

"""``python -m mmljax.main --config configs/inshop.py``: flags only.

The imports of what trains are deferred, so that ``--help`` is immediate.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mmljax import config as config_lib
from mmljax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; override with --config.key=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run is kept; the same command goes on from there. By default "
    "runs/NAME-FINGERPRINT, told by the config's name and values.",
)


def main(argv: list[str]) -> None:
    """Train as the flags say."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if _CONFIG.value is None:
        raise UserError("--config is missing; for a first run: --config configs/quickstart.py")
    try:
        config = config_lib.from_mapping(_CONFIG.value)
    except OSError as error:  # a file that could not be loaded says so when it is first used
        raise UserError(f"--config: {_one_line(error)}") from error
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    default = Path("runs") / f"{name}-{config_lib.fingerprint(config)}"
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else default

    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax tells every file that it writes
    # TensorFlow only decodes images here; oneDNN has no part in that, but announces itself.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    own = logging.getLogger("mmljax")
    own.setLevel(logging.INFO)
    own.addHandler(handler)
    own.propagate = False
    from mmljax.mesh import initialize_distributed
    from mmljax.train import train

    initialize_distributed()
    train(config, workdir)


def run() -> None:
    """Parse and run; a user's mistake is one line on stderr and exit code 2."""
    # A config file imports its neighbours as ``configs.common``, from wherever it is run.
    sys.path.insert(0, os.getcwd())
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        sys.exit(_fail(str(error)))


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(_fail(_one_line(error)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fail(message: str) -> int:
    print(f"mmljax: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()

"""What the programs that take a config share: its flags, and a mistake as one line on stderr."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mmljax import config as config_lib
from mmljax.config import Config
from mmljax.errors import Preempted, UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; override with --config.key=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run is kept; the same command goes on from there. By default "
    "runs/NAME-FINGERPRINT, told by the config's name and values.",
)


def given_config(argv: list[str]) -> Config | None:
    """The config that the flags name, None where they name none.

    Args:
      argv: what is left of the command line beside the flags: the program's name alone.

    Raises:
      UserError: on a further argument, or a config that cannot be used.
    """
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if _CONFIG.value is None:
        if flags.FLAGS["config"].present:
            raise UserError("--config: get_config() returned nothing; let it return the config")
        return None
    try:
        return config_lib.from_mapping(_CONFIG.value)
    except OSError as error:  # a file that could not be loaded says so when it is first used
        raise UserError(f"--config: {_one_line(error)}") from error


def given_workdir(config: Config | None) -> Path:
    """The directory that the flags name, or where a run of the config is kept by default."""
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    if config is None:
        return Path("runs")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return Path("runs") / f"{name}-{config_lib.fingerprint(config)}"


def start_log() -> None:
    """Our own messages to stderr, and silence from what tells too much."""
    # Orbax tells every file that it writes, and of what fails a traceback before it is raised.
    absl_logging.set_verbosity(absl_logging.FATAL)
    threading.excepthook = _failed_thread
    sys.unraisablehook = _failed_callback
    # TensorFlow only decodes images here; oneDNN has no part in that, but announces itself.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    own = logging.getLogger("mmljax")
    own.setLevel(logging.INFO)
    own.addHandler(handler)
    own.propagate = False


def only_warnings() -> None:
    """Of several processes the first alone tells how the run goes."""
    logging.getLogger("mmljax").setLevel(logging.WARNING)


def _failed_thread(failed: threading.ExceptHookArgs) -> None:
    """What a thread of orbax fails with is raised again by whoever waits for it."""
    if not type(failed.thread).__module__.startswith("orbax."):
        threading.__excepthook__(failed)


def _failed_callback(failed: sys.UnraisableHookArgs) -> None:
    """After one read or write of a checkpoint failed, the others find nobody to report to."""
    if "Event loop is closed" not in str(failed.exc_value):
        sys.__unraisablehook__(failed)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parse and run; a user's mistake is one line on stderr and exit code 2."""
    # A config file imports its neighbours as ``configs.common``, from wherever it is run.
    sys.path.insert(0, os.getcwd())
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax tells every file that it writes
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        sys.exit(_fail(str(error)))
    except Preempted as notice:
        print(f"mmljax: {notice}; the same command goes on from there", file=sys.stderr)
        sys.exit(Preempted.EXIT_CODE)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a config file is a program, and may raise anything
        sys.exit(_fail(_of_config(error) or _one_line(error)))


def _of_config(error: BaseException | None) -> str:
    """Where a config file raised what led to an error, and what that was; empty if none did."""
    while error is not None:
        lines = [
            f"{frame.f_code.co_filename}, line {line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__") == "config_config"  # as ml_collections names it
        ]
        if isinstance(error, SyntaxError) and error.filename:
            lines.append(f"{error.filename}, line {error.lineno}")
        if lines:
            return f"--config: {lines[-1]}: {type(error).__name__}: {_one_line(error)}"
        error = error.__context__
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fail(message: str) -> int:
    print(f"mmljax: error: {message}", file=sys.stderr)
    return 2

"""Options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmljax.config import Config

SPLITS = ("train", "query", "gallery")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, found {text}")
        return value

    number.__name__ = "whole number"  # argparse puts it into its error
    return number


def share(text: str) -> float:
    """An argparse type: a number above 0 and below 1."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, found {text}")
    return value


def place(text: str) -> Path | str:
    """An argparse type: a path, or as it stands an address such as ``gs://bucket/run``."""
    return text if "://" in text else Path(text)


def run_place(text: str) -> Path | str:
    """An argparse type: as ``place``, or an exported network as ``hf:OWNER/NAME@COMMIT``."""
    return text if text.startswith("hf:") else place(text)


def local_path(text: str) -> Path:
    """An argparse type: a path of this machine, which an address is not."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address; give a path of this machine (--workdir and runs may be "
            "addresses)"
        )
    return Path(text)


def fetch_runs(options: argparse.Namespace) -> None:
    """Replace the addresses of runs among the options by copies of their small files.

    Raises:
      UserError: if one cannot be read.
    """
    for name in ("run", "run_a", "run_b"):
        if isinstance(address := getattr(options, name, None), str):
            from mmljax.inference.hub import located

            setattr(options, name, located(address))


def add_run(parser: argparse.ArgumentParser, name: str = "run") -> None:
    """``RUN``, the directory of a run."""
    parser.add_argument(
        name,
        metavar=name.upper(),
        type=run_place,
        help="directory or address of a run: the --workdir of train; embed, search and export also "
        "take an exported folder, or hf:OWNER/NAME@COMMIT",
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    """``--step``."""
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the latest")


def add_dims(parser: argparse.ArgumentParser) -> None:
    """``--dims``."""
    parser.add_argument(
        "--dims",
        type=at_least(1),
        metavar="N",
        help="use the first N dimensions of the embeddings, at unit length; default: all",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """``--images`` or ``--split``, ``--skip-corrupt`` and ``--rows-per-part``."""
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--images", nargs="+", metavar="PATH", help="image files, or folders and all below them"
    )
    choice.add_argument("--split", choices=SPLITS, help="of the run's own data set")
    add_parts(parser)


def add_embeddings(parser: argparse.ArgumentParser, flag: str) -> None:
    """The file to search, under a verb's own flag."""
    parser.add_argument(
        flag, type=local_path, required=True, help="Parquet file of mmljax embed to search"
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """``--force``."""
    parser.add_argument(
        "--force", action="store_true", help="search embeddings that another network made"
    )


def add_parts(parser: argparse.ArgumentParser) -> None:
    """``--skip-corrupt`` and ``--rows-per-part``."""
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out and count images that cannot be decoded",
    )
    parser.add_argument(
        "--rows-per-part",
        type=at_least(1),
        default=8192,
        metavar="N",
        help="images between two saves, for resuming; default 8192",
    )


def add_directory(parser: argparse.ArgumentParser) -> None:
    """``--directory``."""
    parser.add_argument(
        "--directory", help="where the run's data set is now; default: as its config says"
    )


def add_config(parser: argparse.ArgumentParser, *, workdir: bool = True) -> None:
    """``--config`` and, unless told not to, ``--workdir``; the runner collects ``--config.a=b``."""
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="a file such as configs/inshop.py, or the name of a config of the package, such as "
        "quickstart; --config.key=value overrides one value",
    )
    if not workdir:
        return
    parser.add_argument(
        "--workdir",
        type=place,
        help="where the run is kept and resumed, a folder or gs://BUCKET/RUN; default: "
        "runs/NAME-FINGERPRINT, from the config's name and values",
    )


def load_config(options: argparse.Namespace) -> Config | None:
    """The config that ``--config`` names, with its overrides; None where there is no ``--config``.

    Raises:
      UserError: if the config cannot be used, or overrides have no config.
    """
    from mmljax import config as configs
    from mmljax.errors import UserError

    if options.config is not None:
        return configs.load_config(options.config, options.overrides)
    if options.overrides:
        raise UserError(f"--config.{options.overrides[0]} overrides no config; add --config CONFIG")
    return None


def local_workdir(options: argparse.Namespace, config: Config | None) -> Path:
    """``workdir``, of verbs that need a folder of this machine.

    Raises:
      UserError: if it is an address.
    """
    from mmljax.errors import UserError

    if isinstance(found := workdir(options, config), str):
        raise UserError(f"--workdir={found}: mmljax {options.verb} takes a folder of this machine")
    return found


def workdir(options: argparse.Namespace, config: Config | None) -> Path | str:
    """The directory or address that ``--workdir`` names, or the config's default directory."""
    from mmljax import config as configs

    if options.workdir is not None:
        return options.workdir
    if config is None:
        return Path("runs")
    return Path("runs") / f"{configs.config_name(options.config)}-{configs.fingerprint(config)}"

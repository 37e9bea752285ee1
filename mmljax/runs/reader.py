"""What runs left: a tidy table (:mod:`mmljax.runs.table`) of several of them, and the data of one."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmljax.data import paths as files
from mmljax.errors import UserError
from mmljax.runs.table import share_targets, tidy
from mmljax.runs.writer import METRICS, read_metrics

if TYPE_CHECKING:
    from pandas import DataFrame

    from mmljax.config import Config
    from mmljax.types import Dataset

CONFIG = "config.json"

_UNREADABLE = (OSError, ValueError, RecursionError)  # the last: of text nested without end

Paths = Sequence[Path | str]


def read_run(path: Path | str, *, label: str | None = None) -> DataFrame:
    """The tidy table of one run; also of one that is still going.

    Args:
      path: the run's directory, or its address, such as ``gs://bucket/run``.
      label: in column ``run``; the directory's name if None.

    Raises:
      UserError: if there is no run, or a file of it is damaged.
    """
    seed, rows = _read(path)
    return tidy(rows, run=label or _name(path), seed=seed)


def read_runs(paths: Paths | Mapping[str, Path | str | Paths]) -> DataFrame:
    """The tidy table of several runs.

    Args:
      paths: runs, each labelled by its directory's name; or, by label, a run or the runs that
        differ in their seed alone, which plots show as one line within a band.

    Raises:
      UserError: as :func:`read_run`; if two runs of one label have one seed, or there is no run.
    """
    import pandas as pd

    tables: dict[tuple[str, int], DataFrame] = {}
    for label, path in _labelled(paths):
        seed, rows = _read(path)
        if (label, seed) in tables:
            raise UserError(
                f"{path} is a second run {label!r} of seed {seed}; give runs that differ in more "
                "than their seed a label each: {'label': [paths]}"
            )
        tables[label, seed] = tidy(rows, run=label, seed=seed)
    if not tables:
        raise UserError("no run is named; name directories of runs, such as those in runs/")
    return pd.concat(tables.values(), ignore_index=True)


def _labelled(paths: Paths | Mapping[str, Path | str | Paths]) -> Iterator[tuple[str, Path | str]]:
    if isinstance(paths, Mapping):
        for label, given in paths.items():
            several = [given] if isinstance(given, str | Path) else given
            yield from ((label, path) for path in several)
    else:
        yield from ((_name(path), path) for path in paths)


def _name(path: Path | str) -> str:
    """The last part of a path or an address."""
    return str(path).rstrip("/").rpartition("/")[2]


def _read(path: Path | str) -> tuple[int, list[dict[str, Any]]]:
    """Seed and rows of a run, the targets of its shares among them."""
    shown = str(path).rstrip("/")
    with _files(path) as folder:
        try:
            rows = read_metrics(folder)
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            seed, targets = int(config["seed"]), share_targets(config)
        except UserError as error:
            raise UserError(str(error).replace(str(folder), shown)) from None
        except (*_UNREADABLE, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{shown}/{CONFIG} is no config of a run ({type(error).__name__}); name the "
                "--workdir of a run"
            ) from None
    if targets:
        rows.append({"step": 0, "kind": "target", **targets})
    return seed, rows


def read_config(run: Path) -> Config:
    """The config of a run.

    Args:
      run: the run's directory, on this machine.

    Raises:
      UserError: if there is no run, or its config is damaged or of another version.
    """
    from mmljax.config import from_mapping

    path = run / CONFIG
    try:
        return from_mapping(json.loads(path.read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"{path} is no config of this version: {error}") from error
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name the --workdir of a run") from None
    except _UNREADABLE as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it, or run mmljax.main with the run's config "
            "into another --workdir and copy its config.json"
        ) from error


def load_run_data(run: Path, *, directory: str | None = None) -> tuple[Config, Dataset]:
    """The config of a run and the data set that it names.

    Args:
      run: the run's directory.
      directory: of the data set, where it has moved.

    Raises:
      UserError: if there is no run, its config is damaged, or the data set cannot be used.
    """
    from mmljax.data.load import load_dataset

    config = read_config(run)
    if directory is not None:
        data = dataclasses.replace(config.data, directory=directory)
        config = dataclasses.replace(config, data=data)
    return config, load_dataset(config, create=False)


@contextmanager
def _files(path: Path | str) -> Iterator[Path]:
    """A local folder with the small files of a run.

    Raises:
      UserError: if they lie elsewhere and cannot be read.
    """
    if not files.is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in (METRICS, CONFIG):
            source = files.join(str(path).rstrip("/"), name)
            try:
                Path(folder, name).write_bytes(files.read(source))
            except OSError as error:
                raise UserError(
                    f"{source} cannot be read ({' '.join(str(error).split())[:200]}); name the "
                    "--workdir of a run"
                ) from None
        yield Path(folder)

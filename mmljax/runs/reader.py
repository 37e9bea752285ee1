"""Reads runs: the metrics of one or several as a tidy table, and the config and data of one.

A tidy table has one value per row, for pandas and for plots:

============  ============================================================================
``run``       label of the run; runs that differ only in their seed share one; category
``seed``      of the run; int64
``step``      number of updates; int64
``kind``      ``train`` (the ledger), ``evaluation``, ``rates``, or ``target``: the gradient
              shares that the config asks for; category
``quantity``  ``loss``, ``weight``, ``share_embeddings``, ``recall@1``, ...; category
``name``      the objective; for ``conflict`` both, as ``pair_proxy``; for ``learning_rate``
              the group; empty for quantities of the whole run; category
``value``     float64
============  ============================================================================

Rows are sorted by curve (run, seed, kind, quantity, name), then by step. With pandas below 3 pass
``observed=True`` to ``groupby``, since columns of text are categories.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.data.paths import is_address
from mmljax.errors import UserError
from mmljax.runs.writer import METRICS, read_blocks
from mmljax.text import one_line

if TYPE_CHECKING:  # at run time pandas is imported when a table is made
    from pandas import DataFrame

    from mmljax.config import Config
    from mmljax.types import Dataset

CONFIG = "config.json"
COLUMNS = ("run", "seed", "step", "kind", "quantity", "name", "value")
POINTS = 4000
"""Points of a curve that are kept unless a caller asks for more."""

_UNREADABLE = (OSError, ValueError, RecursionError)  # the last: of deeply nested JSON

Paths = Sequence[Path | str]
Rows = Sequence[Mapping[str, Any]]


class _Curve(NamedTuple):
    """One quantity of one run over its steps."""

    run: str
    seed: int
    kind: str
    key: str  # of the rows
    steps: np.ndarray  # [n] int64, ascending
    values: np.ndarray  # [n] float64


def read_run(
    path: Path | str, *, label: str | None = None, points: int | None = POINTS
) -> DataFrame:
    """The tidy table of one run; also of one that is still training.

    Args:
      path: the run's directory, or its address, such as ``gs://bucket/run``.
      label: value of column ``run``; the directory's name if None.
      points: a longer curve is thinned to at most so many of its points: the first, the last, and
        the least and the greatest value of each of equal ranges of steps, so spikes stay visible.
        Means over a thinned curve are biased; None keeps all points.

    Raises:
      UserError: if there is no run, or a file of it is damaged or cannot be reached.
    """
    return _table(_read(path, label=label or _name(path), points=points)[1])


def read_runs(
    paths: Paths | Mapping[str, Path | str | Paths], *, points: int | None = POINTS
) -> DataFrame:
    """The tidy table of several runs.

    Args:
      paths: runs, each labelled by its directory's name; or a mapping from a label to a run, or to
        runs that differ only in their seed, which plots show as one curve within a band.
      points: as of :func:`read_run`.

    Raises:
      UserError: as :func:`read_run`; if two runs of one label have one seed, or no run is given.
    """
    curves: list[_Curve] = []
    seen: set[tuple[str, int]] = set()
    for label, path in _labelled(paths):
        seed, more = _read(path, label=label, points=points)
        if (label, seed) in seen:
            raise UserError(
                f"{path} is a second run {label!r} of seed {seed}; give runs that differ in more "
                "than their seed a label each: {'label': [paths]}"
            )
        seen.add((label, seed))
        curves += more
    if not seen:
        raise UserError("no run is given; give directories of runs, such as those in runs/")
    return _table(curves)


def tidy(rows: Rows, *, run: str, seed: int, points: int | None = None) -> DataFrame:
    """The tidy table of rows in memory.

    Args:
      rows: as :func:`mmljax.runs.writer.read_metrics` returns them.
      run: the run's label.
      seed: the run's seed.
      points: as of :func:`read_run`.
    """
    return _table(_curves([rows], run=run, seed=seed, points=points))


def share_targets(config: Mapping[str, Any]) -> dict[str, float]:
    """The gradient shares that a config asks for, keyed as a row of the ledger; empty if none.

    Args:
      config: the contents of ``config.json``.
    """
    if config["combination"]["name"] != "share":
        return {}
    targets: dict[str, float] = {}
    for group, key in (("embeddings", "embedding_share"), ("proxies", "proxy_share")):
        shares = {name: float(row[key]) for name, row in config["objectives"].items()}
        total = sum(shares.values())  # shares are normalised over the objectives
        targets |= {
            f"share_{group}/{name}": share / total for name, share in shares.items() if share > 0
        }
    return targets


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


def _folder(path: Path | str) -> Path:
    """The run's directory; of an address, a local copy of its small files."""
    if not is_address(path):
        return Path(path)
    from mmljax.runs.remote import fetched  # here, as it imports jax

    return fetched(path)


def _read(path: Path | str, *, label: str, points: int | None) -> tuple[int, list[_Curve]]:
    """Seed and curves of a run, those of its targets last."""
    shown = str(path).rstrip("/")
    folder = _folder(path)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        seed, targets = int(config["seed"]), share_targets(config)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed}")
    except (*_UNREADABLE, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{shown}/{CONFIG} is not the config of a run ({type(error).__name__}); give the "
            "--workdir of a run"
        ) from None
    try:
        blocks = (rows for _, rows in read_blocks(folder / METRICS))
        curves = _curves(blocks, run=label, seed=seed, points=points)
    except UserError as error:
        raise UserError(str(error).replace(str(folder), shown)) from None
    targeted = [{"step": 0, "kind": "target", **targets}] if targets else []
    return seed, curves + _curves([targeted], run=label, seed=seed, points=None)


def _curves(blocks: Iterable[Rows], *, run: str, seed: int, points: int | None) -> list[_Curve]:
    """The curves of some rows, each of at most ``points`` points; the rows are streamed."""
    if points is not None and points < 4:
        raise UserError(f"points={points}: a curve takes at least 4, or None for all")
    parts: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for rows in blocks:
        for (kind, *keys), columns in _columns(rows):
            steps = np.array(columns[keys.index("step")], np.int64)
            for key, column in zip(keys, columns, strict=True):
                if key in ("step", "kind"):
                    continue
                part = parts.setdefault((kind, key), [])
                part.append((steps, np.array(column, np.float64)))
                # Long parts are thinned from time to time, so memory stays bounded.
                if points is not None and len(part) * len(steps) > 4 * points:
                    part[:] = [_thinned(*_joined(part), points)]
    curves = []
    for (kind, key), part in parts.items():
        steps, values = _joined(part)
        if points is not None:
            steps, values = _thinned(steps, values, points)
        curves.append(_Curve(run, seed, kind, key, steps, values))
    return curves


def _columns(rows: Rows) -> Iterator[tuple[tuple[str, ...], list[Sequence[Any]]]]:
    """Rows of one kind and with the same keys, as columns: ``(kind, *keys)`` and one per key."""
    groups: dict[tuple[str, ...], list[Iterable[Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], *row), []).append(row.values())
    for names, group in groups.items():
        yield names, list(zip(*group, strict=True))


def _joined(part: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The parts of a curve as one, sorted by step."""
    steps, values = (np.concatenate(arrays) for arrays in zip(*part, strict=True))
    if np.any(steps[1:] < steps[:-1]):
        order = np.argsort(steps, kind="stable")
        return steps[order], values[order]
    return steps, values


def _thinned(steps: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` points of a curve.

    These are the first, the last, and in each of equal ranges of steps the least and the greatest
    value (the first such point). NaN is kept where a range holds nothing else. Thinning the
    beginning of a curve before the rest is added loses no extreme.

    Args:
      steps: ``[n]``, ascending.
      values: ``[n]``.
      points: at least 4.
    """
    if len(steps) <= points:
        return steps, values
    ranges = points // 2 - 1
    offset = steps.astype(np.float64) - steps[0]
    place = np.minimum(offset * (ranges / max(offset[-1], 1.0)), ranges - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    sizes = np.diff(starts, append=len(place))
    kept = [np.array([0, len(steps) - 1])]
    for reduce in (np.fmin.reduceat, np.fmax.reduceat):
        extreme = reduce(values, starts)
        found = np.flatnonzero(values == np.repeat(extreme, sizes))
        first = np.diff(place[found], prepend=-1) != 0
        kept += [found[first], starts[np.isnan(extreme)]]
    chosen = np.unique(np.concatenate(kept))
    return steps[chosen], values[chosen]


def _table(curves: Sequence[_Curve]) -> DataFrame:
    """Curves as one table."""
    import pandas as pd

    sizes = [len(curve.steps) for curve in curves]
    split = [curve.key.partition("/") for curve in curves]

    def category(names: Sequence[str]) -> Any:
        kinds = list(dict.fromkeys(names))
        codes = np.array([kinds.index(name) for name in names], np.int64)
        categories = pd.Index(kinds, dtype="object" if not kinds else None)
        return pd.Categorical.from_codes(np.repeat(codes, sizes), categories=categories)

    empty = (np.empty(0, np.int64), np.empty(0))
    arrays = [(curve.steps, curve.values) for curve in curves] or [empty]
    columns = {
        "run": category([curve.run for curve in curves]),
        "seed": np.repeat(np.array([curve.seed for curve in curves], np.int64), sizes),
        "step": np.concatenate([steps for steps, _ in arrays]),
        "kind": category([curve.kind for curve in curves]),
        "quantity": category([quantity for quantity, _, _ in split]),
        "name": category([name for _, _, name in split]),
        "value": np.concatenate([values for _, values in arrays]),
    }
    return pd.DataFrame(columns, columns=list(COLUMNS))


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
        raise UserError(f"{path} is not a config of this version: {error}") from error
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the --workdir of a run") from None
    except _UNREADABLE as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}); restore it, or train with the run's config "
            "into another --workdir and copy its config.json"
        ) from error


def load_run_data(run: Path, *, directory: str | None = None) -> tuple[Config, Dataset]:
    """The config of a run and the data set that it names; writes nothing.

    Args:
      run: the run's directory.
      directory: of the data set, if it has moved.

    Raises:
      UserError: if there is no run, its config is damaged, or the data set cannot be used.
    """
    from mmljax.data.load import load_dataset

    config = read_config(run)
    if directory is not None:
        data = dataclasses.replace(config.data, directory=directory)
        config = dataclasses.replace(config, data=data)
    return config, load_dataset(config, create=False)

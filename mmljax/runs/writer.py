"""What a run writes and shows besides checkpoints: rows, results, tables.

A run's directory holds

- ``metrics.jsonl``: one JSON object per line with ``step``, ``kind`` (``train`` for a row of the
  ledger, ``evaluation``, ``rates``: what the clock says) and flat scalars such as ``loss/pair``. A
  number that is not finite is written as ``null``, for JSON has no other word for it, and is read
  back as NaN.
- ``tensorboard/``: the same scalars, if asked for (``loggers.py``, with other places for them).
- ``results.json``: scores and everything needed to tell where they come from.

Which scalars there are is the training step's affair: nothing here depends on their names.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mmljax.errors import UserError
from mmljax.runs.plot import plot_contributions as plot_contributions  # the rest of a run's report
from mmljax.runs.progress import Progress

METRICS, RESULTS = "metrics.jsonl", "results.json"

_VALUES = (int, float, type(None))  # of a row: a number, or null for one that is not finite

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_TENSORFLOW = ("tensorflow", "tensorflow-cpu")  # whichever is installed
_RECALL = re.compile(r"recall@(\d+)")
_SCORE_NAMES = {"r_precision": "R-precision", "map@r": "MAP@R", "mrr": "MRR"}


class Reporter:
    """Rows of scalars for ``metrics.jsonl`` and loggers, and for people how far the run is."""

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        batch_size: int,
        loggers: Sequence[Any] = (),
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """Open the run's files at a step.

        A run that was killed computes again what followed its last checkpoint: rows of later steps
        (at step 0 all rows) and a last line that was cut off in the middle are removed. So rows of
        a step must be written before the checkpoint of that step.

        Args:
          workdir: the run's directory; made if absent.
          start_step: from which the run goes on: the restored one, or 0.
          total_steps: where it ends.
          batch_size: global, images per step.
          loggers: take the same scalars (``loggers.Logger``); closed with this.
          enabled: False on every process but the first, whose reporter then does nothing.
          stream: where progress is shown; standard error if None.

        Raises:
          UserError: if an earlier ``metrics.jsonl`` is damaged.
        """
        self._file: TextIO | None = None
        if not enabled:
            return
        self._batch_size = batch_size
        self._step = start_step
        self._loss: float | None = None
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS
        if path.exists():
            kept = [line for line, row in _rows(path) if start_step and row["step"] <= start_step]
            write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._loggers = loggers
        self._progress = Progress(
            start_step=start_step,
            total_steps=total_steps,
            stream=sys.stderr if stream is None else stream,
        )

    def train(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write a row of the ledger, after ``step`` updates; ``loss`` is what progress shows."""
        if self._file is None:
            return
        self._write(step, "train", scalars)
        self._step, self._loss = step, scalars.get("loss")

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """Write and show the scores of the network after ``step`` updates."""
        if self._file is None:
            return
        self._write(step, "evaluation", scores)
        shown = [f"{score_name(k)} {100 * scores[k]:.1f}%" for k in score_keys(scores)]
        self._progress.say(step, shown)

    def progress(self, *, seconds: float, steps: int, waited: float, compilations: int) -> None:
        """Write how fast the run is, and show it with how far it is.

        Args:
          seconds: that the last ``steps`` steps took.
          steps: since the last call.
          waited: seconds of these in which the devices had no input to work on.
          compilations: of programs, since the run began.
        """
        if self._file is None:
            return
        seconds = max(seconds, 1e-9)
        rates = {
            "images_per_second": steps * self._batch_size / seconds,
            "input_wait": waited / seconds,
            "compilations": compilations,
        }
        self._write(self._step, "rates", rates)
        facts = {} if self._loss is None else {"loss": f"{float(self._loss):.4g}"}
        facts["images/s"] = f"{rates['images_per_second']:.0f}"
        facts["input wait"] = f"{rates['input_wait']:.0%}"
        facts["compilations"] = str(compilations)
        self._progress.show(self._step, facts)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._file is None:
            return
        self._file.close()
        self._progress.close()
        self._file = None
        for logger in self._loggers:
            logger.close()

    def _write(self, step: int, kind: str, scalars: Mapping[str, Any]) -> None:
        assert self._file is not None
        row = _plain(dict(step=step, kind=kind, **scalars))
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        prefix = "" if kind == "train" else f"{kind}/"
        values = {prefix + key: float(value) for key, value in scalars.items()}
        for logger in self._loggers:
            logger.scalars(step, values)


def read_metrics(workdir: Path | str) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` in their order, ``null`` as NaN.

    May be called while the run goes on: a last line that is still being written is left out.

    Raises:
      UserError: if the file is absent or damaged.
    """
    path = Path(workdir) / METRICS
    if not path.exists():
        raise UserError(f"{path} does not exist; is {str(workdir)!r} the --workdir of a run?")
    rows = (row for _, row in _rows(path))
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def write_results(
    workdir: Path,
    *,
    scores: Mapping[str, Any],
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``results.json``, whole or not at all, and return its path.

    Args:
      workdir: the run's directory.
      scores: of the final evaluation.
      config: the resolved config as a plain dict.
      extra: further entries, such as how long it took.
    """
    import jax  # here, so that reading a run's files needs no accelerator

    results = {
        "scores": scores,
        "config": config,
        "git": _git(),
        "versions": versions(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(extra or {}),
    }
    path = workdir / RESULTS
    write_atomically(path, json.dumps(_plain(results), indent=2, allow_nan=False) + "\n")
    return path


def recall_table(scores: Mapping[str, Any], *, untrained: Mapping[str, Any] | None = None) -> str:
    """Scores in percent as aligned plain text: a row per score, a column per network.

    Args:
      scores: of the trained network, as shares: ``recall@<k>``, ``r_precision``, ``map@r``,
        ``mrr``; with ``chance`` (Recall@1 of a random order), ``tie_rate``, ``queries``,
        ``gallery`` and ``lone_queries`` if there. Other keys are left out.
      untrained: the same of the network before its first step.
    """
    keys = score_keys(scores)
    columns = {"trained": scores}
    if untrained is not None:
        columns["untrained"] = untrained
    if "chance" in scores:
        columns["chance"] = {"recall@1": scores["chance"]}
    rows = [["%", *columns]]
    for key in keys:
        cells = (f"{100 * c[key]:.1f}" if key in c else "-" for c in columns.values())
        rows.append([score_name(key), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    if scores.get("tie_rate"):
        lines.append(
            f"{100 * scores['tie_rate']:.1f} % of the queries have ties, at their worst here; "
            f"Recall@1 of the mean order: {100 * scores.get('recall_expected@1', math.nan):.1f}"
        )
    if {"queries", "gallery", "lone_queries"} <= scores.keys():
        lines.append(
            f"{scores['queries']:.0f} queries, {scores['gallery']:.0f} gallery images; "
            f"{scores['lone_queries']:.0f} queries without a match are in no score"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of what results depend on; read from the installed metadata, nothing is imported."""
    versions = {"python": platform.python_version()}
    for package in (*_PACKAGES, *_TENSORFLOW):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a run that is killed, sees the old or the new one whole."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def score_keys(scores: Mapping[str, Any]) -> list[str]:
    """The keys that tables show, Recall@K by K and then the others."""
    recalls = sorted((int(m[1]), key) for key in scores if (m := _RECALL.fullmatch(key)))
    return [key for _, key in recalls] + [key for key in _SCORE_NAMES if key in scores]


def score_name(key: str) -> str:
    """What a table calls a score."""
    return _SCORE_NAMES.get(key, key.replace("recall", "Recall"))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a metrics file with their rows; a last line that was cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or move it away") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not _is_row(row):
            raise UserError(
                f"{path}, line {number} is no row of metrics: {line.strip()[:60]!r}; "
                "remove the line, or move the file away"
            )
        yield line, row


def _is_row(row: Any) -> bool:
    """Whether something is a step, a kind, and numbers or null."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return False
    values = [value for key, value in row.items() if key not in ("step", "kind")]
    return type(row.get("step")) is int and all(type(v) in _VALUES for v in values)


def _plain(value: Any) -> Any:
    """Plain lists, dicts and numbers for JSON, with None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # an array, or one of its scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _git() -> dict[str, Any] | None:
    """Revision of the checkout that this file is tracked in, and whether it was changed since."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None

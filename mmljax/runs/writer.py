"""What a run writes besides checkpoints: rows of metrics and the results.

A run's directory holds

- ``metrics.jsonl``: one JSON object per line with ``step``, ``kind`` (``train`` for a row of the
  ledger, ``evaluation``, ``pretrained`` for the scores of a pretrained backbone's features,
  ``rates`` for throughput) and flat scalars such as ``loss/pair``. JSON has no NaN and no infinity:
  they are written as ``null`` and read back as NaN.
- ``sessions.json``: the processes that trained the run (:mod:`mmljax.runs.sessions`).
- ``results.json``: scores and everything needed to reproduce them.
- ``tensorboard/``: the same scalars, if configured (:mod:`mmljax.runs.loggers`).

The training step decides which scalars there are; nothing here depends on their names.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mmljax.errors import UserError
from mmljax.files import write_atomically, written_atomically
from mmljax.runs.loggers import Logger
from mmljax.runs.progress import Progress
from mmljax.runs.sessions import Session, Sessions
from mmljax.text import one_line, text_table

METRICS, RESULTS = "metrics.jsonl", "results.json"
BEFORE_TRAINING = ("untrained", "pretrained")
"""Entries of the results: scores of the network at step 0, and of pretrained features alone."""

Row = dict[str, Any]

_BLOCK = 1 << 17  # bytes of a metrics file that are parsed at once; larger blocks are slower
_LONGEST = 18  # digits of an integer that is read as one; longer ones are read as floats
_TYPES = frozenset((int, float, type(None), str))  # of a row's values; the text is its kind
_RECALL = re.compile(r"recall@(\d+)")
_AT_SIZE = re.compile(r"(recall@\d+|map@r|mrr|r_precision)@(\d+)")
_SCORE_NAMES = {"r_precision": "R-precision", "map@r": "MAP@R", "mrr": "MRR"}


class Reporter:
    """Writes rows of scalars to ``metrics.jsonl`` and the loggers, and shows the progress."""

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        batch_size: int,
        loggers: Sequence[Logger] = (),
        started: float | None = None,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """Open the run's files at a step.

        A resumed run computes the steps after its last checkpoint again. Rows of these steps (at
        step 0 all rows) and an incomplete last line are removed. So rows of a step must be written
        before the checkpoint of that step.

        Args:
          workdir: the run's directory; made if absent.
          start_step: the restored step, or 0.
          total_steps: last step of the run.
          batch_size: global, images per step.
          loggers: receive the same scalars; closed with this reporter.
          started: ``time.monotonic()`` at the start of the session; now if None.
          enabled: False on every process but the first, whose reporter then does nothing.
          stream: where progress is shown; standard error if None.

        Raises:
          UserError: if ``metrics.jsonl`` or ``sessions.json`` is damaged.
        """
        self.evaluations: dict[int, Row] = {}
        """Rows of the evaluations so far, by step."""
        self._pretrained: Row | None = None
        self._file: TextIO | None = None
        if not enabled:
            return
        self._workdir = workdir
        self._batch_size = batch_size
        self._step = start_step
        self._loss: float | None = None
        workdir.mkdir(parents=True, exist_ok=True)
        self._sessions = Sessions(workdir, start_step=start_step, started=started)
        path = workdir / METRICS
        if path.exists():
            for row in _truncate(path, start_step):
                if row["kind"] == "pretrained":
                    self._pretrained = row
                else:
                    self.evaluations[row["step"]] = row
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._loggers = loggers
        self._progress = Progress(
            start_step=start_step,
            total_steps=total_steps,
            stream=sys.stderr if stream is None else stream,
        )

    @property
    def sessions(self) -> list[Session]:
        """All sessions of the run that trained a step, the current one last."""
        return self._sessions.all

    def train(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the row of the ledger after ``step`` updates; progress shows its ``loss``."""
        if self._file is None:
            return
        self._write(step, "train", scalars)
        self._step, self._loss = step, scalars.get("loss")

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """Write and show the scores of the network after ``step`` updates."""
        if self._file is None:
            return
        self.evaluations[step] = self._write(step, "evaluation", scores)
        self._update_session()
        self._progress.say(step, _shown(scores))

    def pretrained(self, scores: Mapping[str, Any]) -> None:
        """Write and show the scores of a pretrained backbone's features, before the first step."""
        if self._file is None:
            return
        self._pretrained = self._write(0, "pretrained", scores)
        self._progress.say(0, ["pretrained features:", *_shown(scores)])

    @property
    def before_training(self) -> dict[str, Row | None]:
        """The entries of the results that :data:`BEFORE_TRAINING` names; None if not evaluated."""
        found = (self.evaluations.get(0), self._pretrained)
        return dict(zip(BEFORE_TRAINING, found, strict=True))

    def progress(self, *, seconds: float, steps: int, waited: float, compilations: int) -> None:
        """Write the throughput, and show it with the progress.

        Args:
          seconds: duration of the last ``steps`` steps.
          steps: since the last call.
          waited: seconds of these in which the devices waited for input.
          compilations: of programs, since the session started.
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
        self._update_session()
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

    def _write(self, step: int, kind: str, scalars: Mapping[str, Any]) -> Row:
        assert self._file is not None
        row = plain(dict(step=step, kind=kind, **scalars))
        with _writing(self._workdir):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
        prefix = "" if kind == "train" else f"{kind}/"
        values = {prefix + key: float(value) for key, value in scalars.items()}
        for logger in self._loggers:
            logger.scalars(step, values)
        return _with_nan(row)

    def _update_session(self) -> None:
        with _writing(self._workdir):
            self._sessions.update(self._step)


def _shown(scores: Mapping[str, Any]) -> list[str]:
    keys = [key for key in score_keys(scores) if "/" not in key]
    return [f"{score_name(key)} {100 * scores[key]:.1f}%" for key in keys]


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    """Turn a failure to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if not workdir.is_dir():
            raise UserError(
                f"--workdir={workdir} was deleted or moved during training; start the run again"
            ) from error
        raise UserError(
            f"--workdir={workdir} cannot be written ({one_line(error)}); if the disk is full, "
            "make room; then run the same command again, which resumes at the last checkpoint"
        ) from error


def _truncate(path: Path, step: int) -> list[Row]:
    """Remove rows after ``step``, all if it is 0, and return those of scores that are kept.

    The file is streamed; if it is damaged, it is left as it was.
    """
    evaluations = []
    with written_atomically(path) as partial, partial.open("wb") as file:
        for lines, rows in read_blocks(path):
            for line, row in zip(lines, rows, strict=True):
                if step and row["step"] <= step:
                    file.write(line)
                    if row["kind"] in ("evaluation", "pretrained"):
                        evaluations.append(_with_nan(row))
    return evaluations


def read_metrics(workdir: Path | str, *, kind: str | None = None) -> list[Row]:
    """The rows of ``metrics.jsonl`` in order, ``null`` as NaN.

    May be called while the run is training: an incomplete last line is left out.

    Args:
      workdir: the run's directory.
      kind: only rows of this kind; lines of other kinds are then not checked for damage, and a
        long file is read fast. All kinds if None.

    Raises:
      UserError: if the file is absent or damaged.
    """
    return [
        _with_nan(row)
        for _, rows in read_blocks(Path(workdir) / METRICS, kind=kind)
        for row in rows
        if kind in (None, row["kind"])
    ]


def read_blocks(path: Path, *, kind: str | None = None) -> Iterator[tuple[list[bytes], list[Row]]]:
    """Yield the lines of a metrics file with their rows, about a thousand at a time.

    Args:
      path: the file. An incomplete last line is left out.
      kind: skip lines that cannot be of this kind; all lines if None.

    Raises:
      UserError: if the file is absent or damaged.
    """
    word = b"" if kind is None else json.dumps(kind).encode()
    first = 1
    try:
        with path.open("rb") as file:
            while lines := file.readlines(_BLOCK):
                if not lines[-1].endswith(b"\n"):
                    lines.pop()
                wanted = [i for i, line in enumerate(lines) if word in line] if word else None
                if wanted is None:
                    yield lines, _parse(lines, path, range(first, first + len(lines)))
                elif wanted:
                    chosen = [lines[i] for i in wanted]
                    yield chosen, _parse(chosen, path, [first + i for i in wanted])
                first += len(lines)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; is {str(path.parent)!r} the --workdir of a run?"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); restore it, or move it away"
        ) from error


def _parse(lines: Sequence[bytes], path: Path, numbers: Sequence[int]) -> list[Row]:
    """The rows of some lines; parsed at once, which is faster, or else line by line."""
    rows = _json(b"[" + b",".join(lines) + b"]")
    if isinstance(rows, list) and len(rows) == len(lines) and all(map(_is_row, rows)):
        return rows
    rows = []
    for number, line in zip(numbers, lines, strict=True):
        row = _json(line)
        if not _is_row(row):
            shown = line.decode(errors="replace").strip()[:60]
            raise UserError(
                f"{path}, line {number} is not a row of metrics: {shown!r}; remove the line, or "
                "move the file away"
            )
        rows.append(row)
    return rows


def _json(text: bytes) -> Any:
    """Parsed JSON, None if it is malformed; an integer of too many digits becomes a float."""
    try:
        return json.loads(
            text.decode(), parse_int=lambda x: int(x) if len(x) <= _LONGEST else float(x)
        )
    except (ValueError, RecursionError):
        return None


def _is_row(row: Any) -> bool:
    """Whether a value is an object with a step, a kind, and otherwise numbers or null."""
    if not isinstance(row, dict):
        return False
    types = [*map(type, row.values())]
    return (
        type(row.get("step")) is int
        and type(row.get("kind")) is str
        and types.count(str) == 1
        and _TYPES.issuperset(types)
    )


def _with_nan(row: Row) -> Row:
    return {k: math.nan if v is None else v for k, v in row.items()}


def write_results(
    workdir: Path,
    *,
    scores: Mapping[str, Any],
    config: Mapping[str, Any],
    sessions: Sequence[Session],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``results.json`` atomically and return what it holds.

    Equal arguments give an equal file: dates, versions and devices are those of the sessions.

    Args:
      workdir: the run's directory.
      scores: of the final evaluation.
      config: the resolved config as a plain dict.
      sessions: that trained the run; ``seconds`` of the results is the sum of theirs.
      extra: further entries, such as the protocol of the evaluation.
    """
    seconds = round(sum(session["seconds"] for session in sessions), 3)
    results: dict[str, Any] = plain(
        {
            "scores": scores,
            "config": config,
            "sessions": sessions,
            "seconds": seconds,
            **(extra or {}),
        }
    )
    write_atomically(workdir / RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def read_results(workdir: Path) -> dict[str, Any] | None:
    """What ``results.json`` holds; None if it is absent or does not hold scores."""
    try:
        results = json.loads((workdir / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = isinstance(results, dict) and isinstance(results.get("scores"), dict)
    return results if found else None


def recall_table(networks: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Scores in percent as aligned plain text: a row per score, a column per network.

    Args:
      networks: by name the scores of one or several, as fractions: ``recall@<k>``, ``r_precision``,
        ``map@r``, ``mrr``. Those of None are left out. The first one decides the rows, and may also
        have ``chance`` (Recall@1 of a random order), ``tie_rate``, ``queries``, ``gallery`` and
        ``lone_queries``. Other keys are ignored.
    """
    columns = {name: scores for name, scores in networks.items() if scores is not None}
    scores = next(iter(columns.values()))
    if "chance" in scores:
        columns["chance"] = {"recall@1": scores["chance"]}
    rows = [["%", *columns]]
    for key in score_keys(scores):
        rows.append([score_name(key), *(percent(column.get(key)) for column in columns.values())])
    lines = [text_table(rows)]
    if scores.get("tie_rate"):
        lines.append(
            f"{percent(scores['tie_rate'])} % of the queries have ties, scored here in their worst "
            f"order; Recall@1 in the mean order: {percent(scores.get('recall_expected@1'))}"
        )
    if {"queries", "gallery", "lone_queries"} <= scores.keys():
        more = f" and {scores['distractors']:.0f} distractors" if "distractors" in scores else ""
        lines.append(
            f"{scores['queries']:.0f} queries, {scores['gallery']:.0f} gallery images{more}; "
            f"{scores['lone_queries']:.0f} queries without a match are excluded from all scores"
        )
    return "\n".join(lines)


def size_table(scores: Mapping[str, Any]) -> list[list[str]]:
    """Scores in percent by the number of dimensions: the header, and a row per prefix and of all.

    Args:
      scores: of an evaluation, those of prefixes named as ``recall@1@64``.

    Returns:
      No row where no prefix was scored.
    """
    sizes = sorted({int(match[2]) for key in scores if (match := _AT_SIZE.fullmatch(key))})
    if not sizes:
        return []
    names = [key for key in score_keys(scores) if f"{key}@{sizes[0]}" in scores]
    rows = [["dimensions", *map(score_name, names)]]
    for size in sizes:
        rows.append([str(size), *(percent(scores.get(f"{name}@{size}")) for name in names)])
    return [*rows, ["all", *(percent(scores[name]) for name in names)]]


def percent(fraction: float | None) -> str:
    """A fraction in percent with one decimal, ``-`` if it is absent or not a number."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


def score_keys(scores: Mapping[str, Any]) -> list[str]:
    """The keys that tables show: Recall@K by K, then the other scores; then those of variants.

    A variant of the evaluation has keys such as ``recall@1/distractors``.
    """
    variants: dict[str, dict[str, str]] = {}
    for key in scores:
        name, _, variant = key.partition("/")
        variants.setdefault(variant, {})[name] = key
    found = []
    for _, keys in sorted(variants.items(), key=lambda item: item[0] != ""):
        recalls = sorted((int(m[1]), name) for name in keys if (m := _RECALL.fullmatch(name)))
        names = [name for _, name in recalls] + [name for name in _SCORE_NAMES if name in keys]
        found += [keys[name] for name in names]
    return found


def score_name(key: str) -> str:
    """The name of a score in tables."""
    name, _, variant = key.partition("/")
    shown = _SCORE_NAMES.get(name, name.replace("recall", "Recall"))
    return f"{shown}, {variant.replace('_', ' ')}" if variant else shown


def plain(value: Any) -> Any:
    """Plain lists, dicts and numbers for JSON, with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # an array, or one of its scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

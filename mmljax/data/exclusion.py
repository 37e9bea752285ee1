"""Images that are left out of a data set, by their names in a CSV file."""

from __future__ import annotations

import logging
import os

import numpy as np
from jaxtyping import Bool

from mmljax.data.readers.csv import read_rows
from mmljax.data.readers.splits import SPLITS, Part, make_dataset
from mmljax.errors import UserError
from mmljax.text import nearest
from mmljax.types import Dataset, Split

COLUMN = "name"
"""The column of an exclusion list that is read; others are ignored."""

FLAG = "--config.data.exclude"

_log = logging.getLogger(__name__)


def without_excluded(dataset: Dataset, path: str | os.PathLike[str]) -> Dataset:
    """The data set without the images that an exclusion list names, its classes numbered again.

    Names are those of ``Split.names``, which every reader gives and every record and error shows: a
    path below the data set's folder, or ``images[7]`` of arrays. An image may be listed several
    times. Training items and test items without any image left are no classes any more.

    Args:
      dataset: of any reader of images; its distractors are kept as they are.
      path: of the list, local or remote; '' for none.

    Raises:
      UserError: if the file cannot be read as such a list, names an image that the data set does
        not have, or leaves a split without images.
    """
    if not os.fspath(path):
        return dataset
    where = f"{FLAG}={os.fspath(path)!r}"
    lines: dict[str, int] = {}
    for line, row in read_rows(path, (COLUMN,), where=where):
        lines.setdefault(row[COLUMN], line)
    splits = {name: split for name in SPLITS if (split := getattr(dataset, name)) is not None}
    _check_names(lines, splits, where)
    kept = {name: ~np.isin(split.names, list(lines)) for name, split in splits.items()}
    for name, rows in kept.items():
        if not rows.any():
            raise UserError(
                f"{where} leaves no image of {name} ({len(rows)} are listed); remove rows"
            )
    _log.info("%s: left out %s", where, _counted(kept))
    parts = [
        Part(split.images[rows], split.labels[rows], split.names[rows])
        for split, rows in zip(splits.values(), kept.values(), strict=True)
    ]
    return make_dataset(*parts)._replace(distractors=dataset.distractors)


def _check_names(lines: dict[str, int], splits: dict[str, Split], where: str) -> None:
    known = {str(name) for split in splits.values() for name in split.names}
    unknown = [name for name in lines if name not in known]
    if unknown:
        first = unknown[0]
        hint = nearest(first, known) if len(known) <= _COMPARED else ""
        cure = f"{hint} Correct the row" if hint.startswith("did you") else "remove the row"
        raise UserError(
            f"{where}, line {lines[first]}: the data set has no image {first!r} ({len(unknown)} of "
            f"{len(lines)} names are unknown); {cure}, or name the data set for which the list was "
            "made"
        )


_COMPARED = 10_000  # names that are compared with an unknown one; more would take seconds


def _counted(kept: dict[str, Bool[np.ndarray, " n"]]) -> str:
    return ", ".join(f"{int((~rows).sum())} of {len(rows)} of {n}" for n, rows in kept.items())

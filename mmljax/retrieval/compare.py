"""Paired differences of two runs' scores, query by query, with bootstrap intervals.

Both are directories of runs (or files in them) that were evaluated on the same queries. What is
shown is the mean difference over the queries, and an interval that it would stay in, were the test
items drawn again: the bootstrap over *items*. Items, not queries, are drawn with replacement, as
the queries of an item share their relevant gallery images and are found or missed together; drawn
one by one they would pass for more evidence than they are.

The interval says nothing of training: another seed may move a score by more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmljax.errors import UserError
from mmljax.retrieval.records import Records

_AT_ONCE = 1 << 22  # numbers of draws held at once


class Difference(NamedTuple):
    """Of two means over the same queries."""

    a: float
    b: float
    difference: float  # b - a
    low: float  # of the bootstrap interval
    high: float


Differences = dict[str, Difference]  # by the score's name


def paired_differences(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray, *, resamples: int, seed: int
) -> list[Difference]:
    """Mean of ``b - a`` per score with its 95 % percentile interval, by bootstrap of whole groups.

    Each resample draws as many groups as there are, with replacement, and takes the mean over the
    queries of the groups drawn (a group of more queries weighs more, as it does in the score). All
    scores are taken of the same draws.

    Args:
      a: ``[q scores]`` without NaN.
      b: the same of the same queries.
      groups: ``[q]``: what is drawn as one.
      resamples: how often to draw.
      seed: of the draws.

    Raises:
      UserError: with fewer than two groups, of which nothing can be told.
    """
    found, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    count = len(found)
    if count < 2:
        raise UserError(f"the queries show {count} item; an interval takes two at least")
    a, b = a.astype(np.float64), b.astype(np.float64)
    totals = np.zeros((count, a.shape[1]))
    np.add.at(totals, place, b - a)
    random = np.random.default_rng(seed)
    means = []
    for first in range(0, resamples, at_once := max(1, _AT_ONCE // count)):
        rows = min(at_once, resamples - first)
        draws = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count)
        means.append(times @ totals / (times @ sizes)[:, None])
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975), axis=0)
    columns = a.mean(axis=0), b.mean(axis=0), (b - a).mean(axis=0), low, high
    return [Difference(*map(float, row)) for row in zip(*columns, strict=True)]


def compare(a: Records, b: Records, *, resamples: int, seed: int) -> tuple[int, Differences]:
    """How many queries both count, and the difference of each score that both have, over these.

    Queries are matched by name. Recall in other orders of what is tied is left out.

    Raises:
      UserError: if they have no score or no query in common, or names that are not unique.
    """
    for records in (a, b):
        if len(np.unique(records.names)) < len(records.names):
            raise UserError("some queries have one name, so they cannot be matched; rename them")
    _, in_a, in_b = np.intersect1d(a.names, b.names, return_indices=True)
    keys = [key for key in a.values if key in b.values and not key.startswith("recall_")]
    if not keys or not len(in_a):
        raise UserError(f"{len(in_a)} queries and {len(keys)} scores in common: nothing to compare")
    x = np.stack([a.values[key][in_a] for key in keys], axis=1)
    y = np.stack([b.values[key][in_b] for key in keys], axis=1)
    counted = ~np.isnan(x + y).any(axis=1)
    groups = a.labels[in_a][counted]
    rows = paired_differences(x[counted], y[counted], groups, resamples=resamples, seed=seed)
    return int(counted.sum()), dict(zip(keys, rows, strict=True))

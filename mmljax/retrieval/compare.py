"""Paired comparison of two runs: score differences per query, with bootstrap intervals.

The interval says where the mean difference would lie if the test items were drawn again: a
bootstrap over *items*. Items, not queries, are drawn with replacement, because the queries of an
item share their relevant gallery images and are found or missed together; drawing single queries
would overstate the evidence.

The interval does not cover training: another seed may change a score by more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from mmljax.errors import UserError
from mmljax.retrieval.bootstrap import class_draws, percentile_interval
from mmljax.retrieval.records import Records


class Difference(NamedTuple):
    """Two means over the same queries, and the interval of their difference."""

    a: float
    b: float
    difference: float  # b - a
    low: float  # ends of the 95 % bootstrap interval
    high: float


Differences = dict[str, Difference]  # by the score's name


def paired_differences(
    a: Float[np.ndarray, "q scores"],
    b: Float[np.ndarray, "q scores"],
    groups: Shaped[np.ndarray, " q"],
    *,
    resamples: int,
    seed: int,
) -> list[Difference]:
    """Mean of ``b - a`` per score with its 95 % percentile interval, by bootstrap of whole groups.

    Each resample draws as many groups as there are, with replacement, and takes the mean over the
    queries of these groups (a group of more queries weighs more, as it does in the score). All
    scores use the same draws (:mod:`mmljax.retrieval.bootstrap`).

    >>> a, b = np.array([[0.0], [1.0]]), np.array([[1.0], [1.0]])
    >>> (row,) = paired_differences(a, b, np.array(["x", "y"]), resamples=100, seed=0)
    >>> row.difference, row.low, row.high
    (0.5, 0.0, 1.0)

    Args:
      a: scores without NaN.
      b: scores of the same queries by another run.
      groups: the group of each query; groups are drawn whole.
      resamples: number of draws.
      seed: of the draws.

    Raises:
      UserError: with fewer than two groups, which give no interval.
    """
    found, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    count = len(found)
    if count < 2:
        raise UserError(f"the queries show {count} item; an interval needs at least two")
    a, b = a.astype(np.float64), b.astype(np.float64)
    totals = np.zeros((count, a.shape[1]))
    np.add.at(totals, place, b - a)
    means = [
        times @ totals / (times @ sizes)[:, None]
        for times in class_draws(count, resamples=resamples, seed=seed)
    ]
    low, high = percentile_interval(np.concatenate(means))
    columns = a.mean(axis=0), b.mean(axis=0), (b - a).mean(axis=0), low, high
    return [Difference(*map(float, row)) for row in zip(*columns, strict=True)]


def compare(a: Records, b: Records, *, resamples: int, seed: int) -> tuple[int, Differences]:
    """The number of queries that both count, and the difference of each score over them.

    Queries are matched by name. Recall under other orders of ties is left out.

    Args:
      a: records of one run.
      b: records of another run.
      resamples: number of bootstrap draws.
      seed: of the draws.

    Returns:
      The count, and the differences by the score's name.

    Raises:
      UserError: if they have no score or no query in common, or names that are not unique.
    """
    for records in (a, b):
        if len(np.unique(records.names)) < len(records.names):
            raise UserError("several queries have the same name and cannot be matched; rename them")
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

"""Bootstrap over classes: resamples of whole classes, and intervals of rates.

Images of a class are alike and share their matches, so classes, not images or pairs, are drawn with
replacement. Source: Efron, Tibshirani, An Introduction to the Bootstrap (1993), sections 8.3 (what
is drawn must be independent) and 13.3 (percentile interval).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_AT_ONCE = 1 << 22  # numbers of draws held at once


class Estimate(NamedTuple):
    """A rate, and the ends of its 95 % percentile interval."""

    value: float
    low: float
    high: float


def class_draws(
    classes: int, *, resamples: int, seed: int
) -> Iterator[Int[np.ndarray, "draws classes"]]:
    """Yield how often each resample drew each class; all resamples, in blocks of bounded memory.

    >>> [draws.sum(axis=1).tolist() for draws in class_draws(3, resamples=2, seed=0)]
    [[3, 3]]

    Args:
      classes: number of classes; each resample draws as many, with replacement.
      resamples: number of resamples.
      seed: of the draws.
    """
    random = np.random.default_rng(seed)
    for first in range(0, resamples, at_once := max(1, _AT_ONCE // classes)):
        rows = min(at_once, resamples - first)
        draws = random.integers(0, classes, (rows, classes)) + classes * np.arange(rows)[:, None]
        yield np.bincount(draws.ravel(), minlength=rows * classes).reshape(rows, classes)


def percentile_interval(resampled: Float[np.ndarray, "..."]) -> np.ndarray:
    """Ends of the 95 % percentile interval of resampled values, ``[2 ...]``; NaN is left out.

    >>> percentile_interval(np.arange(101.0)).tolist()
    [2.5, 97.5]
    """
    return np.nanquantile(resampled, (0.025, 0.975), axis=0)

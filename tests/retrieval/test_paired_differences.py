"""Paired differences of two runs' records, against a slow bootstrap and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.retrieval.compare import compare, paired_differences
from mmljax.retrieval.records import Records


def records(values: list[float]) -> Records:
    names = np.array([f"image {i}" for i in range(len(values))])
    labels = np.array([0, 0, 0, 1, 1, 2][: len(values)])
    return Records({"crop": 28}, 7, names, labels, {"recall@1": np.array(values, np.float32)})


def test_difference_is_that_of_the_means_over_queries_that_both_count() -> None:
    a, b = records([1, 0, 0, 1, np.nan, 0]), records([1, 1, 0, 1, 0, 1])
    count, found = compare(a, b, resamples=200, seed=0)
    row = found["recall@1"]
    assert count == 5
    assert (row.a, row.b, row.difference) == pytest.approx((0.4, 0.8, 0.4))
    assert row.low <= row.difference <= row.high


def test_interval_equals_a_slow_bootstrap_over_items() -> None:
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(12), random.integers(1, 5, 12))
    a, b = random.random((2, len(groups), 1))
    (got,) = paired_differences(a, b, groups, resamples=4000, seed=1)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in random.integers(0, 12, 12)])
        means.append((b - a)[rows].mean())
    assert [got.low, got.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_runs_that_cannot_be_compared_are_refused() -> None:
    a = records([1, 0])
    options = {"resamples": 10, "seed": 0}
    with pytest.raises(UserError, match="nothing to compare"):
        compare(a, a._replace(names=np.array(["x", "y"])), **options)
    with pytest.raises(UserError, match="same name"):
        compare(a, a._replace(names=np.array(["x", "x"])), **options)
    with pytest.raises(UserError, match="1 item"):
        compare(a, a, **options)

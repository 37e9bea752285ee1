"""Paired differences of two runs' records, against a slow bootstrap and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from commands import run
from mmljax.errors import UserError
from mmljax.retrieval import compare
from mmljax.retrieval import records as protocol

STAMP = {"queries": 6, "crop": 28}


def records(values: list[float], *, stamp: dict | None = None) -> protocol.Records:
    names = np.array([f"image {i}" for i in range(len(values))])
    labels = np.array([0, 0, 0, 1, 1, 2][: len(values)])
    scores = {"recall@1": np.array(values, np.float32)}
    return protocol.Records(stamp or STAMP, 7, names, labels, scores)


def test_difference_is_that_of_the_means_over_queries_that_both_count() -> None:
    a, b = records([1, 0, 0, 1, np.nan, 0]), records([1, 1, 0, 1, 0, 1])
    count, found = compare.compare(a, b, resamples=200, seed=0)
    row = found["recall@1"]
    assert count == 5
    assert (row.a, row.b, row.difference) == pytest.approx((0.4, 0.8, 0.4))
    assert row.low <= row.difference <= row.high


def test_interval_equals_a_slow_bootstrap_over_items() -> None:
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(12), random.integers(1, 5, 12))
    a, b = random.random((2, len(groups), 1))
    (got,) = compare.paired_differences(a, b, groups, resamples=4000, seed=1)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in random.integers(0, 12, 12)])
        means.append((b - a)[rows].mean())
    assert [got.low, got.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_runs_of_other_protocols_are_refused_unless_forced(tmp_path, capsys) -> None:
    for name, stamp in (("a", STAMP), ("b", STAMP | {"crop": 32})):
        (tmp_path / name).mkdir()
        protocol.write_records(tmp_path / name, records([1, 0, 0, 1, 0, 0], stamp=stamp))
    paths = tmp_path / "a", tmp_path / "b"
    with pytest.raises(UserError, match="crop: 28"):
        run("compare", *paths)
    run("compare", *paths, "--force")
    shown = capsys.readouterr()
    assert "crop" in shown.err
    assert "+0.00 to +0.00" in shown.out


def test_what_has_no_query_in_common_is_refused() -> None:
    other = records([1, 0])._replace(names=np.array(["x", "y"]))
    with pytest.raises(UserError, match="nothing to compare"):
        compare.compare(records([1, 0]), other, resamples=10, seed=0)


@pytest.mark.parametrize("kept", [True, False])
def test_records_are_read_as_they_were_written(tmp_path, kept) -> None:
    written = records([1, 0, np.nan])
    if kept:
        found = protocol.Neighbors(
            np.array([[1, 0], [0, 1], [1, 0]], np.int32),
            np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], np.float32),
            np.array(["x", "y"]),
            np.array([4, 5]),
        )
        written = written._replace(neighbors=found)
    read = protocol.read_records(protocol.write_records(tmp_path, written))
    assert (read.protocol, read.step) == (written.protocol, written.step)
    np.testing.assert_array_equal(read.names, written.names)
    np.testing.assert_array_equal(read.values["recall@1"], written.values["recall@1"])
    assert (read.neighbors is not None) is kept
    for a, b in zip(read.neighbors or (), written.neighbors or (), strict=True):
        np.testing.assert_array_equal(a, b)

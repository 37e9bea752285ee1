"""Density and spectral decay against loops over pairs, an SVD and their limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmljax.retrieval import diagnostics


def slow_density(x: np.ndarray, labels: np.ndarray) -> float:
    within, means = [], {}
    for label in set(labels.tolist()):
        rows = x[labels == label]
        means[label] = rows.sum(axis=0) / len(rows)
        within += [np.linalg.norm(a - b) for a, b in itertools.combinations(rows, 2)]
    between = [np.linalg.norm(a - b) for a, b in itertools.combinations(means.values(), 2)]
    return float(np.mean(within) / np.mean(between))


def test_density_equals_the_loop_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "_BLOCK", 7)
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(9), random.integers(1, 20, 9)))
    x = (random.normal(size=(9, 6))[labels] + random.normal(size=(len(labels), 6))).astype("f4")
    assert diagnostics.embedding_density(x, labels) == pytest.approx(
        slow_density(x.astype(np.float64), labels), rel=1e-9
    )


def test_density_of_classes_that_are_points_or_alone() -> None:
    labels = np.array([0, 0, 1, 1])
    assert diagnostics.embedding_density(np.eye(2)[labels], labels) == 0
    assert np.isnan(diagnostics.embedding_density(np.eye(4), np.arange(4)))  # no pair within
    assert np.isnan(diagnostics.embedding_density(np.eye(4), np.zeros(4, int)))  # one class
    assert np.isnan(diagnostics.embedding_density(np.ones((4, 2)), labels))  # one point


def test_spectral_decay_equals_that_of_the_singular_values() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 12)) * np.geomspace(1, 0.01, 12)
    s = np.linalg.svd(x, compute_uv=False)
    uniform = np.full(12, 1 / 12)
    expected = np.sum(uniform * np.log(uniform / (s / s.sum())))
    assert diagnostics.spectral_decay(x) == pytest.approx(expected, rel=1e-6)
    assert 0.5 < expected < 2


def test_spectral_decay_grows_as_directions_vanish() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(5000, 8))
    values = [diagnostics.spectral_decay(x * 10.0 ** (-p * np.arange(8))) for p in (0, 0.2, 0.5)]
    assert values == sorted(values)
    assert values[0] < 0.01
    collapsed = diagnostics.spectral_decay(np.ones((20, 8)))
    assert values[-1] < collapsed < np.log(2**24)
    assert np.isnan(diagnostics.spectral_decay(np.zeros((3, 2))))

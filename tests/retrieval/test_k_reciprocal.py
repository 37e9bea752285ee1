"""k-reciprocal re-ranking against a dense reference in float64, written with Python's sets."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.retrieval import k_reciprocal
from mmljax.retrieval.k_reciprocal import k_reciprocal_neighbors
from mmljax.retrieval.search import nearest_neighbors


def vectors(seed: int, rows: int, *, size: int = 8) -> np.ndarray:
    """Clusters; in steps of 1/1024, so that float32 similarities are exact, some of them equal."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows // 5, size))[np.arange(rows) % (rows // 5)]
    x = x + 0.7 * random.normal(size=(rows, size))
    x = np.round(1024 * x / np.linalg.norm(x, axis=1, keepdims=True)) / 1024
    x[rows // 2] = x[3]  # a duplicate
    return x.astype(np.float32)


def dense(
    queries: np.ndarray, gallery: np.ndarray, *, k1: int, k2: int, weight: float, own: bool
) -> np.ndarray:
    """``(1 - w) J + w s`` of every query and gallery row, by the paper's steps; n by n matrices."""
    union = (gallery if own else np.concatenate([queries, gallery])).astype(np.float64)
    similarity = union @ union.T
    count = len(union)
    ranking = []
    for u in range(count):
        others = sorted((-similarity[u, v], v) for v in range(count) if v != u)
        ranking.append([u, *(v for _, v in others)])

    def reciprocal(u: int, k: int) -> set[int]:
        return {v for v in ranking[u][: k + 1] if u in ranking[v][: k + 1]}

    half = math.floor(k1 / 2 + 0.5)
    halves = [reciprocal(u, half) for u in range(count)]
    encodings = np.zeros((count, count))
    for u in range(count):
        core = reciprocal(u, k1)
        members = set(core)
        for v in core:
            if len(halves[v] & core) >= 2 / 3 * len(halves[v]) - 1e-9:
                members |= halves[v]
        for v in members:
            encodings[u, v] = np.exp(-(1 - similarity[u, v]))
        encodings[u] /= encodings[u].sum()
    encodings = np.array([encodings[ranking[u][:k2]].mean(axis=0) for u in range(count)])
    first = 0 if own else len(queries)
    result = np.empty((len(queries), len(gallery)))
    for q in range(len(queries)):
        for g in range(len(gallery)):
            a, b = encodings[q], encodings[first + g]
            jaccard = np.minimum(a, b).sum() / np.maximum(a, b).sum()
            result[q, g] = (1 - weight) * jaccard + weight * similarity[q, first + g]
    return result


def check(rows: int, queries: int, *, own: bool, k1: int, k2: int, weight: float) -> None:
    x = vectors(rows, rows)
    gallery = x if own else x[queries:]
    mine = None if own else len(gallery)
    asked = x[:queries]
    reference = dense(asked, gallery, k1=k1, k2=k2, weight=weight, own=own)
    found = k_reciprocal_neighbors(
        asked,
        gallery,
        k=mine or rows - 1,
        candidates=mine or rows - 1,
        k1=k1,
        k2=k2,
        original_weight=weight,
        chunk=64,
        mesh=make_mesh(jax.devices()[:2]),
        self_index=np.arange(queries) if own else None,
    )
    for q in range(queries):
        expected = sorted(
            (g for g in range(len(gallery)) if not (own and g == q)),
            key=lambda g: (-np.float32(reference[q, g]), g),
        )
        values = reference[q, found.indices[q]]
        np.testing.assert_allclose(found.similarity[q], values, atol=1e-6)
        np.testing.assert_allclose(values, reference[q, expected], atol=2e-6)  # in the same order
        assert sorted(found.indices[q]) == sorted(expected)
        assert found.indices[q, 0] == expected[0] or abs(values[0] - values[1]) < 2e-6


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(7, 3, 0.3), (4, 1, 0.0), (1, 6, 0.5), (20, 6, 0.3)]
)
def test_all_candidates_equal_the_dense_reference(
    own: bool, k1: int, k2: int, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_ROWS", 7), ("_QUERIES", 16), ("_COMPARED", 500)):
        monkeypatch.setattr(k_reciprocal, name, value)  # several blocks, the last one shorter
    check(60, 20, own=own, k1=k1, k2=k2, weight=weight)


@pytest.mark.slow
def test_two_thousand_rows_equal_the_dense_reference() -> None:
    check(2000, 100, own=False, k1=20, k2=6, weight=0.3)


def test_only_candidates_are_ordered_anew() -> None:
    x = vectors(1, 60)
    options = {"k1": 8, "k2": 3, "original_weight": 0.0}
    everything = k_reciprocal_neighbors(x[:9], x[9:], k=51, candidates=51, **options)
    found = k_reciprocal_neighbors(x[:9], x[9:], k=4, candidates=12, **options)
    nearest = np.asarray(nearest_neighbors(x[:9], x[9:], k=12).indices)
    changed = 0
    for row in range(9):
        kept = [i for i in everything.indices[row] if i in nearest[row]]
        np.testing.assert_array_equal(found.indices[row], kept[:4])
        changed += list(nearest[row, :4]) != kept[:4]
    assert changed > 3


def test_numbers_that_do_not_fit_are_refused() -> None:
    x = vectors(1, 20)
    with pytest.raises(UserError, match="k=9 neighbours asked of 8 candidates; lower k"):
        k_reciprocal_neighbors(x, x, k=9, candidates=8, k1=3, k2=2)
    for k1, k2 in ((40, 2), (3, 41), (0, 2), (3, 0)):
        with pytest.raises(UserError, match=rf"k1={k1} and k2={k2} must be .* the 40 images"):
            k_reciprocal_neighbors(x, x, k=2, candidates=8, k1=k1, k2=k2)

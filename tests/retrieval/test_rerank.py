"""Query expansion and database augmentation against loops in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.retrieval.rerank import database_augmentation, query_expansion


def unit(seed: int, rows: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, 6)) + 0.3
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def averaged(
    queries: np.ndarray, gallery: np.ndarray, k: int, alpha: float, own: bool
) -> np.ndarray:
    rows = []
    for i, query in enumerate(queries.astype(np.float64)):
        others = [
            (-float(query @ x.astype(np.float64)), j)
            for j, x in enumerate(gallery)
            if not (own and i == j)
        ]
        total = query.copy()
        for minus, j in sorted(others)[:k]:
            total += max(-minus, 0.0) ** alpha * gallery[j].astype(np.float64)
        rows.append(total / np.sqrt(total @ total))
    return np.array(rows)


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (4, 3.0), (29, 0.5), (5, 0.0)])
def test_expansion_and_augmentation_equal_a_loop(k: int, alpha: float) -> None:
    queries, gallery = unit(0, 13), unit(1, 30)
    mesh = make_mesh(jax.devices()[:2])
    options = {"k": k, "alpha": alpha, "chunk": 8, "mesh": mesh}
    found = query_expansion(queries, gallery, **options)
    expected = averaged(queries, gallery, k, alpha, own=False)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    found = query_expansion(gallery[:13], gallery, self_index=np.arange(13), **options)
    expected = averaged(gallery[:13], gallery, k, alpha, own=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    expected = averaged(gallery, gallery, k, alpha, own=True)
    np.testing.assert_allclose(database_augmentation(gallery, **options), expected, atol=2e-6)


def test_a_negative_similarity_weighs_nothing() -> None:
    x = np.array([[1, 0], [0.6, 0.8], [-0.8, 0.6]], np.float32)
    found = query_expansion(x[:1], x[1:], k=2, alpha=0.5)
    np.testing.assert_allclose(found, query_expansion(x[:1], x[1:], k=1, alpha=0.5), atol=1e-6)


def test_more_neighbours_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="k=3 neighbours asked of a gallery of 2 rows besides each"):
        database_augmentation(unit(0, 3), k=3, alpha=1.0)

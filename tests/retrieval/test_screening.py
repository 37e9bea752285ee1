"""The bfloat16 screen: its bound holds and is near, and results are exact with and without it."""

from __future__ import annotations

import doctest

import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.retrieval import screening
from mmljax.retrieval import search as retrieval
from searches import DATA, SEARCHES, make, stable_argsort


def test_doctest() -> None:
    assert doctest.testmod(screening).failed == 0


@pytest.mark.parametrize("name", SEARCHES)
def test_screened_neighbors_equal_a_stable_argsort(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "QUERY_BLOCK", 64)
    case = SEARCHES[name]
    for seed, kind in enumerate(DATA):
        queries, gallery, own = make(case, kind, seed)
        expected = stable_argsort(queries, gallery, own, case.k)
        found = screening.screened_nearest_neighbors(
            queries, gallery, k=case.k, chunk=case.chunk, candidates=case.k + 4, self_index=own
        )
        np.testing.assert_array_equal(found.indices, expected[1], kind)
        np.testing.assert_array_equal(found.similarity, expected[0], kind)
        if kind == "collapsed" and case.k + 4 < case.gallery - case.self_retrieval:
            assert not found.proven.any()  # whatever is left out is as good


def unit_vectors(rows: int, size: int, *, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("candidates", [None, 12])
def test_screened_search_is_the_plain_one_bit_for_bit(
    candidates: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "QUERY_BLOCK", 64)
    gallery = unit_vectors(3000, 384)
    gallery[700:900] = gallery[:200]
    queries, own = gallery[:300], np.arange(300)
    plain = retrieval.nearest_neighbors(queries, gallery, k=8, chunk=1024, self_index=own)
    found = screening.screened_nearest_neighbors(
        queries, gallery, k=8, chunk=1024, candidates=candidates, self_index=own
    )
    np.testing.assert_array_equal(found.indices, plain.indices)
    np.testing.assert_array_equal(found.similarity, plain.similarity)
    proven = np.mean(found.proven)
    assert proven == 1 if candidates is None else 0 < proven < 1


def test_proven_lists_owe_nothing_to_the_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way back to float32 made useless, what is proven is right, and what is not shows."""
    monkeypatch.setattr(screening, "QUERY_BLOCK", 64)
    ordinary = screening.search_chunks

    def only_rough(*arguments: object, **options: object) -> object:
        found = ordinary(*arguments, **options)
        return found if "score" in options else found._replace(indices=found.indices * 0 - 1)

    monkeypatch.setattr(screening, "search_chunks", only_rough)
    gallery = unit_vectors(2500, 96, seed=1)
    queries = unit_vectors(300, 96, seed=2)  # and padding in the last block
    gallery[100:140] = queries[70] + 1e-5 * unit_vectors(40, 96, seed=3)  # one block in doubt
    plain = retrieval.nearest_neighbors(queries, gallery, k=4, chunk=4096)
    found = screening.screened_nearest_neighbors(queries, gallery, k=4, chunk=4096, candidates=8)
    screened = np.asarray(found.indices)[:, 0] >= 0
    assert 0 < screened.sum() < 300
    np.testing.assert_array_equal(found.indices[screened], plain.indices[screened])
    assert not found.proven[70]
    blocks = np.logical_and.reduceat(np.asarray(found.proven), np.arange(0, 300, 64))
    np.testing.assert_array_equal(screened, np.repeat(blocks, 64)[:300])


def test_rows_that_bfloat16_cannot_tell_apart_are_in_the_right_order() -> None:
    """The last row is the best by less than bfloat16 sees, so the rough order is the opposite."""
    gallery = np.ones((400, 64), np.float32)
    gallery[:, 0] += np.arange(400, dtype=np.float32) * 2.0**-17
    queries = np.ones((2, 64), np.float32)
    found = screening.screened_nearest_neighbors(queries, gallery, k=3, chunk=512)
    assert found.indices.tolist() == [[399, 398, 397]] * 2
    assert not found.proven.any()


def errors(queries: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest true error of the rough products per query, and what it is said to be at most."""
    rounded = [screening._to_bfloat16(jnp.asarray(x)) for x in (queries, gallery)]
    rough = screening._bfloat16_products(*(x.astype(jnp.bfloat16) for x in rounded))
    exact = queries.astype(np.float64) @ gallery.astype(np.float64).T
    norms = [
        jnp.max(jnp.linalg.norm(x, axis=1)) for x in (gallery, rounded[1], gallery - rounded[1])
    ]
    bound = screening._error(jnp.asarray(queries), rounded[0], *norms)
    return np.max(np.abs(np.asarray(rough, np.float64) - exact), axis=1), np.asarray(bound)


@pytest.mark.parametrize("size", [1, 7, 512])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_bound_holds_of_random_vectors(size: int, scale: float) -> None:
    random = np.random.default_rng(size)
    for shift in (0.0, 3.0):
        x, y = (random.normal(shift, 1, (200, size)).astype(np.float32) for _ in range(2))
        found, bound = errors(x * scale, y)
        assert np.all(found <= bound)
        assert np.all(bound < 0.05 * scale * np.linalg.norm(x, axis=1) * 10 * np.sqrt(size))


def test_the_bound_is_met_by_the_worst_of_roundings() -> None:
    """All entries just below half of bfloat16's step, and rounded down: nothing is cancelled."""
    worst = np.full((1, 256), 1 + 2.0**-8 * 0.999, np.float32)
    found, bound = errors(worst, worst)
    assert 0.97 * bound[0] < found[0] <= bound[0]


def test_the_rounding_is_not_left_out_by_the_compiler() -> None:
    """If it were, the differences would be 0 and the bound worthless."""
    x = jnp.asarray(unit_vectors(50, 64))
    rounded = screening._to_bfloat16(x)
    np.testing.assert_array_equal(rounded, np.asarray(x.astype(jnp.bfloat16), np.float32))
    found = screening.jax.jit(lambda x: x - screening._to_bfloat16(x))(x)
    np.testing.assert_array_equal(found, x - rounded)
    assert np.mean(np.asarray(found) != 0) > 0.9


def test_what_is_not_finite_in_bfloat16_is_searched_without() -> None:
    gallery = np.eye(80, dtype=np.float32)
    gallery[3, 3] = np.finfo(np.float32).max  # infinite once it is rounded
    found = screening.screened_nearest_neighbors(
        gallery[:8] * 0.5, gallery, k=1, chunk=128, candidates=4
    )
    assert found.indices[:, 0].tolist() == list(range(8))
    assert not found.proven.any()


def test_more_neighbours_than_the_gallery_holds_is_an_error() -> None:
    x = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match=r"k=4 .* 3 rows"):
        screening.screened_nearest_neighbors(x, x, k=4, chunk=8)
    with pytest.raises(UserError, match=r"k=3 .* 2 rows besides each query itself"):
        screening.screened_nearest_neighbors(x, x, k=3, chunk=8, self_index=np.arange(3))

"""10,000 random galleries against a sort in float64; equal similarities by rising gallery index.

Shapes come from a short list, so few programs are compiled; the galleries differ in their values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from mmljax import nearest_neighbors
from mmljax.errors import UserError
from mmljax.retrieval.quantization import quantize
from mmljax.retrieval.rescoring import rescored_nearest_neighbors
from mmljax.retrieval.streaming import streamed_nearest_neighbors
from searches import Case, stable_argsort

SIZE = 8
GALLERIES = 10_000
SMALL = 1_000  # of the searches that make several calls each


class Drawn(NamedTuple):
    queries: np.ndarray
    gallery: np.ndarray
    own: np.ndarray | None


CASES = (
    Case(1, 1, SIZE, 1, 512, False),
    Case(9, 1, SIZE, 1, 512, False),  # more queries than rows
    Case(2, 2, SIZE, 1, 512, True),
    Case(40, 7, SIZE, 7, 512, False),  # all rows are neighbours
    Case(9, 40, SIZE, 39, 512, True),
    Case(3, 128, SIZE, 128, 512, False),
    Case(5, 129, SIZE, 5, 128, False),  # two chunks
    Case(4, 300, SIZE, 3, 128, True),
    Case(33, 520, SIZE, 6, 512, True),  # two chunks of unequal size
    Case(2, 700, SIZE, 2, 1024, False),  # in groups of columns
)


def integers(random: np.random.Generator, case: Case, kind: str) -> Drawn:
    """Embeddings whose float32 products are exact: integers, times powers of two."""
    shape = case.gallery, SIZE
    if kind == "near ties":  # of one part in 2**23: the last bit of float32
        gallery = np.full(shape, 1000) + random.integers(-1, 2, shape)
        queries = np.full((case.queries, SIZE), 1000)
        queries[:, 0] = 1 + 2 * random.integers(0, 2, case.queries)
    else:
        span = int(random.choice([1, 2, 40]))
        gallery = random.integers(-span, span + 1, shape)
        queries = random.integers(-span, span + 1, (case.queries, SIZE))
    if kind == "duplicates":
        gallery = gallery[random.integers(0, 1 + case.gallery // 3, case.gallery)]
    elif kind == "zeros":
        gallery[random.random(case.gallery) < 0.5] = 0
        queries[random.random(case.queries) < 0.3] = 0
    elif kind == "negative":  # padding, of similarity 0, would come first
        queries, gallery = abs(queries) + 1, -abs(gallery) - 1
    scale = 2.0 ** random.integers(-9, 10, (case.gallery, 1)) if kind == "scaled" else 1
    own = random.integers(0, case.gallery, case.queries) if case.self_retrieval else None
    gallery = (gallery * scale).astype(np.float32)
    queries = queries.astype(np.float32) if own is None or kind == "negative" else gallery[own]
    return Drawn(queries, gallery, own)


KINDS = ("plain", "near ties", "duplicates", "zeros", "negative", "scaled")


def unit_pool(random: np.random.Generator) -> np.ndarray:
    """Vectors of sixteenths, of a squared length within 0.02 of 1: their products are exact."""
    x = random.normal(size=(4000, SIZE))
    x = np.rint(16 * x / np.linalg.norm(x, axis=1, keepdims=True)) / 16
    return x[abs((x * x).sum(axis=1) - 1) < 0.02].astype(np.float32)


def unit(random: np.random.Generator, case: Case, pool: np.ndarray) -> Drawn:
    """A few vectors often, or many once."""
    few = pool[random.choice(len(pool), int(random.choice([1, 5, 1000])), replace=False)]
    gallery = few[random.integers(0, len(few), case.gallery)]
    own = random.integers(0, case.gallery, case.queries) if case.self_retrieval else None
    queries = few[random.integers(0, len(few), case.queries)] if own is None else gallery[own]
    return Drawn(queries, gallery, own)


def assert_equal(found: Any, expected: tuple[np.ndarray, np.ndarray], context: object) -> None:
    similarity, indices = map(np.asarray, found)
    same = np.array_equal(indices, expected[1]) and np.array_equal(similarity, expected[0])
    if not same:  # assert_array_equal alone takes longer than the search
        np.testing.assert_array_equal(indices, expected[1], str(context))
        np.testing.assert_array_equal(similarity, expected[0], str(context))


@pytest.mark.slow
def test_ten_thousand_galleries_equal_a_sort_in_float64() -> None:
    tied = 0
    for seed in range(GALLERIES):
        case, kind = CASES[seed % len(CASES)], KINDS[seed // len(CASES) % len(KINDS)]
        queries, gallery, own = integers(np.random.default_rng(seed), case, kind)
        expected = stable_argsort(queries, gallery, own, case.k)
        tied += bool((np.diff(expected[0], axis=1) == 0).any())
        options: Any = {"k": case.k, "chunk": case.chunk, "self_index": own}
        assert_equal(nearest_neighbors(queries, gallery, **options), expected, (seed, case, kind))
        if seed < SMALL:
            found = streamed_nearest_neighbors(queries, gallery, **options)
            assert_equal(found, expected, (seed, case, kind, "streamed"))
    assert tied > GALLERIES / 3


@pytest.mark.slow
def test_rescored_codes_equal_a_sort_in_float64_where_it_is_proved() -> None:
    pool = unit_pool(np.random.default_rng(0))
    counts = np.zeros((2, 2), int)  # queries that are not proved and proved, wrong and right
    for seed in range(SMALL):
        random, case = np.random.default_rng(seed), CASES[seed % len(CASES)]
        queries, gallery, own = unit(random, case, pool)
        expected = stable_argsort(queries, gallery, own, case.k)
        candidates = min(case.gallery - (own is not None), (2, 8)[seed // len(CASES) % 2] * case.k)
        found, certain = rescored_nearest_neighbors(
            queries,
            quantize(gallery, dtype=("int8", "int8", "binary")[seed // len(CASES) % 3]),
            gallery,
            k=case.k,
            candidates=candidates,
            chunk=case.chunk,
            self_index=own,
        )
        right = (np.asarray(found.indices) == expected[1]).all(axis=1)
        right &= (np.asarray(found.similarity) == expected[0]).all(axis=1)
        assert right[certain].all(), (seed, case)
        np.add.at(counts, (certain.astype(int), right.astype(int)), 1)
    assert counts[0, 0] > 0  # the search of codes alone does miss neighbours
    assert counts[1, 1] > counts.sum() / 3


@pytest.mark.slow
def test_real_valued_galleries_equal_a_sort_in_float64_to_rounding() -> None:
    """Rows more alike than float32 can tell may change places, copies of one row may not.

    The tolerance is the rounding of a float32 product of unit vectors, (d + 2) 2^-24
    (Higham 2002, section 3.1), on both sides of a comparison.
    """
    rounding = 2 * (SIZE + 2) * 2.0**-24
    changed = 0
    for seed in range(SMALL):
        random, case = np.random.default_rng(seed), CASES[seed % len(CASES)]
        few = random.normal(size=(1 + case.gallery // 2, SIZE))
        few[len(few) // 2 :] = few[0] + 1e-7 * random.normal(size=few[len(few) // 2 :].shape)
        few = (few / np.linalg.norm(few, axis=1, keepdims=True)).astype(np.float32)
        place = random.integers(0, len(few), case.gallery)
        gallery = few[place]
        own = random.permutation(np.resize(np.arange(case.gallery), case.queries))
        own = own if case.self_retrieval else None
        queries = few[random.integers(0, len(few), case.queries)] if own is None else gallery[own]
        found = nearest_neighbors(queries, gallery, k=case.k, chunk=case.chunk, self_index=own)
        similarity, indices = map(np.asarray, found)
        expected = stable_argsort(queries, gallery, own, case.k)
        exact = queries.astype(np.float64) @ gallery.astype(np.float64).T
        exact = np.take_along_axis(exact, indices, axis=1)
        np.testing.assert_allclose(similarity, exact, atol=rounding, rtol=0)
        np.testing.assert_allclose(similarity, expected[0], atol=rounding, rtol=0)
        tied = np.diff(similarity, axis=1) == 0
        assert (np.diff(indices, axis=1)[tied] > 0).all(), seed
        copies = place[indices]
        tied = copies[:, 1:] == copies[:, :-1]
        assert (np.diff(indices, axis=1)[tied] > 0).all(), seed
        changed += (indices != expected[1]).any()
    assert changed > 0


def test_no_rows_are_refused() -> None:
    rows, none = np.eye(2, SIZE, dtype=np.float32), np.zeros((0, SIZE), np.float32)
    for search in (nearest_neighbors, streamed_nearest_neighbors):
        with pytest.raises(UserError, match="k=1 neighbours asked of a gallery of 0 rows"):
            search(rows, none, k=1)
        with pytest.raises(UserError, match="0 rows besides each query itself"):
            search(rows[:1], rows[:1], k=1, self_index=np.zeros(1, np.int32))
        with pytest.raises(UserError, match="no query"):
            search(none, rows, k=1)
    with pytest.raises(UserError, match="k=1 neighbours asked of a gallery of 0 rows"):
        rescored_nearest_neighbors(
            rows, quantize(none, dtype="int8"), none, k=1, candidates=1, chunk=128
        )

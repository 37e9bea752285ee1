"""Codes of embeddings against loops in float64; their search, rescoring and proof of exactness."""

from __future__ import annotations

import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.retrieval import search as retrieval
from mmljax.retrieval.quantization import Codes, decode, quantize
from mmljax.retrieval.rescoring import proved, rescore, rescored_nearest_neighbors
from mmljax.retrieval.streaming import streamed_nearest_neighbors
from mmljax.retrieval.top_k import Neighbors

SIZE = 50  # no multiple of 8


def unit_vectors(rows: int, seed: int, size: int = SIZE) -> np.ndarray:
    """Noisy copies of a few centres."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(12, size))
    x = centers[random.integers(0, 12, rows)] + 0.6 * random.normal(size=(rows, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def slow_decode(codes: Codes) -> np.ndarray:
    decoded = np.zeros(codes.shape)
    for row, (values, scale) in enumerate(zip(codes.values, codes.scale, strict=True)):
        for column in range(codes.size):
            if codes.values.dtype == np.int8:
                number = int(values[column])
            else:
                number = 1 if int(values[column // 8]) >> (7 - column % 8) & 1 else -1
            decoded[row, column] = number * float(scale)
    return decoded


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_codes_are_near_their_vectors_and_say_how_near(dtype: str) -> None:
    x = unit_vectors(7, 0)
    x[2] = 0
    x[3] = np.eye(SIZE)[4]
    x[4] *= 1e-42  # its scale is subnormal
    codes = quantize(x, dtype=dtype)
    assert codes.values.shape == ((7, SIZE) if dtype == "int8" else (7, 7))
    slow = slow_decode(codes)
    decoded = np.asarray(decode(codes.values, codes.scale, size=SIZE))
    normal = np.arange(7) != 4  # XLA takes subnormal numbers for 0
    np.testing.assert_allclose(decoded[normal], slow[normal], rtol=1e-6)
    distance = np.linalg.norm(x - slow, axis=1)
    assert (codes.error >= distance).all()
    np.testing.assert_allclose(codes.error, distance, rtol=1e-6, atol=1e-44)
    if dtype == "int8":
        assert (abs(x - slow)[normal].max(axis=1) <= 0.501 * codes.scale[normal]).all()
        assert abs(codes.values).max() == 127
    else:  # no other scale is nearer
        for factor in (0.99, 1.01):
            other = np.linalg.norm(x - factor * slow, axis=1)
            assert (other[normal] >= distance[normal]).all()


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_a_search_of_codes_is_that_of_the_decoded_rows(dtype: str) -> None:
    queries, gallery = unit_vectors(37, 1), unit_vectors(700, 2)
    codes = quantize(gallery, dtype=dtype)
    decoded = decode(codes.values, codes.scale, size=SIZE)
    expected = retrieval.nearest_neighbors(queries, decoded, k=9, chunk=256)
    found = streamed_nearest_neighbors(queries, codes, k=9, chunk=256)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.similarity, expected.similarity)


def test_rescored_is_the_float32_search_bit_for_bit_where_it_is_proved() -> None:
    queries, gallery = unit_vectors(70, 1), unit_vectors(1501, 2)
    gallery[700:900] = gallery[:200]  # ties far apart
    queries[:5] = gallery[:5]
    expected = retrieval.nearest_neighbors(queries, gallery, k=7, chunk=640)
    shares = []
    for dtype, candidates in (("int8", 10), ("int8", 60), ("binary", 60)):
        codes = quantize(gallery, dtype=dtype)
        found, certain = rescored_nearest_neighbors(
            queries, codes, gallery, k=7, candidates=candidates, chunk=640
        )
        same = (np.asarray(found.indices) == expected.indices).all(axis=1)
        equal = (np.asarray(found.similarity) == expected.similarity).all(axis=1)
        assert (same & equal)[certain].all(), (dtype, candidates)
        assert (np.diff(found.similarity, axis=1) <= 0).all()
        shares.append((same.mean(), certain.mean()))
    int8_few, int8_many, binary = shares
    assert int8_few[0] > 0.9
    assert 0.1 < int8_few[1] < 0.9
    assert int8_many == (1, 1)
    assert 0.3 < binary[0] < 1
    assert binary[1] == 0


def test_the_proof_is_refused_within_the_error_of_a_code() -> None:
    """The row that is lost has exactly the error that the bound allows for."""
    query = np.eye(1, 8, dtype=np.float32)
    for error, gap in ((0.1, 0.101), (0.1, 0.099), (0.0, 1e-7), (0.0, 1e-4)):
        found = Neighbors(np.float32([[0.9, 0.8 - gap]]), np.int32([[3, 5]]))
        best = Neighbors(np.float32([[0.8]]), np.int32([[3]]))
        assert proved(query, found, best, error=error).tolist() == [gap > error + 1e-5]
    long = proved(1.5 * query, found._replace(similarity=[[0.9, 0.66]]), best, error=0.1)
    assert long.tolist() == [False]


def test_equal_similarities_are_rescored_in_the_order_of_the_gallery() -> None:
    gallery = np.tile(np.eye(1, 8, dtype=np.float32), (40, 1))
    found = Neighbors(np.zeros((1, 4), np.float32), np.int32([[30, 2, 17, 9]]))
    best = rescore(gallery[:1], gallery, found, k=3)
    assert np.asarray(best.indices).tolist() == [[2, 9, 17]]


def test_codes_that_cannot_be_used_are_refused() -> None:
    good = quantize(unit_vectors(6, 0), dtype="int8")
    for name, value in (("scale", np.nan), ("error", -1.0)):
        numbers = getattr(good, name).copy()
        numbers[4] = value
        changed = {"scale": good.scale, "error": good.error, name: numbers}
        with pytest.raises(UserError, match=f"the {name} of 1 of 6 .* row 4.*embed the images"):
            Codes(good.values, size=SIZE, **changed)
    with pytest.raises(UserError, match=r"values \[n 51\]"):
        Codes(good.values, good.scale, good.error, 51)
    with pytest.raises(UserError, match="embedding size: 49 and 50"):
        streamed_nearest_neighbors(unit_vectors(2, 0, size=49), good, k=1)
    gallery = 2 * unit_vectors(6, 0)
    with pytest.raises(UserError, match="candidates' embeddings are not of unit length"):
        rescored_nearest_neighbors(gallery / 2, good, gallery, k=1, candidates=2, chunk=128)

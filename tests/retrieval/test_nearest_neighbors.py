"""Search and ranks against a stable argsort and loops in float64, on exact products with ties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.numerics import l2_normalize, masked_mean
from mmljax.retrieval import metrics
from mmljax.retrieval import search as retrieval
from mmljax.retrieval.streaming import streamed_nearest_neighbors
from searches import DATA, SEARCHES, Case, make, mesh_of, real_valued, stable_argsort


@pytest.mark.parametrize("name", SEARCHES)
def test_nearest_neighbors_equal_a_stable_argsort(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 64)
    case = SEARCHES[name]
    options = {"k": case.k, "chunk": case.chunk}
    for seed, kind in enumerate(DATA):
        queries, gallery, own = make(case, kind, seed)
        expected = stable_argsort(queries, gallery, own, case.k)
        for devices in (0, 1, 2, 8):
            if devices:
                found = retrieval.sharded_nearest_neighbors(
                    queries, gallery, self_index=own, mesh=mesh_of(devices), **options
                )
            else:
                found = retrieval.nearest_neighbors(queries, gallery, self_index=own, **options)
            context = f"{kind} on {devices} devices"
            np.testing.assert_array_equal(found.indices, expected[1], context)
            np.testing.assert_array_equal(found.similarity, expected[0], context)


def test_a_tie_goes_to_the_lower_index_also_from_a_group_of_a_higher_maximum() -> None:
    gallery = np.zeros((600, 1), np.float32)
    gallery[3], gallery[161], gallery[165] = 2, 3, 2
    found = retrieval.nearest_neighbors(np.ones((1, 1), np.float32), gallery, k=2, chunk=600)
    assert found.indices.tolist() == [[161, 3]]


def test_neither_the_query_itself_nor_padding_is_found() -> None:
    gallery = np.full((600, 1), -5, np.float32)  # padding to 640 rows has similarity 0
    gallery[0], gallery[100], gallery[200] = 1, -1, -2
    found = retrieval.nearest_neighbors(
        np.ones((1, 1), np.float32), gallery, k=2, chunk=600, self_index=np.array([0])
    )
    assert found.indices.tolist() == [[100, 200]]


def test_sharded_search_is_the_plain_one_bit_for_bit() -> None:
    queries, gallery = real_valued()
    plain = retrieval.nearest_neighbors(queries, gallery, k=7, chunk=640)
    assert len(np.unique(plain.similarity)) > 300
    for devices in (3, 8):
        sharded = retrieval.sharded_nearest_neighbors(
            queries, gallery, k=7, chunk=640, mesh=mesh_of(devices)
        )
        np.testing.assert_array_equal(sharded.similarity, plain.similarity)
        np.testing.assert_array_equal(sharded.indices, plain.indices)


def test_similarities_are_float32_also_of_bfloat16_embeddings() -> None:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(40, 64)), jnp.bfloat16)
    found = retrieval.nearest_neighbors(x[:4], x, k=3, chunk=40)
    expected, _ = stable_argsort(np.asarray(x[:4], np.float32), np.asarray(x, np.float32), None, 3)
    assert found.similarity.dtype == jnp.float32
    np.testing.assert_allclose(found.similarity, expected, rtol=1e-6)


def test_work_does_not_grow_with_the_gallery() -> None:
    def work(rows: int) -> int:
        shapes = (
            jax.ShapeDtypeStruct((64, 32), np.float32),
            jax.ShapeDtypeStruct((rows, 32), np.float32),
        )
        program = retrieval._nearest.lower(*shapes, None, k=5, chunk=1024).compile()
        return program.memory_analysis().temp_size_in_bytes

    small, large = work(5_100), work(51_000)  # of whole parts and a rest
    assert large <= 1.02 * small
    assert large < 51_000 * 32 * 4


@pytest.mark.parametrize("own", [None, np.arange(3)])
def test_more_neighbours_than_the_gallery_holds_is_an_error(own: np.ndarray | None) -> None:
    x = np.eye(3, dtype=np.float32)
    rows = 3 if own is None else 2
    with pytest.raises(UserError, match=rf"k={rows + 1} .* {rows} rows") as error:
        retrieval.nearest_neighbors(x, x, k=rows + 1, chunk=8, self_index=own)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"k={rows + 1} .* {rows} rows"):
        retrieval.sharded_nearest_neighbors(
            x, x, k=rows + 1, chunk=8, self_index=own, mesh=mesh_of(2)
        )


def test_wrong_sizes_are_errors() -> None:
    x = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match="embedding size: 3 and 2"):
        retrieval.nearest_neighbors(x, x[:, :2], k=1, chunk=8)
    with pytest.raises(UserError, match="chunk=0"):
        retrieval.nearest_neighbors(x, x, k=1, chunk=0)
    with pytest.raises(UserError, match="k=0"):
        retrieval.nearest_neighbors(x, x, k=0, chunk=8)
    labels = np.zeros(1, np.int32)
    with pytest.raises(UserError, match="0 rows besides each query itself"):
        retrieval.positive_ranks(x[:1], x[:1], labels, labels, chunk=8, self_index=labels)


RANKS = {
    "gallery": Case(37, 300, 3, 7, 4096, False),
    "self": Case(40, 300, 3, 299, 4096, True),
    "small_query_blocks": Case(150, 700, 3, 3, 1, True),
    "grouped": Case(90, 2501, 4, 2, 4096, True),
    "more_neighbours_than_a_part_holds": Case(150, 30, 3, 17, 1, False),
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks_and_neighbors_equal_loops_and_a_stable_argsort(name: str) -> None:
    case = RANKS[name]
    lone = 0
    for seed, kind in enumerate(DATA):
        queries, gallery, own = make(case, kind, seed)
        random = np.random.default_rng(seed)
        gallery_labels = random.integers(0, 90, case.gallery).astype(np.int32)
        query_labels = random.integers(-5, 100, case.queries).astype(np.int32)
        if own is not None:
            gallery_labels[own[:2]] = 100, 101
            query_labels = gallery_labels[own]
        arrays = queries, gallery, query_labels, gallery_labels
        ranks = retrieval.positive_ranks(*arrays, chunk=case.chunk, self_index=own)
        counted = np.asarray(ranks.relevant) > 0
        expected = stable_argsort(queries, gallery, own, case.k)
        for devices in (1, 2, 8):
            found, both = retrieval.neighbors_and_ranks(
                *arrays, k=case.k, chunk=case.chunk, self_index=own, mesh=mesh_of(devices)
            )
            context = f"{kind} on {devices} devices"
            np.testing.assert_array_equal(found.indices, expected[1], context)
            np.testing.assert_array_equal(found.similarity, expected[0], context)
            np.testing.assert_array_equal(both.relevant, ranks.relevant)
            for field, of_one in zip(both, ranks, strict=True):
                np.testing.assert_array_equal(field[counted], of_one[counted], context)
        similarity = queries.astype(np.float64) @ gallery.astype(np.float64).T
        for i in range(case.queries):
            others = [j for j in range(case.gallery) if own is None or j != own[i]]
            positive = [similarity[i, j] for j in others if gallery_labels[j] == query_labels[i]]
            negative = [similarity[i, j] for j in others if gallery_labels[j] != query_labels[i]]
            assert ranks.relevant[i] == len(positive)
            if not positive:
                lone += 1
                assert ranks.best_similarity[i] == -np.inf
                continue
            best = max(positive)
            assert ranks.best_similarity[i] == best
            assert ranks.above[i] == sum(s > best for s in negative)
            assert ranks.tied[i] == sum(s == best for s in negative)
            assert ranks.tied_relevant[i] == sum(s == best for s in positive)
    assert lone > 0


def test_neighbors_and_ranks_are_those_of_the_single_searches_bit_for_bit() -> None:
    queries, gallery = real_valued()
    labels = np.random.default_rng(1).integers(0, 300, len(gallery))
    arrays = queries, gallery, labels[:70], labels
    options = {"chunk": 640, "self_index": np.arange(70)}
    neighbors = retrieval.nearest_neighbors(*arrays[:2], k=7, **options)
    ranks = retrieval.positive_ranks(*arrays, **options)
    assert np.sum(ranks.tied) > 10
    counted = np.asarray(ranks.relevant) > 0
    assert 0 < np.sum(~counted) < 10
    for devices in (1, 3, 8):
        found, both = retrieval.neighbors_and_ranks(*arrays, k=7, mesh=mesh_of(devices), **options)
        for got, expected in zip(found, neighbors, strict=True):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(both.relevant, ranks.relevant)
        for got, expected in zip(both, ranks, strict=True):
            np.testing.assert_array_equal(got[counted], expected[counted])


def test_neighbors_and_ranks_come_from_one_product() -> None:
    x, labels = np.eye(40, dtype=np.float32), np.arange(40) // 2
    trace = jax.make_jaxpr(
        lambda *arrays: retrieval.neighbors_and_ranks(*arrays, k=3, mesh=mesh_of(2))
    )
    assert str(trace(x, x, labels, labels)).count("dot_general[") == 1


def test_labels_equal_modulo_a_power_of_two_are_different() -> None:
    x = np.array([[1, 0], [0.9, 0.1], [0.5, 0.5]], np.float32)
    query_labels, gallery_labels = np.array([7]), np.array([7 + 2**32, 7, 7 - 2**33])
    for kind in (lambda x: x, lambda x: x.astype(str)):
        arrays = x[:1], x, kind(query_labels), kind(gallery_labels)
        _, ranks = retrieval.neighbors_and_ranks(*arrays, k=1, mesh=mesh_of(2))
        for found in (ranks, retrieval.positive_ranks(*arrays)):
            assert (found.relevant.tolist(), found.above.tolist()) == ([1], [1])
    big = np.array([2**63 - 1], np.int64), np.array([2**63, 2**63 - 1], np.uint64)
    assert [labels.tolist() for labels in retrieval.renumbered(*big)] == [[0], [1, 0]]


def test_wide_labels_beside_unknown_ones_are_refused() -> None:
    indices, known = np.array([[0, 1]]), np.array([7, 8])
    inside = jax.jit(lambda labels: metrics.relevance(indices, labels, known))
    assert inside(known[:1]).tolist() == [[True, False]]
    for wide in (np.array([7, 7 + 2**32]), np.array(["7", "8"])):
        with pytest.raises(UserError, match=r"beyond 32 bits .* np\.unique"):
            jax.jit(lambda labels, y=wide: metrics.relevance(indices, labels, y))(np.array([7]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_embeddings_that_cannot_be_ranked_are_refused_by_row(value: float) -> None:
    x, labels = np.eye(6, dtype=np.float32), np.arange(6) // 2
    broken = x.copy()
    broken[4, 1] = value
    mesh = mesh_of(2)
    searches = {
        "nearest": lambda q, g: retrieval.nearest_neighbors(q, g, k=1),
        "sharded": lambda q, g: retrieval.sharded_nearest_neighbors(q, g, k=1, mesh=mesh),
        "ranks": lambda q, g: retrieval.positive_ranks(q, g, labels, labels),
        "both": lambda q, g: retrieval.neighbors_and_ranks(q, g, labels, labels, k=1, mesh=mesh),
        "streamed": lambda q, g: streamed_nearest_neighbors(q, g, k=1),
    }
    for search in searches.values():
        for place in (np.asarray, jnp.asarray):
            with pytest.raises(UserError, match=r"1 of 6 gallery .* not finite.* row 4;"):
                search(place(x), place(broken))
            with pytest.raises(UserError, match=r"1 of 6 query .* not finite.* row 4;"):
                search(place(broken), place(x))


def recalls(x: np.ndarray, labels: np.ndarray, k: int) -> list[float]:
    """Pessimistic, expected and optimistic Recall@K of self-retrieval."""
    own = np.arange(len(x))
    ranks = retrieval.positive_ranks(x, x, labels, labels, chunk=4096, self_index=own)
    counts = ranks.above, ranks.tied, ranks.tied_relevant, ranks.relevant
    return [float(masked_mean(values)) for values in metrics.tied_recall_at_k(*counts, k=k)]


@pytest.mark.parametrize("k", [1, 4])
def test_ideal_adversarial_collapsed_and_random_embeddings(k: int) -> None:
    labels = np.repeat(np.arange(60, dtype=np.int32), 5)
    random = np.random.default_rng(0)
    # Of 299 others 4 are relevant: chance is the probability to draw one of them in k draws.
    chance = 1 - np.prod([(295 - j) / (299 - j) for j in range(k)])
    ideal = np.eye(60, dtype=np.float32)[labels]
    assert recalls(ideal, labels, k) == [1, 1, 1]
    adversarial = np.eye(5, dtype=np.float32)[np.arange(300) % 5]  # one of each item together
    assert recalls(adversarial, labels, k) == [0, 0, 0]
    collapsed = np.asarray(l2_normalize(jnp.asarray(np.tile(random.normal(size=64), (300, 1)))))
    assert recalls(collapsed, labels, k) == pytest.approx([0, chance, 1], abs=1e-6)
    scattered = np.asarray(l2_normalize(jnp.asarray(random.normal(size=(300, 64)))))
    spread = 4 * np.sqrt(chance * (1 - chance) / 300)
    pessimistic, expected, optimistic = recalls(scattered, labels, k)
    assert pessimistic == expected == optimistic == pytest.approx(chance, abs=spread)


def test_counted_recall_is_that_of_the_neighbours() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 80, 400).astype(np.int32)
    x = (random.normal(size=(80, 16))[labels] + random.normal(size=(400, 16))).astype(np.float32)
    own = np.arange(400)
    found = retrieval.nearest_neighbors(x, x, k=10, chunk=4096, self_index=own)
    relevant = metrics.relevance(found.indices, labels, labels)
    count = np.array([np.sum(labels == label) - 1 for label in labels])
    for k in (1, 3, 10):
        listed = float(masked_mean(metrics.recall_at_k(relevant, count, k=k)))
        assert recalls(x, labels, k) == pytest.approx([listed] * 3, abs=1e-6)
        assert 0.1 < listed < 0.9

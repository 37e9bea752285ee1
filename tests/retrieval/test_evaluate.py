"""Scores of whole splits: ideal, adversarial and random embeddings, lone queries, labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax import metrics as public
from mmljax.config import RerankConfig
from mmljax.errors import UserError
from mmljax.mesh import make_mesh, place
from mmljax.retrieval.checks import SECOND_STAGES
from mmljax.retrieval.evaluate import embed_batches, embed_on_devices, evaluate, retrieval_scores
from mmljax.retrieval.k_reciprocal import k_reciprocal_neighbors
from mmljax.retrieval.rerank import database_augmentation, query_expansion
from mmljax.retrieval.search import sharded_nearest_neighbors
from mmljax.types import Batch


def score(*arguments: Any, devices: int = 2, recall_at: Any = (1, 2), **options: Any) -> Any:
    mesh = make_mesh(jax.devices()[:devices])
    return retrieval_scores(*arguments, recall_at=recall_at, chunk=8, mesh=mesh, **options)


PERFECT = ("recall@1", "recall@2", "r_precision", "map@r", "map@2", "mrr")  # 1 for the ideal
TIES = {f"recall_{way}@{k}" for way in ("expected", "optimistic") for k in (1, 2)} | {"tie_rate"}
SHAPE = {"embedding_density", "spectral_decay"}


def test_ideal_embedding_has_every_score_one() -> None:
    labels = np.repeat(np.arange(5), 4).astype(np.int32)
    vectors = np.eye(5, dtype=np.float32)[labels]
    result = score(vectors, labels, None, None, geometry=True)
    assert set(result.scores) == {*PERFECT} | TIES | SHAPE
    assert all(result.scores[name] == 1 for name in {*PERFECT} | TIES - {"tie_rate"})
    assert result.scores["tie_rate"] == 0
    assert result.scores["embedding_density"] == 0  # classes are points
    assert result.scores["spectral_decay"] == pytest.approx(0, abs=1e-6)
    assert result.lone_queries == 0
    assert result.chance == pytest.approx(3 / 19)
    summary = result.summary()
    assert summary["recall@1"] == 1
    assert summary["queries"] == 20
    assert not {"per_query", "neighbors", "similarity"} & set(summary)


def test_adversarial_embedding_has_every_score_zero() -> None:
    """Each query is nearest to another item's image, and by an own one only last."""
    labels = np.array([0, 1, 2], np.int32)
    queries = np.eye(3, dtype=np.float32)
    result = score(queries, labels, -queries, labels)
    assert all(result.scores[name] == 0 for name in {*PERFECT} - {"mrr"} | TIES)
    assert result.scores["mrr"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("by_class", [True, False])
def test_collapsed_embedding_scores_zero_in_any_order(devices: int, by_class: bool) -> None:
    labels = np.repeat(np.arange(15), 4).astype(np.int32)
    if not by_class:
        labels = np.random.default_rng(0).permutation(labels)
    x = np.random.default_rng(1).normal(size=24)
    vectors = np.tile((x / np.linalg.norm(x)).astype(np.float32), (60, 1))
    scores = score(vectors, labels, None, None, devices=devices, geometry=True).scores
    chance = {1: 3 / 59, 2: 1 - 56 / 59 * 55 / 58}
    for k in (1, 2):
        assert scores[f"recall@{k}"] == 0
        assert scores[f"recall_expected@{k}"] == pytest.approx(chance[k], abs=1e-6)
        assert scores[f"recall_optimistic@{k}"] == 1
    assert all(scores[name] == 0 for name in ("r_precision", "map@r", "map@2"))
    assert scores["mrr"] == pytest.approx(1 / 57)
    assert scores["tie_rate"] == 1
    assert np.isnan(scores["embedding_density"])
    assert scores["spectral_decay"] > 10


@pytest.mark.parametrize("devices", [1, 8])
def test_scores_are_means_of_the_per_query_values(devices: int) -> None:
    random = np.random.default_rng(0)
    labels = np.append(np.repeat(np.arange(12), 5), [90, 91]).astype(np.int32)  # two lone ones
    vectors = random.normal(size=(12, 8))[labels % 12] + random.normal(size=(62, 8))
    vectors = vectors.astype(np.float32)
    result = score(vectors, labels, None, None, recall_at=(1, 4), devices=devices)
    assert result.lone_queries == 2
    similarity = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1)
    hits = labels[order] == labels[:, None]
    rank = 1 + np.argmax(hits[:60], axis=1)
    expected = {
        "recall@1": rank <= 1,
        "recall@4": rank <= 4,
        "mrr": 1 / rank,
        "tie_rate": np.zeros(60),
        "r_precision": hits[:60, :4].mean(axis=1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(result.per_query[name][:60], values, rtol=1e-6, err_msg=name)
    for name, values in result.per_query.items():
        assert values.shape == (62,)
        assert np.isnan(values[60:]).all()
        assert np.mean(values[:60]) == pytest.approx(result.scores[name], abs=1e-6)
    assert set(result.per_query) == set(result.scores)
    assert 0.1 < result.scores["recall@1"] < result.scores["recall@4"] < 0.9


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("own", [True, False])
def test_distractors_join_the_gallery_in_scores_of_their_own(own: bool, devices: int) -> None:
    random = np.random.default_rng(2)
    labels = np.append(np.repeat(np.arange(9), 4), 40).astype(np.int32)  # the last one is lone
    vectors = random.normal(size=(9, 6))[labels % 9] + random.normal(size=(37, 6))
    distractors = random.normal(size=(50, 6)).astype(np.float32)
    distractors[7] = vectors[3]  # ties with a match of some queries
    queries = vectors.astype(np.float32)
    gallery = None if own else (queries + 0.9 * random.normal(size=(37, 6))).astype(np.float32)
    among = None if own else labels
    result = score(queries, labels, gallery, among, devices=devices, distractors=distractors)
    plain = score(queries, labels, gallery, among, devices=devices)
    assert {k: v for k, v in result.scores.items() if "distractors" not in k} == plain.scores
    assert result.summary()["distractors"] == 50
    np.testing.assert_array_equal(result.neighbors, plain.neighbors)

    everything = np.concatenate([queries if own else gallery, distractors]).astype(np.float64)
    ranks, precisions = [], []
    for i in range(37 if gallery is not None else 36):
        places = [j for j in range(len(everything)) if not (own and j == i)]
        ranked = [
            (-(everything[j] @ queries[i].astype(np.float64)), j < 37 and labels[j] == labels[i])
            for j in places
        ]
        hits = [hit for _, hit in sorted(ranked)]  # of a tie, the distractor comes first
        ranks.append(hits.index(True) + 1)
        precisions.append(np.mean(hits[: sum(hits)]))
    found = {name: result.scores[f"{name}/distractors"] for name in plain.scores}
    expected = {f"recall@{k}": np.mean(np.array(ranks) <= k) for k in (1, 2)}
    expected |= {"mrr": np.mean(1 / np.array(ranks)), "r_precision": np.mean(precisions)}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found["recall@1"] < plain.scores["recall@1"]
    assert result.per_query["mrr/distractors"].shape == (37,)
    distractors[4, 2] = np.nan
    with pytest.raises(UserError, match="1 of 50 distractor embeddings .* row 4"):
        score(queries, labels, gallery, among, devices=devices, distractors=distractors)


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_second_stages_are_scored_beside_the_plain_search(own: bool) -> None:
    """Against the public functions, and scores from Python lists. The last query is lone."""
    random = np.random.default_rng(2)
    labels = np.append(np.repeat(np.arange(9), 4), 40).astype(np.int32)
    x = (random.normal(size=(9, 6))[labels % 9] + random.normal(size=(37, 6))).astype("f4")
    x[1] = x[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows, others = (np.arange(37), None) if own else (np.arange(0, 37, 2), np.arange(1, 37, 2))
    gallery, against = (None, x) if others is None else (x[others], x[others])
    among = labels if others is None else labels[others]
    queries, wanted = x[rows], labels[rows]
    settings = {"k": 2, "alpha": 2.0, "k1": 5, "k2": 2, "original_weight": 0.2, "candidates": 1}
    rerank = RerankConfig(methods=SECOND_STAGES, **settings)
    given = queries, wanted, gallery, None if own else among
    result, plain = score(*given, rerank=rerank), score(*given)
    assert {k: v for k, v in result.scores.items() if "/" not in k} == plain.scores
    np.testing.assert_array_equal(result.neighbors, plain.neighbors)

    options = {"chunk": 8, "mesh": make_mesh(jax.devices()[:2])}
    search = {**options, "self_index": np.arange(37, dtype=np.int32) if own else None}
    everything = {**search, "k": len(against) - own}
    average = {"k": 2, "alpha": 2.0}
    expanded = query_expansion(queries, against, **average, **search)
    augmented = database_augmentation(against, **average, **options)
    best = k_reciprocal_neighbors(
        *(queries, against),
        **{"k": 10, "candidates": 10, "k1": 5, "k2": 2},  # NEIGHBORS, more than any K and R
        original_weight=0.2,
        **search,
    ).indices
    first = np.asarray(sharded_nearest_neighbors(queries, against, **everything).indices)
    after = [[i for i in row if i not in best[q]] for q, row in enumerate(first)]
    orders = {
        "query_expansion": sharded_nearest_neighbors(expanded, against, **everything).indices,
        "database_augmentation": sharded_nearest_neighbors(
            queries, augmented, **everything
        ).indices,
        "k_reciprocal": np.concatenate([best, np.array(after, int)], axis=1),
    }
    found = set()
    for name, order in orders.items():
        hits = among[np.asarray(order)] == wanted[:, None]
        hits = hits[hits.any(axis=1)]
        ranks = 1 + hits.argmax(axis=1)
        within = [row[: row.sum()] for row in hits]
        steps = [np.mean(row * np.cumsum(row) / np.arange(1, len(row) + 1)) for row in within]
        expected = {f"recall@{k}": np.mean(ranks <= k) for k in (1, 2)}
        expected |= {"mrr": np.mean(1 / ranks), "map@r": np.mean(steps)}
        expected["r_precision"] = np.mean([np.mean(row) for row in within])
        got = {key: result.scores[f"{key}/{name}"] for key in expected}
        assert got == pytest.approx(expected, rel=1e-6)
        assert f"recall_expected@1/{name}" not in result.scores
        assert result.per_query[f"mrr/{name}"].shape == (len(queries),)
        found.add(round(got["mrr"], 6))
    assert len(found | {round(plain.scores["mrr"], 6)}) == 4  # each stage changes something


def test_clustering_is_scored_only_if_asked_for() -> None:
    pytest.importorskip("sklearn", reason="pip install mmljax[cluster]")
    labels = np.repeat(np.arange(5), 4).astype(np.int32)
    vectors = np.eye(5, dtype=np.float32)[labels]
    asked = score(vectors[::2], labels[::2], vectors[1::2], labels[1::2], clustering=True).scores
    assert (asked["nmi"], asked["ami"]) == (1, 1)
    assert not {"nmi", "ami"} & set(score(vectors, labels, None, None).scores)


def test_hand_computed_query_against_gallery() -> None:
    queries = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    gallery = np.array([[0.9, 0.1], [0.8, 0.6], [0.1, 0.9], [0.0, 1.0]], np.float32)
    # Orders: query 0: 0 1 2 3; query 1: 3 2 1 0; query 2 has no image of its item.
    result = score(queries, np.array([7, 8, 9]), gallery, np.array([8, 7, 7, 8]))
    assert result.scores["recall@1"] == pytest.approx(0.5)  # query 1 finds row 3
    assert result.scores["recall@2"] == pytest.approx(1.0)
    assert result.scores["r_precision"] == pytest.approx((0.5 + 0.5) / 2)
    assert result.scores["map@r"] == pytest.approx((0.25 + 0.5) / 2)
    assert result.scores["mrr"] == pytest.approx((0.5 + 1) / 2)
    assert (result.queries, result.gallery, result.lone_queries) == (3, 4, 1)
    assert result.chance == pytest.approx(0.5)


@pytest.mark.parametrize("own", [True, False])
def test_neighbours_are_the_ten_nearest_of_a_stable_sort(own: bool) -> None:
    random = np.random.default_rng(4)
    vectors = random.normal(size=(40, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels = np.repeat(np.arange(10), 4).astype(np.int32)
    gallery = None if own else vectors[::-1].copy()
    result = score(vectors, labels, gallery, None if own else labels[::-1].copy())
    similarity = vectors.astype(np.float64) @ (vectors if gallery is None else gallery).T
    if own:
        np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(result.neighbors, order)
    expected = np.take_along_axis(similarity, order, axis=1)
    np.testing.assert_allclose(result.similarity, expected, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_random_embedding_is_near_chance(devices: int) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 20).astype(np.int32)
    vectors = random.normal(size=(400, 16)).astype(np.float32)
    result = score(vectors, labels, None, None, devices=devices)
    sigma = np.sqrt(result.chance * (1 - result.chance) / 400)
    assert abs(result.scores["recall@1"] - result.chance) < 4 * sigma


def test_recall_beyond_the_gallery_is_refused() -> None:
    labels = np.zeros(4, np.int32)
    with pytest.raises(UserError, match=r"recall_at asks for Recall@4.*only 3"):
        score(np.eye(4, dtype=np.float32), labels, None, None, recall_at=(1, 4))


def test_recall_at_1_is_not_needed() -> None:
    labels = np.repeat(np.arange(5), 4).astype(np.int32)
    result = score(np.eye(5, dtype=np.float32)[labels], labels, None, None, recall_at=(3,))
    assert (result.scores["recall@3"], result.scores["map@3"]) == (1, 1)
    assert "recall@1" not in result.summary()
    assert result.summary()["chance"] == pytest.approx(3 / 19)


@pytest.mark.parametrize("devices", [1, 8])
def test_labels_equal_modulo_a_power_of_two_are_different(devices: int) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 5)
    vectors = (random.normal(size=(12, 8))[labels] + random.normal(size=(60, 8))).astype("f4")
    wide = (labels % 2 + (labels // 2) * 2**32).astype(np.int64)  # 2 labels in 32 bits
    arrays = vectors[::2], vectors[1::2]
    expected = score(arrays[0], labels[::2], arrays[1], labels[1::2], devices=devices)
    found = score(arrays[0], wide[::2], arrays[1], wide[1::2], devices=devices)
    assert found.scores == expected.scores
    alone = score(vectors, wide, None, None, devices=devices)
    assert alone.scores == score(vectors, labels, None, None, devices=devices).scores
    got = public.retrieval(*arrays, wide[::2], wide[1::2], recall_at=(1, 2))
    assert got == pytest.approx(expected.summary(), abs=1e-6)
    named = public.retrieval(*arrays, wide[::2].astype(str), wide[1::2].astype(str))
    assert named["recall@1"] == expected.scores["recall@1"]


def test_no_query_with_a_match_is_refused() -> None:
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match="no query has"):
        score(vectors, np.array([0, 1, 2]), vectors, np.array([3, 4, 5]))


def test_labels_that_do_not_fit_are_refused() -> None:
    vectors, labels = np.eye(3, dtype=np.float32), np.zeros(3, int)
    for arguments in (
        (vectors, labels[:2], None, None),
        (vectors, labels, vectors, labels[:2]),
        (vectors, labels, vectors, None),
        (vectors, labels, None, labels),
    ):
        with pytest.raises(UserError, match="embeddings and labels must be"):
            score(*arguments)


def batch(values: Any, valid: Any) -> Batch:
    return Batch(np.array(values), np.array(values, np.int32), np.array(valid))


def test_embed_batches_leaves_padding_out() -> None:
    batches = [batch([1, 2], [True, True]), batch([3, 0], [True, False])]
    vectors, labels = embed_batches(lambda images: images[:, None] * 10, batches)
    np.testing.assert_array_equal(vectors, [[10], [20], [30]])
    np.testing.assert_array_equal(labels, [1, 2, 3])


def test_embeddings_of_many_batches_keep_their_order() -> None:
    mesh = make_mesh(jax.devices()[:2])
    values = np.arange(2 * 75).reshape(75, 2)
    batches = (place(batch(pair, pair < 149), mesh) for pair in values)
    vectors, labels = embed_on_devices(jax.jit(lambda x: x[:, None] * 10), batches)
    assert isinstance(vectors, jax.Array)
    np.testing.assert_array_equal(vectors, 10 * np.arange(149)[:, None])
    np.testing.assert_array_equal(labels, np.arange(149))


@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_evaluation_of_batches_tells_labels_of_64_bits_apart(kind: type) -> None:
    random = np.random.default_rng(3)
    labels = random.permutation(np.repeat(np.arange(6), 4))
    vectors = (random.normal(size=(6, 8))[labels] + random.normal(size=(24, 8))).astype("f4")
    wide = (labels % 2 + (labels // 2 + 2**31 - 1) * 2**32).astype(kind)  # 2 labels in 32 bits

    def batches(rows: range) -> Any:
        for part in np.split(np.array(rows), 3):
            yield Batch(vectors[part], wide[part], np.ones(len(part), bool))

    found = embed_on_devices(jnp.asarray, batches(range(24)))[1]
    np.testing.assert_array_equal(found, wide)
    assert found.dtype == kind
    options = {"recall_at": (1, 2), "chunk": 8, "mesh": make_mesh(jax.devices()[:2])}
    given = vectors[:12], labels[:12], vectors[12:], labels[12:]
    expected = retrieval_scores(*given, **options).scores
    assert expected["recall@1"] < 1
    got = evaluate(jnp.asarray, batches(range(12)), batches(range(12, 24)), **options)
    assert got.scores == expected


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prefixes_are_scored_at_unit_length(own: bool) -> None:
    random = np.random.default_rng(4)
    labels = random.permutation(np.repeat(np.arange(6), 4)).astype(np.int32)
    x = (random.normal(size=(6, 8))[labels] + random.normal(size=(24, 8))).astype("f4")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = [np.arange(24)] if own else np.split(np.arange(24), 2)
    batches = [[Batch(x[part], labels[part], np.ones(len(part), bool))] for part in rows]
    options = {"recall_at": (1, 2), "chunk": 8, "mesh": make_mesh(jax.devices()[:2])}
    gallery = None if own else batches[1]
    found = evaluate(jnp.asarray, batches[0], gallery, prefixes=(3, 8), **options)
    cut = x[:, :3] / np.linalg.norm(x[:, :3], axis=1, keepdims=True)

    def expected(x: np.ndarray) -> dict[str, float]:
        others = (None, None) if own else (x[rows[1]], labels[rows[1]])
        return retrieval_scores(x[rows[0]], labels[rows[0]], *others, **options).scores

    assert found.scores == expected(x)
    assert [*found.at_sizes] == [3]  # those of all dimensions are the scores themselves
    assert found.at_sizes[3].keys() == {"recall@1", "recall@2", "mrr", "r_precision", "map@r"}
    for name, value in found.at_sizes[3].items():
        assert value == pytest.approx(expected(cut)[name], abs=1e-6)
        assert found.summary()[f"{name}@3"] == value
    assert found.at_sizes[3]["recall@1"] != found.scores["recall@1"]


@pytest.mark.parametrize("geometry", [False, True])
def test_embeddings_are_fetched_for_diagnostics_alone(
    geometry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(8), 6))
    table = random.normal(size=(8, 16))[labels] + random.normal(size=(48, 16))
    table = jnp.asarray(table, jnp.float32)
    mesh = make_mesh(jax.devices()[:2])

    def batches(rows: np.ndarray) -> Any:
        return (
            place(Batch(part, labels[part].astype(np.int32), np.ones(6, bool)), mesh)
            for part in rows.reshape(-1, 6)
        )

    fetched = []

    def to_host(x: jax.Array) -> np.ndarray:
        fetched.append(x.shape)
        return np.asarray(x)

    monkeypatch.setattr("mmljax.retrieval.evaluate.to_host", to_host)
    monkeypatch.setattr("mmljax.retrieval.checks.to_host", to_host)
    options = {"recall_at": (1, 4), "chunk": 8, "mesh": mesh, "geometry": geometry}
    rows = np.arange(48)
    found = evaluate(jax.jit(table.__getitem__), batches(rows[:18]), batches(rows[18:]), **options)
    assert fetched.count((18, 16)) == fetched.count((30, 16)) == geometry
    host = np.asarray(table)
    given = host[:18], labels[:18], host[18:], labels[18:]
    expected = retrieval_scores(*given, **options)
    assert found.scores == expected.scores
    np.testing.assert_array_equal(found.neighbors, expected.neighbors)


def test_embeddings_that_are_not_finite_are_an_error() -> None:
    labels = np.arange(6, dtype=np.int32) // 2
    vectors = np.eye(6, dtype=np.float32)
    vectors[1, 2] = np.nan
    with pytest.raises(
        UserError, match=r"1 of 6 gallery embeddings are not finite.* row 1;.*learning_rate"
    ):
        score(np.eye(6, dtype=np.float32), labels, vectors, labels)
    with pytest.raises(UserError, match=r"1 of 6 query embeddings are not finite.* row 1;"):
        score(vectors, labels, None, None)

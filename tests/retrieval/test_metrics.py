"""Each metric against values worked out by hand, slow loops, and pytorch-metric-learning."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from mmljax.numerics import masked_mean
from mmljax.retrieval import metrics
from mmljax.types import Values

# Five neighbours of four queries; R = 3, 2, 1 and, for a lone query, 0.
RELEVANT = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
COUNT = np.array([3, 2, 1, 0])
BY_HAND = {
    "recall_at_1": (lambda r, n: metrics.recall_at_k(r, n, k=1), [0, 1, 0]),
    "recall_at_2": (lambda r, n: metrics.recall_at_k(r, n, k=2), [1, 1, 0]),
    "precision_at_3": (lambda r, n: metrics.precision_at_k(r, n, k=3), [2 / 3, 1 / 3, 0]),
    "r_precision": (metrics.r_precision, [2 / 3, 1 / 2, 0]),
    "map_at_r": (metrics.map_at_r, [(1 / 2 + 2 / 3) / 3, (1 / 1) / 2, 0]),
    "map_at_2": (lambda r, n: metrics.map_at_k(r, n, k=2), [(1 / 2) / 2, (1 / 1) / 2, 0]),
    "map_at_5": (
        lambda r, n: metrics.map_at_k(r, n, k=5),
        [(1 / 2 + 2 / 3 + 3 / 5) / 3, (1 / 1 + 2 / 5) / 2, 0],
    ),
    "reciprocal_rank": (metrics.reciprocal_rank, [1 / 2, 1, 0]),
}


def slow_metrics(relevant: np.ndarray, count: int, k: int) -> dict[str, float]:
    """One query's metrics, item by item in Python floats."""
    hits, total = 0, 0.0
    hits_after, precision_sum, scores = {}, {}, {"reciprocal_rank": 0.0}
    for place, is_relevant in enumerate(relevant.tolist(), start=1):
        if is_relevant:
            hits += 1
            total += hits / place
            if hits == 1:
                scores["reciprocal_rank"] = 1 / place
        hits_after[place], precision_sum[place] = hits, total
    scores["precision"] = hits_after[k] / k
    scores["recall"] = float(hits_after[k] > 0)
    scores["map_at_k"] = precision_sum[k] / min(count, k)
    scores["r_precision"] = hits_after[count] / count
    scores["map_at_r"] = precision_sum[count] / count
    return scores


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand_and_lone_queries(name: str) -> None:
    metric, expected = BY_HAND[name]
    for transform in (lambda f: f, jax.jit):
        values = transform(metric)(RELEVANT, COUNT)
        assert isinstance(values, Values)
        np.testing.assert_allclose(values.value, [*expected, 0], rtol=1e-6)
        assert values.valid.tolist() == [True, True, True, False]
        assert float(masked_mean(values)) == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_metrics_equal_the_loops(k: int) -> None:
    random = np.random.default_rng(k)
    relevant = random.random((200, 12)) < random.random((200, 1))
    count = np.minimum(relevant.sum(axis=1) + random.integers(0, 3, 200), 12)
    got = {
        "recall": metrics.recall_at_k(relevant, count, k=k),
        "precision": metrics.precision_at_k(relevant, count, k=k),
        "map_at_k": metrics.map_at_k(relevant, count, k=k),
        "r_precision": metrics.r_precision(relevant, count),
        "map_at_r": metrics.map_at_r(relevant, count),
        "reciprocal_rank": metrics.reciprocal_rank(relevant, count),
    }
    assert 0 < np.sum(count == 0) < 50
    for i in np.flatnonzero(count):
        for name, expected in slow_metrics(relevant[i], int(count[i]), k).items():
            assert float(got[name].value[i]) == pytest.approx(expected, abs=1e-6), name
    for values in got.values():
        np.testing.assert_array_equal(values.valid, count > 0)


@pytest.mark.parametrize("metric", [metrics.r_precision, metrics.map_at_r])
def test_fewer_neighbours_than_relevant_items_is_nan(metric: object) -> None:
    value, valid = metric(np.ones((3, 4), bool), np.array([4, 5, 0]))
    np.testing.assert_array_equal(value, [1, np.nan, 0])
    assert valid.tolist() == [True, True, False]


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("metric", [metrics.recall_at_k, metrics.precision_at_k, metrics.map_at_k])
def test_more_places_than_neighbours_or_none_is_an_error(metric: object, k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} of only 5"):
        metric(RELEVANT, COUNT, k=k)


def test_relevance_compares_labels() -> None:
    indices = np.array([[2, 0], [1, 2]])
    got = metrics.relevance(indices, np.array([7, 9]), np.array([7, 8, 9]))
    assert got.tolist() == [[False, True], [False, True]]
    wide = np.array([7, 7 + 2**32, 9 - 2**33])  # two labels in 32 bits
    for gallery in (wide, wide.astype(str)):
        got = metrics.relevance(indices, gallery[:2], gallery)
        assert got.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_pessimistic_relevance_is_the_worst_order_or_a_bound_of_it(k: int) -> None:
    random = np.random.default_rng(k)
    cut = 0
    for _ in range(200):
        similarity = -np.sort(-random.integers(0, 4, 8).astype(np.float32))
        relevant = random.random(8) < 0.4
        worst = sorted(range(8), key=lambda i: (-similarity[i], relevant[i]))  # irrelevant first
        expected = relevant[worst][:k]
        got = metrics.pessimistic_relevance(
            similarity[None, : k + 1], relevant[None, : k + 1], k=k
        )[0]
        whole = np.asarray(similarity[:k] > similarity[k])  # places of ties that end before k
        np.testing.assert_array_equal(got[whole], expected[whole])
        assert not np.any(got[~whole])
        if whole.all():
            np.testing.assert_array_equal(got, expected)
        cut += not whole.all()
        everything = metrics.pessimistic_relevance(similarity[None], relevant[None], k=8)[0]
        np.testing.assert_array_equal(everything, relevant[worst])
    assert 20 < cut < 180


def test_pessimistic_reciprocal_rank_by_hand() -> None:
    values = metrics.pessimistic_reciprocal_rank(
        np.array([0, 0, 3, 5]), np.array([0, 1, 2, 0]), np.array([1, 4, 2, 0])
    )
    np.testing.assert_allclose(values.value, [1, 1 / 2, 1 / 6, 0])
    assert values.valid.tolist() == [True, True, True, False]


def hit_share(above: int, tied: int, tied_relevant: int, k: int) -> tuple[float, float, float]:
    """Worst, mean and best of a relevant item among the first k, over every order of the tied."""
    hits = []
    for order in itertools.permutations([True] * tied_relevant + [False] * tied):
        hits.append(any(([False] * above + list(order))[:k]))
    return min(hits), sum(hits) / len(hits), max(hits)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_tied_recall_equals_the_enumeration_of_all_orders(k: int) -> None:
    cases = [
        (above, tied, tied_relevant)
        for above in range(4)
        for tied in range(5)
        for tied_relevant in range(1, 4)
    ]
    above, tied, tied_relevant = np.array(cases).T
    got = metrics.tied_recall_at_k(above, tied, tied_relevant, tied_relevant + 2, k=k)
    expected = np.array([hit_share(*case, k) for case in cases])
    for name, column in zip(("pessimistic", "expected", "optimistic"), expected.T, strict=True):
        value, valid = getattr(got, name)
        np.testing.assert_allclose(value, column, atol=1e-6, err_msg=name)
        assert valid.all()


def test_tied_recall_of_a_lone_query_is_not_valid() -> None:
    nothing = np.zeros(2, int)
    for values in metrics.tied_recall_at_k(nothing, nothing, nothing, np.array([0, 1]), k=3):
        assert values.valid.tolist() == [False, True]
        assert values.value[0] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("self_retrieval", [False, True])
def test_metrics_equal_pytorch_metric_learning(self_retrieval: bool) -> None:
    torch = pytest.importorskip("torch", reason="the peer's tensors")
    peer = pytest.importorskip(
        "pytorch_metric_learning.utils.accuracy_calculator", reason="the peer to compare with"
    )
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(40), random.integers(2, 12, 40)))
    centers = random.normal(size=(40, 24))
    x = centers[labels] + 0.8 * random.normal(size=(len(labels), 24))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    queries, gallery = (x, x) if self_retrieval else (x[:60], x[60:])
    query_labels, gallery_labels = (
        (labels, labels) if self_retrieval else (labels[:60], labels[60:])
    )
    k = len(gallery) - self_retrieval
    similarity = queries @ gallery.T
    count = np.sum(query_labels[:, None] == gallery_labels, axis=1) - self_retrieval
    if self_retrieval:
        np.fill_diagonal(similarity, -np.inf)
    indices = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    relevant = metrics.relevance(indices, query_labels, gallery_labels)
    knn = inference.CustomKNN(distances.CosineSimilarity())
    calculator = peer.AccuracyCalculator(k=k, knn_func=knn, device=torch.device("cpu"))
    tensors = (torch.tensor(a) for a in (queries, query_labels, gallery, gallery_labels))
    expected = calculator.get_accuracy(*tensors, ref_includes_query=self_retrieval)
    got = {
        "precision_at_1": metrics.recall_at_k(relevant, count, k=1),
        "r_precision": metrics.r_precision(relevant, count),
        "mean_average_precision_at_r": metrics.map_at_r(relevant, count),
        "mean_average_precision": metrics.map_at_k(relevant, count, k=k),
        "mean_reciprocal_rank": metrics.reciprocal_rank(relevant, count),
    }
    for name, values in got.items():
        assert 0.2 < expected[name] < 1
        assert float(masked_mean(values)) == pytest.approx(expected[name], abs=1e-6), name

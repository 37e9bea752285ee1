"""Error rates of thresholds, against loops over pairs in float64 on exact similarities."""

from __future__ import annotations

import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.retrieval import verification
from mmljax.retrieval.verification import (
    THRESHOLDS,
    choose_threshold,
    decide,
    estimate_rates,
    false_match_rates,
    false_non_match_rates,
    pair_histogram,
)


def unit_vectors(random: np.random.Generator, rows: int) -> np.ndarray:
    """Four of six coordinates are +-1/2: similarities are multiples of 1/4, and many are equal."""
    vectors = np.zeros((rows, 6), np.float32)
    for row in vectors:
        row[random.permutation(6)[:4]] = random.choice([-0.5, 0.5], 4)
    return vectors


@pytest.fixture(params=["queries among themselves", "queries and gallery"])
def images(request, monkeypatch):
    """Vectors and labels in blocks that cut both sides unevenly; classes of different sizes."""
    monkeypatch.setattr(verification, "_QUERIES", 7)
    monkeypatch.setattr(verification, "_GALLERY", 5)
    random = np.random.default_rng(3)
    patterns = unit_vectors(random, 6)

    def some(rows: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Half of the vectors are the pattern of their class."""
        classes = random.integers(first, last, rows)
        like = random.random((rows, 1)) < 0.5
        return np.where(like, patterns[classes], unit_vectors(random, rows)), classes**2 + 2**40

    queries = some(23, 0, 5)
    return queries if request.param == "queries among themselves" else queries + some(17, 1, 6)


def slow_pairs(queries, labels, gallery=None, gallery_labels=None):
    """(query, class, class of the gallery image, similarity) of every pair."""
    against = (queries, labels) if gallery is None else (gallery, gallery_labels)
    for i, x in enumerate(queries):
        for j, y in enumerate(against[0]):
            if gallery is not None or i != j:
                similarity = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
                yield i, int(labels[i]), int(against[1][j]), similarity


def slow_rates(pairs, threshold, times=None):
    """The four rates, by their definitions; each class counts ``times``."""
    weight = (
        dict.fromkeys({c for _, a, b, _ in pairs for c in (a, b)}, 1) if times is None else times
    )
    false = different = missed = matching = 0
    own, other, class_of = {}, {}, {}
    for query, a, b, similarity in pairs:
        class_of[query] = a
        if a == b:
            matching += weight[a]
            missed += weight[a] * (similarity < threshold)
        else:
            different += weight[a] * weight[b]
            false += weight[a] * weight[b] * (similarity >= threshold)
        best = own if a == b else other
        best[query] = max(best.get(query, -9.0), similarity)
    wrong = sum(weight[class_of[q]] for q in class_of if other[q] >= threshold)
    failed = [q for q in own if own[q] < threshold or own[q] <= other[q]]
    return {
        "false_match_rate": false / different,
        "false_non_match_rate": missed / matching,
        "false_positive_identification_rate": wrong / sum(weight[c] for c in class_of.values()),
        "false_negative_identification_rate": sum(weight[class_of[q]] for q in failed)
        / sum(weight[class_of[q]] for q in own),
    }


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.25, 0.5, 1.0])
def test_rates_equal_a_loop_over_pairs(images, threshold):
    pairs = list(slow_pairs(*images))
    expected = slow_rates(pairs, threshold)
    decisions = decide(*images, threshold=threshold)
    found = estimate_rates(decisions, threshold=threshold, resamples=3, seed=0)
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(expected)
    histogram, place = pair_histogram(*images), np.searchsorted(THRESHOLDS, threshold)
    assert THRESHOLDS[place] == threshold
    rates = false_match_rates(histogram)[place], false_non_match_rates(histogram)[place]
    assert rates == pytest.approx([*expected.values()][:2])
    assert histogram.matching.sum() + histogram.different.sum() == len(pairs)


def test_intervals_equal_a_loop_over_resamples(images):
    pairs, threshold = list(slow_pairs(*images)), 0.75
    classes = sorted({c for _, a, b, _ in pairs for c in (a, b)})
    draws = np.random.default_rng(5).integers(0, len(classes), (40, len(classes)))
    rows = []
    for drawn in draws:
        times = {c: int(np.sum(drawn == i)) for i, c in enumerate(classes)}
        try:
            rows.append(slow_rates(pairs, threshold, times))
        except ZeroDivisionError:  # such a resample has no pair of some kind
            pytest.fail("choose another seed")
    decisions = decide(*images, threshold=threshold)
    found = estimate_rates(decisions, threshold=threshold, resamples=40, seed=5)
    for name, estimate in found.items():
        expected = np.quantile([row[name] for row in rows], (0.025, 0.975))
        np.testing.assert_allclose(estimate[1:], expected, rtol=1e-12, err_msg=name)
        assert estimate.low < estimate.value < estimate.high, name


@pytest.mark.parametrize("wanted", [0.9, 0.3, 0.1, 0.02])
def test_the_chosen_threshold_is_the_lowest_that_keeps_the_rate(images, wanted):
    pairs = [(a == b, similarity) for _, a, b, similarity in slow_pairs(*images)]
    other = [similarity for same, similarity in pairs if not same]
    chosen = choose_threshold(pair_histogram(*images), false_match_rate=wanted)
    assert np.mean([similarity >= chosen for similarity in other]) <= wanted
    lower = chosen - verification.RESOLUTION
    assert np.mean([similarity >= lower for similarity in other]) > wanted


def test_similarities_between_two_thresholds_and_beyond_one_are_counted():
    step = np.float32(verification.RESOLUTION)
    values = np.array([-1.001, -1, -step, 0, step, np.nextafter(step, 0), 1, 1.0001], np.float32)
    places = verification._bins(values)
    expected = [max((i for i, t in enumerate(THRESHOLDS) if t <= x), default=0) for x in values]
    assert places.tolist() == expected
    assert [places[0], places[-1]] == [0, 2**16]


def test_rates_that_cannot_be_known_are_refused():
    random = np.random.default_rng(0)
    some = pair_histogram(unit_vectors(random, 4), np.arange(4))
    with pytest.raises(UserError, match="0.05 cannot be known from 12 pairs.*at least 0.083"):
        choose_threshold(some, false_match_rate=0.05)
    copies = pair_histogram(np.repeat(unit_vectors(random, 1), 4, axis=0), np.arange(4))
    with pytest.raises(UserError, match="no threshold: a share of 1 .*copies"):
        choose_threshold(copies, false_match_rate=0.5)
    alone = decide(unit_vectors(random, 4), np.zeros(4, int), threshold=0.5)
    with pytest.raises(UserError, match="1 class"):
        estimate_rates(alone, threshold=0.5, resamples=2, seed=0)

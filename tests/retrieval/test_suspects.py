"""Margins of labels and their threshold, against a loop and planted faults."""

from __future__ import annotations

import numpy as np
import pytest

from mmljax.retrieval import suspects


def clusters(*, items: int, views: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of items around a mean each, all of them far from the origin."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(items), views)
    means = random.normal(size=(items, 24)) + 3
    return (means[labels] + spread * random.normal(size=(len(labels), 24))).astype(np.float32), (
        7 * labels[::-1] + 2
    )[::-1].astype(np.int64)


def loop_margins(x: np.ndarray, labels: np.ndarray) -> list[tuple[float, set[int]]]:
    """Margins and the images of the most similar other item, one image at a time."""
    count = len(x)
    wide = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    cosine = wide @ wide.T
    density = [np.mean(sorted(np.delete(cosine[i], i))[-10:]) for i in range(count)]
    found = [(-np.inf, set[int]())] * count
    for _ in range(3):
        doubt = [max(0.0, margin) for margin, _ in found]
        found = []
        for i in range(count):
            trusted: dict[int, list[float]] = {}
            for j in range(count):
                if j != i and doubt[j] <= doubt[i]:
                    value = cosine[i, j] - (density[i] + density[j]) / 2
                    trusted.setdefault(labels[j], []).append(value)
            means = {item: np.mean(sorted(values)[-3:]) for item, values in trusted.items()}
            own = means.pop(labels[i], np.inf)
            best = max(means, key=lambda item: means[item])
            found.append((means[best] - own, set(np.flatnonzero(labels == best))))
    return found


@pytest.mark.parametrize("count", [5, 300])
def test_margins_equal_a_loop(count):
    x = np.random.default_rng(count).normal(size=(count, 6)).astype(np.float32) + 1
    labels = np.random.default_rng(1).integers(0, max(2, count // 4), count)
    labels[0] = 10**6  # alone
    found = suspects.label_margins(x, labels)
    expected = loop_margins(x, labels)
    np.testing.assert_allclose(found.margin, [margin for margin, _ in expected], atol=5e-6)
    assert found.margin[0] == -np.inf
    for (_, images), margin, other in zip(expected, found.margin, found.other, strict=True):
        assert other in images or margin == -np.inf


def test_a_wrong_label_is_no_evidence_about_the_image_beside_it():
    x, labels = clusters(items=30, views=4, spread=0.4, seed=3)
    x, labels = np.delete(x, [1, 2, 3], axis=0), np.delete(labels, [1, 2, 3])  # 0 is alone, but
    labels[20] = labels[0]  # an image of another item is put beside it
    margin = suspects.label_margins(x, labels).margin
    assert margin.argmax() == 20
    assert margin[20] > 0.5
    assert margin[0] == -np.inf


def test_relabelled_replaces_that_share_by_other_items():
    labels = np.repeat(np.array([3, 8, 20]), 40)
    changed, drawn = suspects.relabelled(labels, share=0.1, seed=4)
    assert drawn.sum() == 12
    assert (changed[drawn] != labels[drawn]).all()
    np.testing.assert_array_equal(changed[~drawn], labels[~drawn])
    assert set(changed) <= {3, 8, 20}


@pytest.mark.parametrize(("share", "spread"), [(0.05, 0.6), (0.1, 1.1)])
def test_the_threshold_finds_planted_labels_and_estimates_their_share(share, spread):
    x, labels = clusters(items=60, views=6, spread=spread, seed=0)
    changed, drawn = suspects.relabelled(labels, share=share, seed=11)
    found = suspects.suspect_labels(x, changed, precision=0.9)
    called = found.margins.margin >= found.threshold
    assert found.wrong == pytest.approx(share, rel=0.3)
    assert (called & drawn).sum() >= 0.9 * called.sum()
    assert (called & drawn).sum() >= 0.65 * drawn.sum()
    assert found.recall == pytest.approx((called & drawn).sum() / drawn.sum(), abs=0.2)


def test_right_labels_are_left_alone():
    x, labels = clusters(items=60, views=6, spread=0.6, seed=1)
    found = suspects.suspect_labels(x, labels, precision=0.9)
    assert found.wrong < 0.005
    assert (found.margins.margin >= found.threshold).sum() <= 1

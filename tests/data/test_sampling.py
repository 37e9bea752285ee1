"""Training batches are balanced, distinct and pure functions of (seed, step)."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest

from mmljax.data import sampling
from mmljax.errors import UserError


def _labels(classes: int, rng: np.random.Generator, fewest: int = 4) -> np.ndarray:
    """Shuffled labels with gaps, classes of many sizes."""
    sizes = rng.integers(fewest, 12, classes)
    return rng.permutation(np.repeat(3 * np.arange(classes) + 5, sizes)).astype(np.int32)


@pytest.mark.parametrize(
    ("classes", "chosen"),
    [(7, 1), (7, 2), (7, 3), (7, 4), (7, 6), (7, 7), (10, 5), (11, 5), (41, 32), (100, 45)],
)
def test_classes_are_drawn_evenly(classes, chosen):
    labels = _labels(classes, np.random.default_rng(0))
    index = sampling.class_index(labels)
    seen = dict.fromkeys(labels.tolist(), 0)
    for step in range(3 * classes):
        batch = sampling.class_balanced_indices(
            index, seed=1, step=step, batch_size=3 * chosen, images_per_class=3
        )
        assert batch.dtype == np.int64
        assert len(set(batch.tolist())) == 3 * chosen
        groups = labels[batch].reshape(chosen, 3)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0].tolist())) == chosen
        for label in groups[:, 0].tolist():
            seen[label] += 1
        assert max(seen.values()) - min(seen.values()) <= 1
    assert sum(seen.values()) == 3 * classes * chosen


def test_a_batch_depends_on_seed_and_step_alone():
    index = sampling.class_index(_labels(23, np.random.default_rng(1)))

    def batch(seed, step):
        return tuple(
            sampling.class_balanced_indices(
                index, seed=seed, step=step, batch_size=20, images_per_class=4
            ).tolist()
        )

    forward = [batch(3, step) for step in range(40)]
    for cached in (sampling._order, sampling._shuffled):
        cached.cache_clear()
    assert [batch(3, step) for step in reversed(range(40))] == forward[::-1]
    assert len(set(forward)) == 40
    assert not set(forward) & {batch(4, step) for step in range(40)}


def test_every_subset_of_a_class_is_equally_likely():
    index = sampling.class_index(np.zeros(5, np.int32))
    draws, pairs = 4000, dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for step in range(draws):
        batch = sampling.class_balanced_indices(
            index, seed=0, step=step, batch_size=2, images_per_class=2
        )
        pairs[tuple(sorted(batch.tolist()))] += 1
    deviation = math.sqrt(draws * 0.1 * 0.9)
    assert all(abs(count - draws / 10) < 5 * deviation for count in pairs.values())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_small_class_repeats_its_images_evenly(size):
    labels = np.array([0] * size + [1] * 9 + [2] * 9, np.int32)
    index = sampling.class_index(labels)
    for step in range(20):
        batch = sampling.class_balanced_indices(
            index, seed=0, step=step, batch_size=21, images_per_class=7
        )
        counts = np.bincount(batch[labels[batch] == 0], minlength=size)
        assert counts.sum() == 7
        assert counts.max() - counts.min() <= 1
        assert len(set(batch[labels[batch] > 0].tolist())) == 14


def test_batches_that_the_classes_cannot_fill():
    index = sampling.class_index(np.repeat(np.arange(6), 5))
    with pytest.raises(UserError, match=r"asks for 7 classes.* has 6; .* at most 24"):
        sampling.class_balanced_indices(index, seed=0, step=0, batch_size=28, images_per_class=4)
    for batch_size, images_per_class in [(10, 4), (0, 4), (8, 0)]:
        with pytest.raises(UserError, match=rf"batch_size={batch_size} is not a multiple of"):
            sampling.check_batch(index, batch_size=batch_size, images_per_class=images_per_class)


def test_ordered_indices_cover_every_image_once():
    batches = [sampling.ordered_indices(11, batch_size=4, step=step) for step in range(3)]
    assert np.concatenate(batches).tolist() == [*range(11), -1]


def test_augmentation_numbers_belong_to_positions():
    numbers = sampling.augmentation_numbers(23, seed=2, step=9, batch_size=64)
    fewer = sampling.augmentation_numbers(23, seed=2, step=9, batch_size=10)
    np.testing.assert_array_equal(numbers[:10], fewer)
    assert len(np.unique(numbers)) == numbers.size
    assert 0 <= numbers.min() < numbers.max() < 1
    other = sampling.augmentation_numbers(23, seed=2, step=10, batch_size=64)
    assert not np.isin(numbers, other).any()


def test_docstring():
    assert doctest.testmod(sampling).failed == 0

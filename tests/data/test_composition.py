"""Composed batches follow the relations, and are pure functions of (seed, step, relations)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from mmljax.config import CompositionConfig, DataConfig
from mmljax.data import sampling
from mmljax.data.composition import (
    Neighbors,
    batch_sampler,
    composed_indices,
    embedded_images,
    table_shapes,
)
from mmljax.errors import UserError

CLASSES, IMAGES = 23, 4


def labels() -> np.ndarray:
    """Shuffled labels of classes of 2 to 9 images."""
    random = np.random.default_rng(0)
    return random.permutation(np.repeat(np.arange(CLASSES), random.integers(2, 10, CLASSES)))


def relations() -> Neighbors:
    """Random relations: every class has other classes, every image an image of another class."""
    random, known = np.random.default_rng(1), labels()
    near = [random.permutation(np.delete(np.arange(CLASSES), c))[:5] for c in range(CLASSES)]
    confused = [random.choice(np.flatnonzero(known != label)) for label in known]
    return Neighbors(np.array(near, np.int32), np.array(confused, np.int32))


def config(rule: str = "proxy", **changes: Any) -> DataConfig:
    return DataConfig(
        batch_size=40,
        images_per_class=IMAGES,
        composition=dataclasses.replace(CompositionConfig(rule=rule), **changes),
    )


def of(rule: str) -> Neighbors:
    both = relations()
    return Neighbors(
        classes=None if rule == "sample" else both.classes,
        images=None if rule == "proxy" else both.images,
    )


def composed(rule: str, step: int, *, group: int = 4, seed: int = 0) -> np.ndarray:
    index = sampling.class_index(labels())
    sizes = {"batch_size": 40, "images_per_class": IMAGES, "group": group}
    return composed_indices(index, of(rule), labels(), seed=seed, step=step, **sizes)


@pytest.mark.parametrize("group", [2, 4, 10])
@pytest.mark.parametrize("rule", ["proxy", "sample", "either"])
def test_groups_are_an_anchor_and_what_the_relations_bring(rule: str, group: int) -> None:
    """A slow second reading of each batch: which class came from where."""
    known, both = labels(), relations()
    for step in range(30):
        batch = composed(rule, step, group=group)
        assert len(batch) == 40
        rows = known[batch].reshape(-1, IMAGES)
        assert (rows == rows[:, :1]).all()
        classes = rows[:, 0].tolist()
        assert len(set(classes)) == 10
        images = dict(zip(classes, batch.reshape(-1, IMAGES).tolist(), strict=True))
        at = 0
        while at < len(classes):
            brought: list[tuple[int, int | None]] = []
            near = [(int(c), None) for c in both.classes[classes[at]]]
            wrong = [(int(known[j]), int(j)) for j in both.images[images[classes[at]]]]
            for turn in range(5):
                brought += near[turn : turn + 1] if rule != "sample" else []
                brought += wrong[turn : turn + 1] if rule != "proxy" else []
            expected: list[tuple[int, int | None]] = []
            for label, image in brought:
                if label not in [*classes[: at + 1], *(e[0] for e in expected)]:
                    expected.append((label, image))
            expected = expected[: min(group - 1, len(classes) - at - 1)]
            found = classes[at + 1 : at + 1 + len(expected)]
            assert found == [label for label, _ in expected]
            assert all(image is None or image in images[label] for label, image in expected)
            at += 1 + len(expected)


@pytest.mark.parametrize("rule", ["proxy", "sample", "either"])
def test_images_of_a_class_are_distinct_or_repeat_evenly(rule: str) -> None:
    known = labels()
    sizes = np.bincount(known)
    for step in range(30):
        for images in composed(rule, step).reshape(-1, IMAGES):
            size = sizes[known[images[0]]]
            counts = np.unique(images, return_counts=True)[1]
            assert len(counts) == min(size, IMAGES)


def test_depends_on_seed_step_and_relations_alone() -> None:
    batches = [composed("either", step).tolist() for step in range(8)]
    assert [composed("either", step).tolist() for step in reversed(range(8))] == batches[::-1]
    assert len({tuple(batch) for batch in batches}) == 8
    assert composed("either", 0, seed=1).tolist() != batches[0]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.35, 1.0])
def test_the_share_of_batches_is_composed_and_no_other_is_left_out(share: float) -> None:
    known, settings = labels(), config(share=share)
    plain = batch_sampler(known, settings, seed=3)
    mixed = batch_sampler(known, settings, seed=3, neighbors=of("proxy"))
    others = iter(range(100))
    kinds = []
    for step in range(60):
        batch = mixed(step).tolist()
        made = composed_indices(
            sampling.class_index(known),
            of("proxy"),
            known,
            seed=3,
            step=step,
            batch_size=40,
            images_per_class=IMAGES,
            group=4,
        )
        kinds.append(batch == made.tolist())
        if not kinds[-1]:
            assert batch == plain(next(others)).tolist()
    for steps in (7, 20, 60):
        assert abs(sum(kinds[:steps]) - share * steps) < 1


def test_an_image_without_a_known_neighbour_brings_none() -> None:
    known = labels()
    nothing = Neighbors(images=np.full(len(known), -1, np.int32))
    index = sampling.class_index(known)
    batch = composed_indices(
        index, nothing, known, seed=0, step=0, batch_size=40, images_per_class=IMAGES, group=4
    )
    assert len(set(known[batch].tolist())) == 10


def test_a_class_without_near_classes_brings_none() -> None:
    near = np.full((CLASSES, 3), -1, np.int32)
    near[:, 0] = (np.arange(CLASSES) + 1) % CLASSES
    sizes = {"batch_size": 16, "images_per_class": IMAGES, "group": 4}
    batch = composed_indices(
        sampling.class_index(labels()), Neighbors(near), labels(), seed=0, step=0, **sizes
    )
    first, second, third, fourth = labels()[batch].reshape(-1, IMAGES)[:, 0].tolist()
    assert (second - first) % CLASSES == (fourth - third) % CLASSES == 1


def test_images_of_a_refresh_are_drawn_by_seed_and_step() -> None:
    known = labels()
    sizes = np.bincount(known)
    drawn = {}
    for seed, step in ((0, 0), (0, 50), (1, 0)):
        images = embedded_images(known, seed=seed, step=step, count=5)
        assert len(set(images.tolist())) == len(images)
        assert (np.diff(known[images]) >= 0).all()
        assert np.bincount(known[images]).tolist() == np.minimum(sizes, 5).tolist()
        assert embedded_images(known, seed=seed, step=step, count=5).tolist() == images.tolist()
        drawn[seed, step] = tuple(images.tolist())
    assert len(set(drawn.values())) == 3
    assert sorted(embedded_images(known, seed=0, step=0, count=99)) == list(range(len(known)))


def test_table_shapes_and_bad_input() -> None:
    shapes = {"classes": (23, 3), "images": (99,)}
    assert table_shapes(config("either"), classes=23, images=99) == shapes
    assert table_shapes(config("none"), classes=1, images=99) == {}
    for rule in ("proxy", "class"):
        assert table_shapes(config(rule), classes=3, images=9) == {"classes": (3, 2)}
    with pytest.raises(UserError, match=r"composition.rule='proxies' is unknown; .*'proxy'"):
        table_shapes(config("proxies"), classes=23, images=99)
    for settings, classes in ((config("sample", group=1), 23), (config("proxy"), 1)):
        with pytest.raises(UserError, match="both must be at least 2"):
            table_shapes(settings, classes=classes, images=99)

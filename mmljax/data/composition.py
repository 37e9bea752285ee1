"""Batches of hard classes: pure functions of ``(seed, step)`` and relations. NumPy only.

An ordinary batch takes its classes in turn (:mod:`mmljax.data.sampling`). A composed batch puts
classes together that are hard to tell apart: an anchor class, drawn at random, beside classes that
are near it by one of these relations,

- ``proxy``: those whose proxies are nearest to its proxy;
- ``class``: those with the images that are nearest to any of its images, which training embeds;
- ``sample``: those of the images that its own drawn images are nearest to, with these very images;
- ``either``: ``proxy`` and ``sample`` in turn, as far as there are any.

The relations are tables that training refreshes from time to time
(:mod:`mmljax.training.neighbors`), and that a checkpoint holds, so a run resumes bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mmljax.config import DataConfig, choose
from mmljax.data import sampling
from mmljax.errors import UserError

RULES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "proxy": ("classes",),
    "class": ("classes",),
    "sample": ("images",),
    "either": ("classes", "images"),
}
"""The tables that each ``data.composition.rule`` uses."""

Sampler = Callable[[int], Int[np.ndarray, " b"]]
"""From the number of a step to the images of its batch."""


class Neighbors(NamedTuple):
    """The two tables; None where the rule does not use it."""

    classes: Int[np.ndarray, "c m"] | None = None  # of each class the nearest ones; -1 for none
    images: Int[np.ndarray, " n"] | None = None  # of each image the nearest of another class; or -1


def table_shapes(config: DataConfig, *, classes: int, images: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tables of :class:`Neighbors` that the config's rule uses.

    Raises:
      UserError: on an unknown rule, or fewer than two classes.
    """
    composition = config.composition
    tables = choose(RULES, composition.rule, key="config.data.composition.rule")
    if tables and min(composition.group, classes) < 2:
        raise UserError(
            f"--config.data.composition.rule={composition.rule} puts different classes together, "
            f"but --config.data.composition.group={composition.group} and the training split has "
            f"{classes}; both must be at least 2"
        )
    shapes = {"classes": (classes, min(composition.group, classes) - 1), "images": (images,)}
    return {name: shapes[name] for name in tables}


def batch_sampler(
    labels: Int[np.ndarray, " n"],
    config: DataConfig,
    *,
    seed: int,
    neighbors: Neighbors | None = None,
) -> Sampler:
    """The images of the training batch of each step.

    Of any number of consecutive steps, ``config.composition.share`` are composed, evenly spread.
    The others are those of :func:`mmljax.data.sampling.class_balanced_indices`, none left out.

    Args:
      labels: of the training split.
      config: sizes and composition.
      seed: not negative.
      neighbors: the relations that ``config.composition.rule`` uses; without them no batch is
        composed.

    Raises:
      UserError: as :func:`mmljax.data.sampling.check_batch`.
    """
    index = sampling.class_index(labels)
    sizes = {"batch_size": config.batch_size, "images_per_class": config.images_per_class}
    sampling.check_batch(index, **sizes)
    share = 0.0 if neighbors is None else config.composition.share

    def sample(step: int) -> Int[np.ndarray, " b"]:
        before = math.floor(step * share)  # composed batches before this step
        if neighbors is None or math.floor((step + 1) * share) == before:
            return sampling.class_balanced_indices(index, seed=seed, step=step - before, **sizes)
        return composed_indices(
            index, neighbors, labels, seed=seed, step=step, group=config.composition.group, **sizes
        )

    return sample


def embedded_images(
    labels: Int[np.ndarray, " n"], *, seed: int, step: int, count: int
) -> Int[np.ndarray, " m"]:
    """The images that a refresh of rule ``class`` embeds, by rising class.

    Args:
      labels: of the images.
      seed: not negative.
      step: at which the tables are refreshed; other steps draw other images.
      count: images of each class, drawn without replacement; all of a smaller class.
    """
    index = sampling.class_index(labels)
    numbers = sampling.generator(seed, sampling.REFRESH, step)
    drawn = sampling.choose_images(numbers, np.diff(index.offsets), count)
    images = np.unique(index.order[index.offsets[:-1, None] + drawn])
    return images[np.argsort(labels[images], kind="stable")]


def composed_indices(
    index: sampling.ClassIndex,
    neighbors: Neighbors,
    labels: Int[np.ndarray, " n"],
    *,
    seed: int,
    step: int,
    batch_size: int,
    images_per_class: int,
    group: int,
) -> Int[np.ndarray, " b"]:
    """Images of one P x K batch of hard classes, the K images of a class side by side.

    Anchor classes are drawn at random. Each brings up to ``group - 1`` others, its nearest first,
    until the batch has P classes; a class that is in the batch already is passed over. The images
    of a class are drawn as :func:`mmljax.data.sampling.class_balanced_indices` draws them. The
    image that brought a class takes the place of one of them, unless it was drawn.

    Args:
      index: of the labels, from :func:`mmljax.data.sampling.class_index`.
      neighbors: at least one of the relations.
      labels: of the images: 0, 1, ... without gaps.
      seed: not negative.
      step: number of the batch.
      batch_size: P x K.
      images_per_class: K.
      group: classes that belong together, the anchor among them.
    """
    numbers = sampling.generator(seed, sampling.COMPOSITION, step)
    classes = len(index.offsets) - 1
    batch: dict[int, np.ndarray] = {}
    chosen = batch_size // images_per_class

    def add(label: int, wanted: int | None = None) -> None:
        start, stop = index.offsets[label : label + 2]
        within = sampling.choose_images(numbers, np.array([stop - start]), images_per_class)[0]
        images = index.order[start + within]
        if wanted is not None and wanted not in images:
            images[-1] = wanted
        batch[label] = images

    for anchor in numbers.permutation(classes).tolist():
        if len(batch) == chosen:
            break
        if anchor in batch:
            continue
        add(anchor)
        room = min(group - 1, chosen - len(batch))
        for label, image in _partners(neighbors, labels, anchor, batch[anchor]):
            if not room:
                break
            if label not in batch:
                add(label, image)
                room -= 1
    return np.concatenate(list(batch.values()))


def _partners(
    neighbors: Neighbors, labels: Int[np.ndarray, " n"], anchor: int, images: np.ndarray
) -> Iterator[tuple[int, int | None]]:
    """The classes that an anchor brings, by either relation in turn, and the image of each."""
    near = [] if neighbors.classes is None else neighbors.classes[anchor].tolist()
    confused = [] if neighbors.images is None else neighbors.images[images].tolist()
    for label, image in itertools.zip_longest(near, confused):
        if label is not None and label >= 0:
            yield label, None
        if image is not None and image >= 0:
            yield int(labels[image]), image

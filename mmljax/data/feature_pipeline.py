"""Batches of features that were made before (:mod:`mmljax.data.readers.features`). No TensorFlow.

Only the rows of a batch are read from the disk, so the features need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mmljax.config import DataConfig
from mmljax.data.array_pipeline import host_batch, one_ahead
from mmljax.data.composition import Neighbors, batch_sampler
from mmljax.data.readers.features import gather
from mmljax.data.sampling import augmentation_numbers, ordered_indices
from mmljax.types import Batch, Split


def train_batches(
    split: Split,
    *,
    config: DataConfig,
    seed: int,
    steps: range,
    rows: slice,
    place: Callable[[Batch], Batch],
    neighbors: Neighbors | None = None,
) -> Iterator[Batch]:
    """P x K batches, one per step: the same images as if the images were read.

    Args:
      split: its ``images`` are features ``[n v f]``.
      config: sizes.
      seed: not negative; the batch of a step depends on ``(seed, step)`` alone.
      steps: numbers of the batches to yield.
      rows: the part of the global batch that this process loads.
      place: from a NumPy batch of those rows to device arrays.
      neighbors: as for ``batch_sampler``.

    Returns:
      Placed batches whose ``images`` are ``[b f]`` float32. Each image has one of its random crops,
      drawn evenly; its evaluation crop if there are no others.

    Raises:
      UserError: at once, as ``batch_sampler``.
    """
    sample = batch_sampler(split.labels, config, seed=seed, neighbors=neighbors)
    crops = split.images.shape[1] - 1

    def make(step: int) -> Batch:
        indices = sample(step)[rows]
        numbers = augmentation_numbers(1, seed=seed, step=step, batch_size=config.batch_size)
        views = np.minimum(1 + (numbers[rows, 0] * crops).astype(np.int64), crops)
        return place(host_batch(split, indices, gather(split.images, indices, views)))

    return one_ahead(map(make, steps))


def eval_batches(
    split: Split, *, config: DataConfig, rows: slice, place: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """The evaluation crop of every image once, in order.

    Args:
      split: its ``images`` are features ``[n v f]``.
      config: sizes.
      rows: the part of each global batch that this process loads.
      place: as for ``train_batches``.

    Returns:
      ``ceil(n / eval_batch_size)`` batches of equal size; the last is padded by rows of label -1
      that are not valid.
    """
    size = config.eval_batch_size

    def make(step: int) -> Batch:
        indices: Any = ordered_indices(len(split.labels), batch_size=size, step=step)[rows]
        views = np.zeros(len(indices), np.int64)
        return place(host_batch(split, indices, gather(split.images, indices, views)))

    return one_ahead(map(make, range(-(-len(split.labels) // size))))

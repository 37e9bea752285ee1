"""Batches from image files or encoded bytes, read and decoded by tf.data.

tf.data only reads, decodes and crops: which images a batch holds and every random number come
from ``sampling``, as pure functions of ``(seed, step)`` and the position in the global batch. So
the batches are the same for any number of threads and processes, and from any first step on.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from jaxtyping import Float, Int

from mmljax.config import DataConfig
from mmljax.data import transforms
from mmljax.data.arrays import check_eval_size, host_batch, one_ahead
from mmljax.data.sampling import (
    augmentation_numbers,
    check_batch,
    class_balanced_indices,
    class_index,
    ordered_indices,
)
from mmljax.errors import UserError
from mmljax.types import Batch, Split

tf.config.set_visible_devices([], "GPU")


class _Rows(NamedTuple):
    """One process's part of a global batch, before reading."""

    indices: Int[np.ndarray, " r"]  # of the images in the split; -1 is padding
    contents: Any  # numpy [r] bytes: of a path, or of an encoded image
    numbers: Float[np.ndarray, "r count"]  # what each image's random crop takes


def train_batches(
    split: Split,
    *,
    config: DataConfig,
    seed: int,
    steps: range,
    rows: slice,
    place: Callable[[Batch], Batch],
) -> Iterator[Batch]:
    """Randomly cropped P x K batches, one per step.

    Args:
      split: its images are paths (local, or of any file system that TensorFlow knows, such as
        ``gs://``), or the bytes of image files.
      config: sizes, augmentation, threads. ``rotate`` and ``shear`` play no part.
      seed: not negative; the batch of a step depends on ``(seed, step)`` alone.
      steps: numbers of the batches to yield.
      rows: the part of the global batch that this process loads; no other row is read.
      place: from a NumPy batch of those rows to device arrays.

    Returns:
      Placed batches, images ``[b image_size image_size 3]`` uint8; each is placed while the one
      before it is in use.

    Raises:
      UserError: at once, if the classes cannot fill such a batch; while iterating, if an image
        cannot be read or decoded.
    """
    index = class_index(split.labels)
    sizes = {"batch_size": config.batch_size, "images_per_class": config.images_per_class}
    check_batch(index, **sizes)
    crop = functools.partial(
        transforms.random_crop,
        image_size=config.image_size,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip=config.flip,
    )

    def plan(step: int) -> _Rows:
        indices = class_balanced_indices(index, seed=seed, step=step, **sizes)
        numbers = augmentation_numbers(
            transforms.NUMBERS, seed=seed, step=step, batch_size=config.batch_size
        )
        return _rows(split, indices[rows], numbers[rows])

    return one_ahead(map(place, _read(split, plan, steps, crop=crop, config=config)))


def eval_batches(
    split: Split, *, config: DataConfig, rows: slice, place: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Every image once, in order, resized and cropped at the centre.

    Args:
      split: as for ``train_batches``.
      config: sizes, threads.
      rows: the part of each global batch that this process loads.
      place: as for ``train_batches``.

    Returns:
      ``ceil(n / eval_batch_size)`` batches of equal size; the last is padded by black images with
      label -1 that are not valid.

    Raises:
      UserError: at once, if the crop is larger than the resized image; while iterating, if an
        image cannot be read or decoded.
    """
    check_eval_size(config)
    size = config.eval_batch_size

    def crop(contents: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        del numbers
        return transforms.center_crop(
            contents, resize_size=config.resize_size, image_size=config.image_size
        )

    def plan(step: int) -> _Rows:
        indices = ordered_indices(len(split.labels), batch_size=size, step=step)[rows]
        return _rows(split, indices, np.zeros((len(indices), transforms.NUMBERS)))

    steps = range(-(-len(split.labels) // size))
    return one_ahead(map(place, _read(split, plan, steps, crop=crop, config=config)))


def _rows(split: Split, indices: Int[np.ndarray, " r"], numbers: np.ndarray) -> _Rows:
    contents = np.empty(len(indices), object)
    contents[:] = [os.fsencode(split.images[i]) if i >= 0 else b"" for i in indices]
    return _Rows(indices, contents, numbers)


def _read(
    split: Split,
    plan: Callable[[int], _Rows],
    steps: range,
    *,
    crop: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    config: DataConfig,
) -> Iterator[Batch]:
    """NumPy batches of the rows that are planned for each step, ``prefetch`` of them ahead."""
    decode = _decoder(_reader(split), crop, config)

    def make(step: int) -> Batch:
        rows = plan(step)
        try:
            images = decode(rows).numpy()
        except tf.errors.OpError:
            _find_culprit(split, rows, crop=crop)
            raise
        return host_batch(split, rows.indices, images)

    # Two batches at a time, so that no thread idles while a batch waits for its last image.
    pool = concurrent.futures.ThreadPoolExecutor(2)
    pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
    try:
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > config.prefetch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decoder(
    read: Callable[[tf.Tensor], tf.Tensor],
    crop: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    config: DataConfig,
) -> Callable[[_Rows], tf.Tensor]:
    """Rows to images ``[r image_size image_size 3]``: one graph, traced once.

    tf.data runs within the graph and calls no Python: an iterator over a Python generator can
    block the interpreter's exit when it is left before its end.
    """
    shape = [config.image_size, config.image_size, 3]

    def load(rows: _Rows) -> tf.Tensor:
        image = tf.cond(
            rows.indices >= 0,
            lambda: crop(read(rows.contents), rows.numbers),
            lambda: tf.zeros(shape, tf.uint8),
        )
        return tf.ensure_shape(image, shape)

    @tf.function(reduce_retracing=True)
    def decode(rows: _Rows) -> tf.Tensor:
        dataset = tf.data.Dataset.from_tensor_slices(rows)
        threads = config.threads or os.cpu_count()
        dataset = dataset.map(load, num_parallel_calls=threads, deterministic=True)
        return dataset.batch(len(rows.indices)).get_single_element()

    return decode


def _reader(split: Split) -> Callable[[tf.Tensor], tf.Tensor]:
    encoded = len(split.images) > 0 and isinstance(split.images[0], bytes)
    return tf.identity if encoded else tf.io.read_file


def _find_culprit(
    split: Split, rows: _Rows, *, crop: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> None:
    """Go through a batch that failed, image by image, and name the one that fails again."""
    read = _reader(split)
    for index, contents, numbers in zip(*rows, strict=True):
        if index < 0:
            continue
        name = f"image {split.names[index]}"
        if read is tf.io.read_file:
            name += f" ({split.images[index]})"
        try:
            data = read(contents)
        except tf.errors.OpError as error:
            raise UserError(
                f"{name} cannot be read ({type(error).__name__}); restore the file or point "
                "--config.data.directory at a complete copy of the data"
            ) from error
        try:
            crop(data, tf.constant(numbers))
        except tf.errors.OpError as error:
            raise UserError(
                f"{name} cannot be decoded: its {len(data.numpy())} bytes are no whole JPEG, PNG, "
                "GIF or BMP image; fetch the file again or take it off the data set's list"
            ) from error

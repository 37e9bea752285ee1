"""Batches from image files or encoded bytes, read and decoded by tf.data.

tf.data only reads, decodes and crops: which images a batch holds and every random number come
from ``sampling``, as pure functions of ``(seed, step)`` and the position in the global batch. So
the batches are the same for any number of threads and processes, and from any first step on.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from jaxtyping import Float, Int

from mmljax.config import DataConfig, choose
from mmljax.data import transforms
from mmljax.data.array_pipeline import check_eval_size, host_batch, one_ahead
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

_log = logging.getLogger(__name__)

_Crop = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # (contents, numbers) -> image
_Others = Callable[[int], Int[np.ndarray, " m"]]  # what may take the place of an image


class _Undecodable(UserError):
    """An image that could be read, but not decoded."""


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
      config: sizes, augmentation, threads. ``rotate`` and ``shear`` play no part. With ``corrupt``
        ``skip`` the next image of the class that can be decoded takes the place of one that cannot
        (in the order of the split, from the first on again after the last), under the same random
        numbers, and a warning tells of each such image once.
      seed: not negative; the batch of a step depends on ``(seed, step)`` alone.
      steps: numbers of the batches to yield.
      rows: the part of the global batch that this process loads; no other row is read.
      place: from a NumPy batch of those rows to device arrays.

    Returns:
      Placed batches, images ``[b image_size image_size 3]`` uint8; each is placed while the one
      before it is in use.

    Raises:
      UserError: at once, if the classes cannot fill such a batch; while iterating, if an image
        cannot be read, or cannot be decoded and is not to be skipped, or no other of its class can.
    """
    skip = choose({"error": False, "skip": True}, config.corrupt, key="config.data.corrupt")
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

    def others(image: int) -> Int[np.ndarray, " m"]:
        same = np.flatnonzero(split.labels == split.labels[image])
        return np.roll(same, -1 - np.searchsorted(same, image))[:-1]

    made = _read(split, plan, steps, crop=crop, config=config, others=others if skip else None)
    return one_ahead(map(place, made))


def eval_batches(
    split: Split, *, config: DataConfig, rows: slice, place: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Every image once, in order, resized and cropped at the centre.

    None is ever skipped: scores of other images are those of another benchmark.

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
    crop: _Crop,
    config: DataConfig,
    others: _Others | None = None,
) -> Iterator[Batch]:
    """NumPy batches of the rows that are planned for each step, ``prefetch`` of them ahead.

    Where an image cannot be decoded, one of ``others`` takes its place, if they are given.
    """
    decode = _decoder(_reader(split), crop, config)

    def make(step: int) -> tuple[Batch, dict[int, str]]:
        rows = plan(step)
        decoded, images = (tensor.numpy()[1:] for tensor in decode(rows))
        if len(decoded) == len(rows.indices):
            return host_batch(split, rows.indices, images), {}
        images, skipped = _mend(split, rows, decoded, images, crop=crop, others=others)
        return host_batch(split, rows.indices, images), skipped

    # Two batches at a time, so that no thread idles while a batch waits for its last image.
    pool = concurrent.futures.ThreadPoolExecutor(2)
    pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    told: set[int] = set()

    def finish() -> Batch:
        batch, skipped = pending.popleft().result()
        for image, why in skipped.items():
            if image not in told:
                told.add(image)
                _log.warning(
                    "%s; another image of its class takes its place (%d so far)", why, len(told)
                )
        return batch

    try:
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > config.prefetch:
                yield finish()
        while pending:
            yield finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _decoder(
    read: Callable[[tf.Tensor], tf.Tensor], crop: _Crop, config: DataConfig
) -> Callable[[_Rows], tuple[tf.Tensor, tf.Tensor]]:
    """Rows to those that could be decoded, ``[1 + m]``, and their images: one graph, traced once.

    Both begin with an entry that is none of the rows, so that they are never empty.

    tf.data runs within the graph and calls no Python: an iterator over a Python generator can
    block the interpreter's exit when it is left before its end.
    """
    shape = [config.image_size, config.image_size, 3]
    nothing = -1, np.zeros(shape, np.uint8)

    def load(row: tf.Tensor, rows: _Rows) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.cond(
            rows.indices >= 0,
            lambda: crop(read(rows.contents), rows.numbers),
            lambda: tf.zeros(shape, tf.uint8),
        )
        return row, tf.ensure_shape(image, shape)

    @tf.function(reduce_retracing=True)
    def decode(rows: _Rows) -> tuple[tf.Tensor, tf.Tensor]:
        count = len(rows.indices)
        dataset = tf.data.Dataset.from_tensor_slices((tf.range(count), rows))
        threads = config.threads or os.cpu_count()
        dataset = dataset.map(load, num_parallel_calls=threads, deterministic=True)
        dataset = tf.data.Dataset.from_tensors(nothing).concatenate(dataset.ignore_errors())
        return dataset.batch(count + 1).get_single_element()

    return decode


def _reader(split: Split) -> Callable[[tf.Tensor], tf.Tensor]:
    encoded = len(split.images) > 0 and isinstance(split.images[0], bytes)
    return tf.identity if encoded else tf.io.read_file


def _mend(
    split: Split,
    rows: _Rows,
    decoded: Int[np.ndarray, " m"],
    images: np.ndarray,
    *,
    crop: _Crop,
    others: _Others | None,
) -> tuple[np.ndarray, dict[int, str]]:
    """All images of a batch of which some failed, and why the ones were skipped that were.

    What fails depends on the image and its random numbers alone, so the batch does too.
    """
    whole = np.empty((len(rows.indices), *images.shape[1:]), np.uint8)
    whole[decoded] = images
    skipped = {}
    for row in np.setdiff1d(np.arange(len(whole)), decoded):
        image, numbers = int(rows.indices[row]), rows.numbers[row]
        try:
            whole[row] = _decode_one(split, image, numbers, crop=crop)
        except _Undecodable as error:
            if others is None:
                raise
            skipped[image] = str(error)
            whole[row] = _decode_first(split, others(image), numbers, crop=crop, instead=error)
    return whole, skipped


def _decode_first(
    split: Split,
    candidates: Int[np.ndarray, " m"],
    numbers: Float[np.ndarray, " count"],
    *,
    crop: _Crop,
    instead: _Undecodable,
) -> np.ndarray:
    """The first of some images that can be decoded."""
    for image in candidates:
        with contextlib.suppress(_Undecodable):
            return _decode_one(split, int(image), numbers, crop=crop)
    raise UserError(f"{instead}; nor can any other of its class")


def _decode_one(
    split: Split, image: int, numbers: Float[np.ndarray, " count"], *, crop: _Crop
) -> np.ndarray:
    """One image, or an error that names it and says what is wrong with it."""
    read = _reader(split)
    name = f"image {split.names[image]}"
    if read is tf.io.read_file:
        name += f" ({split.images[image]})"
    try:
        contents = read(tf.constant(os.fsencode(split.images[image])))
    except tf.errors.OpError as error:
        raise UserError(
            f"{name} cannot be read ({type(error).__name__}); restore the file or point "
            "--config.data.directory at a complete copy of the data"
        ) from error
    try:
        height, width = transforms.stated_shape(contents).numpy().tolist()
        if height * width > transforms.MAX_PIXELS:
            raise _Undecodable(
                f"{name} cannot be decoded: it states {width} x {height} pixels, and more than "
                f"{transforms.MAX_PIXELS:,} are refused; store it smaller or take it off the data "
                "set's list"
            )
        return crop(contents, tf.constant(numbers)).numpy()
    except tf.errors.OpError as error:
        raise _Undecodable(
            f"{name} cannot be decoded: its {len(contents.numpy())} bytes are no whole JPEG, PNG, "
            "GIF or BMP image; fetch the file again or take it off the data set's list"
        ) from error

"""Batches from image files or encoded bytes, read and decoded by tf.data.

tf.data only reads, decodes and crops: which images a batch holds and every random number come
from ``sampling``, as pure functions of ``(seed, step)`` and the position in the global batch. So
the batches are the same for any number of threads and processes, and from any first step on. The
further augmentation runs on the devices (:mod:`mmljax.data.augmentation`).

The pixels decoded at once are bounded. An image that takes more than its share of ``_BUDGET`` is
not decoded within tf.data, but afterwards, when ``_BUDGET`` has room for it. So is an image that
needs Pillow (:mod:`mmljax.data.decoding`), since the graph of tf.data calls no Python.
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

import jax
import numpy as np
import tensorflow as tf
from jaxtyping import Bool, Float, Int, UInt8

from mmljax.config import DataConfig, choose
from mmljax.data import decoding, transforms
from mmljax.data.array_pipeline import host_batch, one_ahead
from mmljax.data.augmentation import train_augmentation
from mmljax.data.composition import Neighbors, batch_sampler
from mmljax.data.headers import needs_pillow, stated_shape
from mmljax.data.limits import PixelBudget, check_sizes
from mmljax.data.sampling import augmentation_numbers, ordered_indices
from mmljax.data.tensorflow_devices import import_tensorflow
from mmljax.errors import UserError
from mmljax.types import Batch, Split

import_tensorflow()

_log = logging.getLogger(__name__)

_BUDGET = PixelBudget(2**27)  # at most 0.8 GB: 6 bytes a pixel, decoded and cropped
_NEEDS_PILLOW = tf.function(needs_pillow, autograph=False)
_STATED_SHAPE = tf.function(stated_shape, autograph=False)
_PLANNED = 16  # images whose windows are chosen at once; as many files are in memory
_BATCHES = 2  # made at a time, so that no thread idles while a batch waits for its last image

_Others = Callable[[int], Int[np.ndarray, " m"]]  # candidates to replace an image


class _Undecodable(UserError):
    """An image that was read, but cannot be decoded."""


class _Rows(NamedTuple):
    """One process's part of a global batch, before reading."""

    indices: Int[np.ndarray, " r"]  # of the images in the split; -1 is padding
    contents: Any  # numpy [r] bytes: of a path, or of an encoded image
    numbers: Float[np.ndarray, "r count"]  # for the random crop of each image


def train_batches(
    split: Split,
    *,
    config: DataConfig,
    seed: int,
    steps: range,
    rows: slice,
    place: Callable[[Batch], Batch],
    neighbors: Neighbors | None = None,
    skipped: dict[int, int] | None = None,
) -> Iterator[Batch]:
    """Randomly cropped P x K batches, one per step.

    Args:
      split: its images are paths (local, or of any file system that TensorFlow knows, such as
        ``gs://``), or the bytes of image files.
      config: sizes, augmentation, threads. ``rotate`` and ``shear`` are not used. With ``corrupt``
        ``skip`` an image that cannot be decoded is replaced by the next one of its class that can
        (in the order of the split, cyclic), under the same random numbers, with one warning per
        such image.
      seed: not negative; the batch of a step depends on ``(seed, step)`` alone.
      steps: numbers of the batches to yield.
      rows: the part of the global batch that this process loads; no other row is read.
      place: from a NumPy batch of those rows to device arrays.
      neighbors: as for ``batch_sampler``.
      skipped: receives by step how many images of these rows were replaced, where any was, before
        the batch is yielded.

    Returns:
      Placed batches, images ``[b image_size image_size 3]`` uint8; each is placed while the one
      before it is in use.

    Raises:
      UserError: at once, as ``check_sizes`` and ``batch_sampler``; while iterating, if an image
        cannot be read, cannot be decoded and is not to be skipped, or has no replacement.
    """
    skip = choose({"error": False, "skip": True}, config.corrupt, key="config.data.corrupt")
    check_sizes(config, processes=jax.process_count())
    sample = batch_sampler(split.labels, config, seed=seed, neighbors=neighbors)
    crop = _crop(config, random=True)

    def plan(step: int) -> _Rows:
        indices = sample(step)
        numbers = augmentation_numbers(
            transforms.NUMBERS, seed=seed, step=step, batch_size=config.batch_size
        )
        return _rows(split, indices[rows], numbers[rows])

    def others(image: int) -> Int[np.ndarray, " m"]:
        same = np.flatnonzero(split.labels == split.labels[image])
        return np.roll(same, -1 - np.searchsorted(same, image))[:-1]

    def finish(batch: Batch, step: int) -> Batch:
        return augmented(place(batch), step)

    first = range(config.batch_size)[rows].start
    augmented = train_augmentation(config, channels=3, seed=seed, first=first)
    instead = others if skip else None
    made = _read(split, plan, steps, crop=crop, config=config, others=instead, skipped=skipped)
    return one_ahead(map(finish, made, steps))


def eval_batches(
    split: Split, *, config: DataConfig, rows: slice, place: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Every image once, in order, resized and cropped at the centre.

    No image is ever skipped, since scores of other images belong to another benchmark.

    Args:
      split: as for ``train_batches``.
      config: sizes, threads.
      rows: the part of each global batch that this process loads.
      place: as for ``train_batches``.

    Returns:
      ``ceil(n / eval_batch_size)`` batches of equal size; the last is padded by black images with
      label -1 that are not valid.

    Raises:
      UserError: at once, as ``check_sizes``; while iterating, if an image cannot be read or
        decoded.
    """
    steps = range(-(-len(split.labels) // config.eval_batch_size))
    return ordered_batches(
        split, config=config, seed=0, view=0, steps=steps, rows=rows, place=place
    )


def ordered_batches(
    split: Split,
    *,
    config: DataConfig,
    seed: int,
    view: int,
    steps: range,
    rows: slice,
    place: Callable[[Batch], Batch],
) -> Iterator[Batch]:
    """Some batches of :func:`eval_batches`, in evaluation's crop or in random crops.

    Args:
      split: as for ``train_batches``.
      config: sizes, augmentation, threads.
      seed: of the random crops.
      view: 0 for the evaluation crop; another number for random ones, each with its own.
      steps: numbers of the batches to yield.
      rows: as for ``train_batches``.
      place: as for ``train_batches``.

    Raises:
      UserError: as ``eval_batches``.
    """
    check_sizes(config, processes=jax.process_count())
    size = config.eval_batch_size
    batches = -(-len(split.labels) // size)

    def plan(step: int) -> _Rows:
        indices = ordered_indices(len(split.labels), batch_size=size, step=step)
        numbers = np.zeros((size, transforms.NUMBERS))
        if view:
            numbers = augmentation_numbers(
                transforms.NUMBERS,
                seed=seed,
                step=(view - 1) * batches + step,
                batch_size=size,
            )
        return _rows(split, indices[rows], numbers[rows])

    crop = _crop(config, random=view > 0)
    made = _read(split, plan, steps, crop=crop, config=config)
    if not view:
        return one_ahead(map(place, made))
    first = range(size)[rows].start
    augmented = train_augmentation(config, channels=3, seed=seed, first=first)

    def finish(batch: Batch, step: int) -> Batch:
        return augmented(place(batch), (view - 1) * batches + step)

    return one_ahead(map(finish, made, steps))


def decodable(split: Split, config: DataConfig) -> Bool[np.ndarray, " n"]:
    """Which images can be read and decoded, each tried as an evaluation would decode it."""
    crop = _crop(config, random=False)
    decode = _decoder(_reader(split), crop, config)
    size, count = config.eval_batch_size, len(split.labels)
    valid = np.zeros(count, bool)
    for step in range(-(-count // size)):
        indices = ordered_indices(count, batch_size=size, step=step)
        rows = _rows(split, indices, np.zeros((size, transforms.NUMBERS)))
        decoded, _ = decode(rows)
        found = rows.indices[decoded]
        valid[found[found >= 0]] = True
        for row in np.setdiff1d(np.arange(len(rows.indices)), decoded):
            with contextlib.suppress(UserError):
                _decode_one(split, int(rows.indices[row]), rows.numbers[row], crop=crop)
                valid[rows.indices[row]] = True
    return valid


def evaluation_crop(split: Split, row: int, config: DataConfig) -> UInt8[np.ndarray, "s s 3"]:
    """One image, decoded and cropped as an evaluation does it.

    Raises:
      UserError: naming the image, if it cannot be read or decoded.
    """
    numbers = np.zeros(transforms.NUMBERS)
    return _decode_one(split, row, numbers, crop=_crop(config, random=False))


_Crop = transforms.RandomCrop | transforms.CenterCrop


def _crop(config: DataConfig, *, random: bool) -> _Crop:
    if not random:
        return transforms.CenterCrop(config.image_size, config.resize_size, config.resampling)
    return transforms.RandomCrop(
        config.image_size, config.crop_scale, config.crop_ratio, config.flip, config.resampling
    )


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
    skipped: dict[int, int] | None = None,
) -> Iterator[Batch]:
    """NumPy batches of the rows planned for each step, ``prefetch`` of them ahead.

    An image that cannot be decoded is replaced by one of ``others``, if they are given, and counted
    in ``skipped``.
    """
    decode = _decoder(_reader(split), crop, config)

    def make(step: int) -> tuple[Batch, dict[int, str]]:
        rows = plan(step)
        decoded, images = decode(rows)
        images, replaced = _complete(
            split, rows, decoded, images, crop=crop, others=others, threads=_threads(config)
        )
        return host_batch(split, rows.indices, images), replaced

    pool = concurrent.futures.ThreadPoolExecutor(_BATCHES)
    pending: collections.deque[tuple[int, concurrent.futures.Future[Any]]] = collections.deque()
    warned: set[int] = set()

    def finish() -> Batch:
        step, made = pending.popleft()
        batch, replaced = made.result()
        if skipped is not None and replaced:
            skipped[step] = len(replaced)
        for image, why in replaced.items():
            if image not in warned:
                warned.add(image)
                _log.warning(
                    "%s; another image of its class takes its place (%d so far)", why, len(warned)
                )
        return batch

    try:
        for step in steps:
            pending.append((step, pool.submit(make, step)))
            if len(pending) > config.prefetch:
                yield finish()
        while pending:
            yield finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _decoder(
    read: Callable[[tf.Tensor], tf.Tensor], crop: _Crop, config: DataConfig
) -> Callable[[_Rows], tuple[Int[np.ndarray, " m"], np.ndarray]]:
    """A function from rows to those that were decoded, ascending, and their images.

    Images that take more pixels than their share of the budget, that need Pillow, or that cannot be
    decoded, are missing. What is no plain JPEG is decoded after the others, and read again: in one
    graph for all files, plain ones would take half as long again.
    """
    threads = _threads(config)
    share = _BUDGET.limit // (_BATCHES * threads)
    plain, general = (
        _graph(crop, read=read, threads=threads, share=share, plain=plain)
        for plain in (True, False)
    )

    def decode(rows: _Rows) -> tuple[Int[np.ndarray, " m"], np.ndarray]:
        padding, wanted = np.flatnonzero(rows.indices < 0), np.flatnonzero(rows.indices >= 0)
        decoded, images = (np.asarray(memoryview(tensor))[1:] for tensor in plain(rows, wanted))
        if len(decoded) == len(rows.indices):
            return decoded, images
        more, others = (
            np.asarray(memoryview(tensor))[1:]
            for tensor in general(rows, np.setdiff1d(wanted, decoded))
        )
        black = np.zeros((len(padding), *images.shape[1:]), np.uint8)
        decoded = np.concatenate([decoded, more, padding])
        order = np.argsort(decoded)
        return decoded[order], np.concatenate([images, others, black])[order]

    return decode


@functools.lru_cache(maxsize=32)  # a graph takes about a second to make
def _graph(
    crop: _Crop, *, read: Callable[[tf.Tensor], tf.Tensor], threads: int, share: int, plain: bool
) -> Callable[[_Rows, Int[np.ndarray, " w"]], tuple[tf.Tensor, tf.Tensor]]:
    """A function from rows, and which are wanted, to those decoded, ``[1 + m]``, and their images.

    Both begin with an entry that is none of the rows, so that they are never empty.

    tf.data runs within one graph, traced once, and calls no Python: an iterator over a Python
    generator can block the interpreter's exit when it is not exhausted.
    """
    nothing = np.int64(-1), np.zeros([crop.image_size, crop.image_size, 3], np.uint8)

    def head(row: tf.Tensor, contents: tf.Tensor, numbers: tf.Tensor) -> Any:
        contents = read(contents)
        header = transforms.header(contents, numbers, crop=crop, plain=plain)
        return row, contents, header, numbers

    def plan(row: tf.Tensor, *several: Any) -> Any:
        return row, *transforms.plan(*several, crop=crop, decoded_pixels=share)

    def load(row: tf.Tensor, contents: tf.Tensor, planned: transforms.Plan) -> Any:
        return row, transforms.picture(contents, planned, crop=crop, plain=plain)

    signature = [
        tf.TensorSpec([None], tf.string),
        tf.TensorSpec([None, transforms.NUMBERS], tf.float64),
        tf.TensorSpec([None], tf.int64),
    ]

    @tf.function(input_signature=signature, autograph=False)
    def decode(contents: tf.Tensor, numbers: tf.Tensor, wanted: tf.Tensor) -> Any:
        dataset = tf.data.Dataset.from_tensor_slices((wanted, contents, numbers))
        dataset = dataset.map(head, num_parallel_calls=threads, deterministic=True).ignore_errors()
        dataset = dataset.batch(_PLANNED).map(plan).unbatch()
        dataset = dataset.map(load, num_parallel_calls=threads, deterministic=True)
        dataset = tf.data.Dataset.from_tensors(nothing).concatenate(dataset.ignore_errors())
        return dataset.batch(tf.size(wanted, out_type=tf.int64) + 1).get_single_element()

    return lambda rows, wanted: decode(rows.contents[wanted], rows.numbers[wanted], wanted)


def _threads(config: DataConfig) -> int:
    return config.threads or os.cpu_count() or 1


def _reader(split: Split) -> Callable[[tf.Tensor], tf.Tensor]:
    encoded = len(split.images) > 0 and isinstance(split.images[0], bytes)
    return tf.identity if encoded else tf.io.read_file


def _complete(
    split: Split,
    rows: _Rows,
    decoded: Int[np.ndarray, " m"],
    images: np.ndarray,
    *,
    crop: _Crop,
    others: _Others | None,
    threads: int,
) -> tuple[np.ndarray, dict[int, str]]:
    """All images of a batch of which some are missing, and why some of them were replaced.

    Whether an image fails depends on it and on its random numbers alone, so the batch does too.
    """
    missing = np.setdiff1d(np.arange(len(rows.indices)), decoded)
    if not len(missing):
        return images, {}
    whole = np.empty((len(rows.indices), *images.shape[1:]), np.uint8)
    whole[decoded] = images

    def decode(row: int) -> str:
        image, numbers = int(rows.indices[row]), rows.numbers[row]
        try:
            whole[row] = _decode_one(split, image, numbers, crop=crop)
        except _Undecodable as error:
            if others is None:
                raise
            whole[row] = _decode_first(split, others(image), numbers, crop=crop, instead=error)
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        reasons = list(pool.map(decode, missing))
    return whole, {
        int(rows.indices[row]): why for row, why in zip(missing, reasons, strict=True) if why
    }


def _decode_first(
    split: Split,
    candidates: Int[np.ndarray, " m"],
    numbers: Float[np.ndarray, " count"],
    *,
    crop: _Crop,
    instead: _Undecodable,
) -> np.ndarray:
    """The first of the candidates that can be decoded."""
    for image in candidates:
        with contextlib.suppress(_Undecodable):
            return _decode_one(split, int(image), numbers, crop=crop)
    raise UserError(f"{instead}; no other image of its class can be decoded")


def _decode_one(
    split: Split, image: int, numbers: Float[np.ndarray, " count"], *, crop: _Crop
) -> np.ndarray:
    """One image, decoded within the pixel budget.

    Raises:
      UserError: naming the image, if it cannot be read; an ``_Undecodable`` if not decoded.
    """
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
    stored: bytes = contents.numpy()
    try:
        height, width = _stated_shape(stored)
        if height * width > decoding.MAX_PIXELS:
            raise _Undecodable(
                f"{name} cannot be decoded: it states {width} x {height} pixels, and more than "
                f"{decoding.MAX_PIXELS:,} are refused; store it smaller or remove it from the "
                "data set's list"
            )
        by_pillow = bool(_NEEDS_PILLOW(contents))
        with _BUDGET.taken(height * width * (2 if by_pillow else 1)):
            if by_pillow:
                contents = tf.constant(decoding.upright_bmp(stored))
            return _alone(crop)(contents, tf.constant(numbers)).numpy()
    except (tf.errors.OpError, decoding.NotAnImage) as error:
        raise _Undecodable(f"{name} cannot be decoded: {decoding.refusal(stored)}") from error


def _stated_shape(contents: bytes) -> tuple[int, int]:
    """Height and width that the header of an image file states."""
    if decoding.is_avif(contents):
        return decoding.avif_shape(contents)
    height, width = _STATED_SHAPE(tf.constant(contents)).numpy().tolist()
    return height, width


@functools.lru_cache(maxsize=32)
def _alone(crop: _Crop) -> Callable[..., tf.Tensor]:
    """The crop as one graph."""
    alone = functools.partial(
        transforms.cropped, crop=crop, decoded_pixels=decoding.MAX_PIXELS, plain=False
    )
    found: Callable[..., tf.Tensor] = tf.function(alone, autograph=False)
    return found

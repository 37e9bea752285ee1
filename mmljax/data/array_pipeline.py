"""Batches from uint8 arrays in host memory, augmented on the device. No TensorFlow.

The host only gathers rows; one compiled function per batch then crops, rotates, shears and flips
by a single affine resampling. The random numbers of an image depend on ``(seed, step, position in
the global batch)`` alone, so they are the same on any number of devices and after any restart.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8, UInt32

from mmljax.config import DataConfig
from mmljax.data.affine import affine_matrix, affine_resample
from mmljax.data.augmentation import train_augmentation
from mmljax.data.composition import Neighbors, batch_sampler
from mmljax.data.limits import check_sizes
from mmljax.data.sampling import ordered_indices
from mmljax.types import Batch, Split

_TRIES = 10
_METHODS = {"bilinear": "linear", "bicubic": "cubic"}  # of jax.image.resize

_T = TypeVar("_T")


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
    """Augmented P x K batches, one per step.

    Args:
      split: its images are ``[n height width channels]`` uint8.
      config: sizes and augmentation.
      seed: not negative; the batch of a step depends on ``(seed, step)`` alone.
      steps: numbers of the batches to yield.
      rows: the part of the global batch that this process loads.
      place: from a NumPy batch of those rows to device arrays, of the rows or of the global batch.
      neighbors: as for ``batch_sampler``.

    Returns:
      Batches of device arrays, images ``[b image_size image_size channels]`` uint8; each is made
      while the previous one is in use.

    Raises:
      UserError: at once, as ``check_sizes``, ``batch_sampler`` and ``train_augmentation``.
    """
    check_sizes(config, processes=jax.process_count())
    sample = batch_sampler(split.labels, config, seed=seed, neighbors=neighbors)
    position = range(config.batch_size)[rows]
    augmented = train_augmentation(
        config, channels=split.images.shape[-1], seed=seed, first=position.start
    )

    def make(step: int) -> Batch:
        indices = sample(step)[rows]
        batch = place(host_batch(split, indices, split.images[indices]))
        first = 0 if len(batch.images) == config.batch_size else position.start
        return augmented(_cropped(batch, config, seed=seed, step=step, first=first), step)

    return one_ahead(map(make, steps))


def eval_batches(
    split: Split, *, config: DataConfig, rows: slice, place: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Every image once, in order, resized and cropped at the centre.

    Args:
      split: its images are ``[n height width channels]`` uint8.
      config: sizes.
      rows: the part of each global batch that this process loads.
      place: as for ``train_batches``.

    Returns:
      ``ceil(n / eval_batch_size)`` batches of equal size; the last is padded by black images with
      label -1 that are not valid.

    Raises:
      UserError: at once, as ``check_sizes``.
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
      split: as for ``eval_batches``.
      config: sizes and augmentation.
      seed: of the random crops.
      view: 0 for the evaluation crop; another number for random ones, each with its own.
      steps: numbers of the batches to yield.
      rows: as for ``eval_batches``.
      place: as for ``eval_batches``.

    Raises:
      UserError: at once, as ``check_sizes``.
    """
    check_sizes(config, processes=jax.process_count())
    size = config.eval_batch_size
    batches = -(-len(split.labels) // size)
    start = range(size)[rows].start
    augmented = train_augmentation(config, channels=split.images.shape[-1], seed=seed, first=start)

    def make(step: int) -> Batch:
        indices = ordered_indices(len(split.labels), batch_size=size, step=step)[rows]
        images = split.images[indices]
        images[indices < 0] = 0
        batch = place(host_batch(split, indices, images))
        if view:
            first = 0 if len(batch.images) == size else start
            step = (view - 1) * batches + step
            return augmented(_cropped(batch, config, seed=seed, step=step, first=first), step)
        cropped = resize_and_crop(
            batch.images,
            resize_size=config.resize_size,
            image_size=config.image_size,
            resampling=config.resampling,
        )
        return batch._replace(images=cropped)

    return one_ahead(map(make, steps))


def _cropped(batch: Batch, config: DataConfig, *, seed: int, step: int, first: int) -> Batch:
    """A batch with its images cropped and flipped at random as the config says."""
    images = augment(
        batch.images,
        seed=jnp.uint32(seed),
        step=jnp.uint32(step),
        first=first,
        image_size=config.image_size,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        rotate=config.rotate,
        shear=config.shear,
        flip=config.flip,
    )
    return batch._replace(images=images)


def host_batch(split: Split, indices: Int[np.ndarray, " b"], images: np.ndarray) -> Batch:
    """Images with their labels, in NumPy; index -1 is padding, with label -1 and not valid."""
    valid = indices >= 0
    labels = np.where(valid, split.labels[indices], -1).astype(np.int32)
    host: Any = (images, labels, valid)
    return Batch(*host)


def one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yield each item once the next one is made, so that their work overlaps."""
    waiting: collections.deque[_T] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


@functools.partial(
    jax.jit,
    static_argnames=(
        "first",
        "image_size",
        "crop_scale",
        "crop_ratio",
        "rotate",
        "shear",
        "flip",
    ),
)
def augment(
    images: UInt8[Array, "b h w ch"],
    *,
    seed: UInt32[Array, ""],
    step: UInt32[Array, ""],
    first: int,
    image_size: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    rotate: float,
    shear: float,
    flip: bool,
) -> UInt8[Array, "b s s ch"]:
    """Random crop, rotation, shear and flip of each image, all in one resampling.

    Elementwise over the batch, so a batch that is sharded over its first axis stays so.

    Args:
      images: of one size.
      seed: with the step and the position in the batch, the key of each image.
      step: number of the batch.
      first: position of the first image.
      image_size: side of the result, pixels.
      crop_scale: least and greatest share of the area that the crop covers.
      crop_ratio: least and greatest width over height of the crop, log-uniform.
      rotate: degrees, uniform within +-.
      shear: tangent, uniform within +-.
      flip: whether half of the images are mirrored.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(images)))
    matrix = functools.partial(
        _random_affine,
        height=images.shape[1],
        width=images.shape[2],
        crop_scale=crop_scale,
        crop_ratio=crop_ratio,
        rotate=rotate,
        shear=shear,
        flip=flip,
    )
    return affine_resample(images, jax.vmap(matrix)(keys), image_size=image_size)


@functools.partial(jax.jit, static_argnames=("resize_size", "image_size", "resampling"))
def resize_and_crop(
    images: UInt8[Array, "b h w ch"], *, resize_size: int, image_size: int, resampling: str
) -> UInt8[Array, "b s s ch"]:
    """Resize the short side, antialiased, then crop at the centre."""
    _, height, width, channels = images.shape
    short = min(height, width)
    if short != resize_size:
        height, width = height * resize_size // short, width * resize_size // short
        shape = (len(images), height, width, channels)
        resized = jax.image.resize(images.astype(jnp.float32), shape, _METHODS[resampling])
        images = jnp.round(jnp.clip(resized, 0, 255)).astype(jnp.uint8)
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return images[:, top : top + image_size, left : left + image_size]


def _random_affine(
    key: PRNGKeyArray,
    *,
    height: int,
    width: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    rotate: float,
    shear: float,
    flip: bool,
) -> Float[Array, "2 3"]:
    """A crop as ``transforms.random_crop`` draws it, but not at whole pixels; then the rest."""
    numbers = jax.random.uniform(key, (2 * _TRIES + 5,))
    share, shape = numbers[:_TRIES], numbers[_TRIES : 2 * _TRIES]
    along, down, mirror, turn, slant = numbers[2 * _TRIES :]
    area = height * width * (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * share)
    narrowest, widest = math.log(crop_ratio[0]), math.log(crop_ratio[1])
    log_ratio = narrowest + (widest - narrowest) * shape
    widths = jnp.append(jnp.sqrt(area * jnp.exp(log_ratio)), min(width, height * crop_ratio[1]))
    heights = jnp.append(jnp.sqrt(area * jnp.exp(-log_ratio)), min(height, width / crop_ratio[0]))
    found = jnp.argmax((widths <= width) & (heights <= height))
    w, h = widths[found], heights[found]
    # The fallback, last in the row, is cropped at the centre.
    along, down = jnp.where(found == _TRIES, 0.5, jnp.stack([along, down]))
    return affine_matrix(
        center=jnp.stack([along * (width - w) + w / 2, down * (height - h) + h / 2]),
        size=jnp.stack([jnp.where(flip & (mirror < 0.5), -w, w), h]),
        angle=(2 * turn - 1) * math.radians(rotate),
        shear=(2 * slant - 1) * shear,
    )

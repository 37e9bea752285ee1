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
from mmljax.data.limits import check_sizes
from mmljax.data.sampling import check_batch, class_balanced_indices, class_index, ordered_indices
from mmljax.types import Batch, Split

_TRIES = 10

_T = TypeVar("_T")


def train_batches(
    split: Split,
    *,
    config: DataConfig,
    seed: int,
    steps: range,
    rows: slice,
    place: Callable[[Batch], Batch],
) -> Iterator[Batch]:
    """Augmented P x K batches, one per step.

    Args:
      split: its images are ``[n height width channels]`` uint8.
      config: sizes and augmentation.
      seed: not negative; the batch of a step depends on ``(seed, step)`` alone.
      steps: numbers of the batches to yield.
      rows: the part of the global batch that this process loads.
      place: from a NumPy batch of those rows to device arrays, of the rows or of the global batch.

    Returns:
      Batches of device arrays, images ``[b image_size image_size channels]`` uint8; each is made
      while the previous one is in use.

    Raises:
      UserError: at once, as ``check_sizes`` and ``check_batch``.
    """
    check_sizes(config, processes=jax.process_count())
    index = class_index(split.labels)
    sizes = {"batch_size": config.batch_size, "images_per_class": config.images_per_class}
    check_batch(index, **sizes)
    position = range(config.batch_size)[rows]

    def make(step: int) -> Batch:
        indices = class_balanced_indices(index, seed=seed, step=step, **sizes)[rows]
        batch = place(host_batch(split, indices, split.images[indices]))
        first = 0 if len(batch.images) == config.batch_size else position.start
        return _augmented(batch, config, seed=seed, step=step, first=first)

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

    def make(step: int) -> Batch:
        indices = ordered_indices(len(split.labels), batch_size=size, step=step)[rows]
        images = split.images[indices]
        images[indices < 0] = 0
        batch = place(host_batch(split, indices, images))
        if view:
            first = 0 if len(batch.images) == size else range(size)[rows].start
            step = (view - 1) * batches + step
            return _augmented(batch, config, seed=seed, step=step, first=first)
        cropped = resize_and_crop(
            batch.images, resize_size=config.resize_size, image_size=config.image_size
        )
        return batch._replace(images=cropped)

    return one_ahead(map(make, steps))


def _augmented(batch: Batch, config: DataConfig, *, seed: int, step: int, first: int) -> Batch:
    """A batch with its images augmented as the config says."""
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


@functools.partial(jax.jit, static_argnames=("resize_size", "image_size"))
def resize_and_crop(
    images: UInt8[Array, "b h w ch"], *, resize_size: int, image_size: int
) -> UInt8[Array, "b s s ch"]:
    """Resize the short side, bilinear with antialiasing, then crop at the centre."""
    _, height, width, channels = images.shape
    short = min(height, width)
    if short != resize_size:
        height, width = height * resize_size // short, width * resize_size // short
        shape = (len(images), height, width, channels)
        resized = jax.image.resize(images.astype(jnp.float32), shape, "linear")
        images = jnp.round(jnp.clip(resized, 0, 255)).astype(jnp.uint8)
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return images[:, top : top + image_size, left : left + image_size]


def affine_matrix(
    *,
    center: Float[Array, "2"],
    size: Float[Array, "2"],
    angle: Float[Array, ""],
    shear: Float[Array, ""],
) -> Float[Array, "2 3"]:
    """The map from a result's point (u, v, 1), u and v in [-1/2, 1/2], to the source's x and y.

    Args:
      center: x and y of the crop's centre in the source, pixels from its upper left corner.
      size: width and height of the crop, pixels; a negative width mirrors it.
      angle: radians; the picture turns anticlockwise about the centre of the crop.
      shear: tangent; the crop leans by this much of its height.
    """
    (x, y), (width, height), cos, sin = center, size, jnp.cos(angle), jnp.sin(angle)
    return jnp.stack(
        [
            jnp.stack([cos * width, (cos * shear - sin) * height, x]),
            jnp.stack([sin * width, (sin * shear + cos) * height, y]),
        ]
    )


def affine_resample(
    images: UInt8[Array, "b h w ch"], matrices: Float[Array, "b 2 3"], *, image_size: int
) -> UInt8[Array, "b s s ch"]:
    """Bilinear resampling through a map per image; beyond an edge its pixels are repeated.

    Against aliasing, each pixel of the result is the mean of n x n evenly spaced samples within
    it, where n is the source's longer side over the result's, rounded up. So samples of a crop
    lie at most one pixel of the source apart (a little more under shear), and a result of the
    source's size or larger is plain bilinear.
    """
    samples = math.ceil(max(images.shape[1:3]) / image_size)
    pixel = (jnp.arange(image_size) + 0.5) / image_size - 0.5
    shift = ((jnp.arange(samples) + 0.5) / samples - 0.5) / image_size
    shifts = jnp.stack(jnp.meshgrid(shift, shift), axis=-1).reshape(-1, 2)
    sample = jax.vmap(_sample, (0, 0, None, None))

    def add(
        total: Float[Array, "b s s ch"], by: Float[Array, "2"]
    ) -> tuple[Float[Array, "b s s ch"], None]:
        return total + sample(images, matrices, pixel + by[0], pixel + by[1]), None

    zeros = jnp.zeros((len(images), image_size, image_size, images.shape[3]))
    total, _ = jax.lax.scan(add, zeros, shifts)
    return jnp.round(total / samples**2).astype(jnp.uint8)


def _sample(
    image: UInt8[Array, "h w ch"],
    matrix: Float[Array, "2 3"],
    u: Float[Array, " s"],
    v: Float[Array, " s"],
) -> Float[Array, "s s ch"]:
    height, width, _ = image.shape
    # No matrix product here: accelerators round its factors.
    x, y = (
        matrix[:, 0, None, None] * u
        + matrix[:, 1, None, None] * v[:, None]
        + matrix[:, 2, None, None]
    )
    x, y = jnp.clip(x - 0.5, 0, width - 1), jnp.clip(y - 0.5, 0, height - 1)
    left = jnp.clip(jnp.floor(x), 0, width - 2).astype(jnp.int32)
    top = jnp.clip(jnp.floor(y), 0, height - 2).astype(jnp.int32)
    to_right, down = (x - left)[..., None], (y - top)[..., None]
    pixels = image.astype(jnp.float32)
    above = pixels[top, left] * (1 - to_right) + pixels[top, left + 1] * to_right
    below = pixels[top + 1, left] * (1 - to_right) + pixels[top + 1, left + 1] * to_right
    return above * (1 - down) + below * down


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

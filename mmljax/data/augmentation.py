"""Augmentation of cropped training images on the devices: RandAugment, colour jitter, erasing.

One jitted function for image files and arrays alike, after cropping and flipping. The random
numbers of an image depend on ``(seed, step, position in the global batch)`` alone. Each of the
three has numbers of its own, so switching one on leaves the draws of the others as they were.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8, UInt32

from mmljax.config import DataConfig
from mmljax.data.affine import affine_resample
from mmljax.errors import UserError
from mmljax.types import Batch

_STREAM = 2**32 - 1  # apart from the steps of a seed, whose keys draw the crops of arrays

_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_ENHANCING = ("brightness", "contrast", "color", "sharpness")
OPERATIONS = (
    *_GEOMETRIC,
    *_ENHANCING,
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "identity",
)
"""Those of RandAugment, drawn with equal probability."""

_BRANCHES = [0] * len(_GEOMETRIC) + [1] * len(_ENHANCING) + [2, 3, 4, 5, 6]  # of apply_operation

GREATEST_MAGNITUDE = 30

_TRIES = 10
_ERASED_SHARE, _LEAST_RATIO = (0.02, 0.4), 0.3  # of section 3.1 and table 3 of 1708.04896


def train_augmentation(
    config: DataConfig, *, channels: int, seed: int, first: int
) -> Callable[[Batch, int], Batch]:
    """What a pipeline applies to the placed batch of a step; the identity where all is off.

    Args:
      config: the augmentation, and the size of the global batch.
      channels: of the images.
      seed: of the run.
      first: position in the global batch of the first row that this process loads; used where the
        placed batch holds these rows alone.

    Raises:
      UserError: as ``check_channels``.
    """
    check_channels(config, channels)
    if not (_changes_colors(config) or config.erase):
        return lambda batch, step: batch

    def apply(batch: Batch, step: int) -> Batch:
        images = augment_pixels(
            batch.images,
            seed=jnp.uint32(seed),
            step=jnp.uint32(step),
            first=0 if len(batch.images) == config.batch_size else first,
            randaugment=config.randaugment,
            color_jitter=config.color_jitter,
            erase=config.erase,
        )
        return batch._replace(images=images)

    return apply


def check_channels(config: DataConfig, channels: int) -> None:
    """Refuse operations on colours for images that are neither grey nor of three colours.

    Raises:
      UserError: naming the key and the cure.
    """
    if _changes_colors(config) and channels not in (1, 3):
        key, off = (
            ("randaugment", "(0,9)") if config.randaugment[0] else ("color_jitter", "(0,0,0,0)")
        )
        raise UserError(
            f"--config.data.{key}={getattr(config, key)} is for images of 1 or 3 channels, found "
            f"{channels}; switch it off by --config.data.{key}='{off}'"
        )


def _changes_colors(config: DataConfig) -> bool:
    return config.randaugment[0] > 0 or any(config.color_jitter)


@functools.partial(jax.jit, static_argnames=("first", "randaugment", "color_jitter", "erase"))
def augment_pixels(
    images: UInt8[Array, "b s s ch"],
    *,
    seed: UInt32[Array, ""],
    step: UInt32[Array, ""],
    first: int,
    randaugment: tuple[int, float],
    color_jitter: tuple[float, float, float, float],
    erase: float,
) -> UInt8[Array, "b s s ch"]:
    """RandAugment, then colour jitter, then random erasing of each image.

    Elementwise over the batch, so a batch that is sharded over its first axis stays so.

    Args:
      images: square, of 1 or 3 channels (of any number for erasing alone).
      seed: with the step and the position in the batch, the key of each image.
      step: number of the batch.
      first: position of the first image.
      randaugment: number of operations, and their magnitude from 0 to 30 (``random_operations``).
      color_jitter: as for ``random_colors``.
      erase: probability, as for ``random_erasing``.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(images)))

    def one(image: UInt8[Array, "s s ch"], key: PRNGKeyArray) -> UInt8[Array, "s s ch"]:
        x = image.astype(jnp.float32)
        of_operations, of_colors, of_erasing = (jax.random.fold_in(key, i) for i in range(3))
        if randaugment[0]:
            x = random_operations(x, of_operations, count=randaugment[0], magnitude=randaugment[1])
        if any(color_jitter):
            x = jnp.round(random_colors(x, of_colors, ranges=color_jitter))
        if erase:
            x = random_erasing(x, of_erasing, probability=erase)
        return x.astype(jnp.uint8)

    return jax.vmap(one)(images, keys)


# RandAugment


def random_operations(
    x: Float[Array, "s s ch"], key: PRNGKeyArray, *, count: int, magnitude: float
) -> Float[Array, "s s ch"]:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719): operations drawn with replacement.

    Those of the paper, in torchvision's ranges. Deviations: geometric operations are about the
    image's centre, bilinear, and repeat the pixels of an edge beyond it.

    Args:
      x: whole numbers from 0 to 255.
      key: of this image.
      count: how many operations follow each other.
      magnitude: of all of them, from 0 to 30; where an operation has a direction, it is drawn.
    """

    def step(x: Array, drawn: Array) -> tuple[Array, None]:
        number = (drawn[0] * len(OPERATIONS)).astype(jnp.int32)
        sign = jnp.where(drawn[1] < 0.5, -1.0, 1.0)
        return apply_operation(x, number, sign, magnitude=magnitude), None

    return jax.lax.scan(step, x, jax.random.uniform(key, (count, 2)))[0]


def apply_operation(
    x: Float[Array, "s s ch"],
    number: Int[Array, ""],
    sign: Float[Array, ""],
    *,
    magnitude: float,
) -> Float[Array, "s s ch"]:
    """Operation ``OPERATIONS[number]``, its result rounded to whole numbers.

    Args:
      x: whole numbers from 0 to 255.
      number: of the operation.
      sign: 1 or -1, the direction of operations that have one.
      magnitude: from 0 to 30. At 30: shear by 0.3, translation by 150/331 of the side, rotation by
        30 degrees, factors of 1.9 and 0.1, 4 bits of posterize, solarize from 0 on.
    """
    strength = magnitude / GREATEST_MAGNITUDE
    signed, of_enhancing = sign * strength, number - len(_GEOMETRIC)
    branches = [
        lambda: _move(x, number, signed),
        lambda: _blend(x, _dull(x, of_enhancing), 1 + 0.9 * signed),
        lambda: x - x % 2 ** round(4 * strength),
        lambda: jnp.where(x >= 255 * (1 - strength), 255 - x, x),
        lambda: _autocontrast(x),
        lambda: _equalize(x),
        lambda: x,
    ]
    return jnp.round(jax.lax.switch(jnp.asarray(_BRANCHES)[number], branches))


def _move(x: Array, number: Array, amount: Array) -> Array:
    """The geometric operation of a number."""
    side = x.shape[0]
    unit = amount * (number == jnp.arange(len(_GEOMETRIC)))
    lean_x, lean_y = 0.3 * unit[0], 0.3 * unit[1]
    along, down = jnp.round(150 / 331 * side * unit[2]), jnp.round(150 / 331 * side * unit[3])
    angle = math.radians(30) * unit[4]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.stack(
        [
            jnp.stack([cos * side, (lean_x - sin) * side, side / 2 + along]),
            jnp.stack([(lean_y + sin) * side, cos * side, side / 2 + down]),
        ]
    )
    images = x.astype(jnp.uint8)[None]
    return affine_resample(images, matrix[None], image_size=side)[0].astype(x.dtype)


def _dull(x: Array, which: Array) -> Array:
    """What brightness, contrast, colour and sharpness blend an image with."""
    branches = [
        lambda: jnp.zeros_like(x),
        lambda: jnp.broadcast_to(_mean_gray(x), x.shape),
        lambda: jnp.broadcast_to(_gray(x), x.shape),
        lambda: _smooth(x),
    ]
    return jax.lax.switch(which, branches)


def _smooth(x: Array) -> Array:
    """Means of 3 x 3 pixels, the middle one five times; the outermost pixels as they are."""
    rows = x[:-2] + x[1:-1] + x[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]
    return x.at[1:-1, 1:-1].set(total / 13)


def _autocontrast(x: Array) -> Array:
    """Each channel stretched to the range from 0 to 255; one that is constant stays."""
    low, high = jnp.min(x, axis=(0, 1)), jnp.max(x, axis=(0, 1))
    stretched = (x - low) * (255 / jnp.maximum(high - low, 1))
    return jnp.where(high > low, stretched, x)


def _equalize(x: Array) -> Array:
    """Each channel with about as many pixels of each value, by Pillow's rule."""
    values, channels = x.astype(jnp.int32), jnp.arange(x.shape[-1])
    counts = jnp.zeros((256, x.shape[-1]), jnp.int32).at[values, channels].add(1)
    most = counts[jnp.max(values, axis=(0, 1)), channels]
    step = (x.shape[0] * x.shape[1] - most) // 255
    below = jnp.cumsum(counts, axis=0) - counts
    table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table[values, channels].astype(x.dtype), x)


# Colour jitter


def random_colors(
    x: Float[Array, "s s ch"], key: PRNGKeyArray, *, ranges: tuple[float, float, float, float]
) -> Float[Array, "s s ch"]:
    """Brightness, contrast, saturation and hue changed in random order, as torchvision does.

    Nothing is rounded between two changes (torchvision: each is).

    Args:
      x: values from 0 to 255.
      key: of this image.
      ranges: of brightness, contrast and saturation, whose factors are uniform within
        ``1 - range`` (at least 0) and ``1 + range``; and of the hue, which is turned by a share of
        the full circle, uniform within ``+- range``.
    """
    numbers = jax.random.uniform(key, (8,))
    low = jnp.array([max(0.0, 1 - r) for r in ranges[:3]] + [-ranges[3]])
    high = jnp.array([1 + r for r in ranges[:3]] + [ranges[3]])
    amounts, order = low + (high - low) * numbers[:4], jnp.argsort(numbers[4:])
    return adjust_colors(x, amounts, order, hue=ranges[3] > 0)


def adjust_colors(
    x: Float[Array, "s s ch"],
    amounts: Float[Array, "4"],
    order: Int[Array, "4"],
    *,
    hue: bool = True,
) -> Float[Array, "s s ch"]:
    """Brightness (0), contrast (1), saturation (2) and hue (3), changed in the given order.

    Grey images have no saturation and no hue. Only the first three are blends, so the hue is turned
    once, between those before and those after it: nothing branches on a random number.

    Args:
      x: values from 0 to 255.
      amounts: three factors, and the hue's turn.
      order: the numbers of the changes.
      hue: False if the hue stays.
    """
    at = jnp.argmax(order == 3)
    blends = order[jnp.arange(3) + (jnp.arange(3) >= at)]

    def blend(x: Array, k: int, active: Bool[Array, ""]) -> Array:
        return _blend(x, _dull_color(x, blends[k]), jnp.where(active, amounts[blends[k]], 1.0))

    if not hue or x.shape[-1] == 1:
        return functools.reduce(lambda x, k: blend(x, k, jnp.array(True)), range(3), x)
    for k in range(3):
        x = blend(x, k, k < at)
    x = turn_hue(x, amounts[3])
    for k in range(3):
        x = blend(x, k, k >= at)
    return x


def turn_hue(x: Float[Array, "s s 3"], turn: Float[Array, ""]) -> Float[Array, "s s 3"]:
    """Colours of the same largest and smallest component, turned by a share of the hue's circle."""
    red, green, blue = (x[..., i] for i in range(3))
    most, chroma = jnp.max(x, axis=-1), jnp.max(x, axis=-1) - jnp.min(x, axis=-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    # Comparisons rather than equality with the largest, which a compiler may round differently.
    is_red, is_green = (red >= green) & (red >= blue), green >= blue
    sixth = jnp.select(
        [is_red, is_green],
        [(green - blue) / divisor, 2 + (blue - red) / divisor],
        4 + (red - green) / divisor,
    )
    place = (sixth[..., None] + 6 * turn + jnp.array([5.0, 3.0, 1.0])) % 6
    part = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return most[..., None] - chroma[..., None] * part


def _dull_color(x: Array, which: Array) -> Array:
    """What brightness, contrast and saturation blend an image with."""
    gray = _gray(x)
    return jnp.where(which == 0, 0.0, jnp.where(which == 1, _mean_gray(x), gray))


def _blend(x: Array, other: Array, factor: Array) -> Array:
    return jnp.clip(factor * x + (1 - factor) * other, 0, 255)


def _gray(x: Array) -> Float[Array, "s s 1"]:
    """Luma of ITU-R BT.601, as Pillow and torchvision; a grey image itself."""
    if x.shape[-1] == 1:
        return x
    return 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]


def _mean_gray(x: Array) -> Float[Array, ""]:
    """Mean of the rounded luma: a sum of whole numbers does not depend on its order."""
    total = jnp.sum(jnp.round(_gray(x)).astype(jnp.uint32))
    return total.astype(jnp.float32) / (x.shape[0] * x.shape[1])


# Random erasing


def random_erasing(
    x: Float[Array, "s s ch"], key: PRNGKeyArray, *, probability: float
) -> Float[Array, "s s ch"]:
    """Random erasing (Zhong et al. 2017, arXiv 1708.04896): noise over a rectangle of an image.

    Its area is 0.02 to 0.4 of the image, uniform; its height over width 0.3 to 1 / 0.3,
    log-uniform (the paper: uniform). The first of ten draws that fits counts; if none does, nothing
    is erased. Each value of the rectangle is then uniform in 0 .. 255.

    Args:
      x: values from 0 to 255.
      key: of this image.
      probability: that the image is erased at all.
    """
    of_place, of_noise = jax.random.split(key)
    inside = erased_rectangle(
        jax.random.uniform(of_place, (2 * _TRIES + 3,)), x.shape[0], probability=probability
    )
    noise = jax.random.bits(of_noise, x.shape, jnp.uint8)
    return jnp.where(inside[..., None], noise.astype(x.dtype), x)


def erased_rectangle(
    numbers: Float[Array, " count"], side: int, *, probability: float
) -> Bool[Array, "s s"]:
    """Which pixels are erased, by ``2 * 10 + 3`` numbers that are uniform in [0, 1)."""
    least, most = _ERASED_SHARE
    area = side**2 * (least + (most - least) * numbers[:_TRIES])
    ratio = jnp.exp(math.log(_LEAST_RATIO) * (1 - 2 * numbers[_TRIES : 2 * _TRIES]))
    heights, widths = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (heights <= side) & (widths <= side)
    sides = jnp.stack([heights, widths])[:, jnp.argmax(fits)]
    corner = jnp.floor(numbers[-3:-1] * (side - sides + 1))
    pixel = jnp.arange(side)
    rows, columns = ((pixel >= c) & (pixel < c + s) for c, s in zip(corner, sides, strict=True))
    erases = (numbers[-1] < probability) & jnp.any(fits)
    return erases & rows[:, None] & columns[None, :]

"""Decoding, cropping and augmenting one image, in TensorFlow.

A random crop is a pure function of the file's bytes and of given uniform numbers. Its window is one
of the upright image: EXIF orientation is applied. Grey images become colour ones. An image whose
header states more than ``MAX_PIXELS`` is refused before it is decoded. A JPEG is decoded at a half,
a quarter or an eighth of its size where that leaves at least twice the wanted pixels a side; the
resize then starts from there.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from jaxtyping import Float, Shaped, UInt8

from mmljax.data.decoding import LEAST, MAX_PIXELS, SCALES
from mmljax.data.headers import is_plain_jpeg, jpeg_orientation, needs_pillow, stated_shape

_TRIES = 10

NUMBERS = 2 * _TRIES + 3
"""How many uniform numbers ``random_crop`` takes."""

_KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic"}
_SCALES = np.array(SCALES, np.int32)
_OTHER = len(_SCALES)  # branch of what is not a JPEG

# An upright image is the stored one, transposed or not and then mirrored; by EXIF orientation.
_TRANSPOSED = np.array([False] * 5 + [True] * 4)
_MIRRORED = np.array([[o in (3, 4, 7, 8), o in (2, 3, 6, 7)] for o in range(9)])  # rows, columns


def random_crop(
    contents: Shaped[tf.Tensor, ""],
    numbers: Float[tf.Tensor, " count"],
    *,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    resampling: str = "bilinear",
    decoded_pixels: int = MAX_PIXELS,
    plain: bool = False,
) -> UInt8[tf.Tensor, "s s 3"]:
    """Decode only a random window of an image, resize it and perhaps mirror it.

    The window is that of Inception training (Szegedy et al. 2015, arXiv 1409.4842, section 6) in
    torchvision's form: an area share uniform in ``scale`` and a log-uniform width over height; the
    first of ten draws that fits counts; else the largest window of an allowed shape, centred.

    Args:
      contents: a file that does not ``needs_pillow``: JPEG, PNG, WebP or BMP, a scalar string.
      numbers: ``[NUMBERS]`` float64, uniform in [0, 1).
      image_size: side of the result, pixels.
      scale: least and greatest share of the area.
      ratio: least and greatest width over height.
      flip: whether to mirror when the last number is below a half.
      resampling: one of ``preprocessing.RESAMPLINGS``; antialiased.
      decoded_pixels: the most pixels to decode; of a JPEG, those of the window at its scale.
      plain: whether to refuse all but JPEGs that certainly have no EXIF, for which the graph is
        much smaller, and so faster.

    Returns:
      ``[image_size image_size 3]`` uint8.

    Raises:
      tf.errors.InvalidArgumentError: if the file cannot be decoded, needs Pillow, states more than
        ``MAX_PIXELS``, or takes more than ``decoded_pixels``.
    """
    file = _checked(contents, plain=plain)
    height, width = tf.unstack(file.shape)
    window = _random_window(height, width, numbers, scale=scale, ratio=ratio)
    image = _rectangle(
        file,
        corner=window[:2],
        sides=window[2:],
        size=[image_size, image_size],
        resampling=resampling,
        decoded_pixels=decoded_pixels,
    )
    if flip:
        image = tf.cond(numbers[-1] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
    return image


def center_crop(
    contents: Shaped[tf.Tensor, ""],
    *,
    resize_size: int,
    image_size: int,
    resampling: str = "bilinear",
    decoded_pixels: int = MAX_PIXELS,
    plain: bool = False,
) -> UInt8[tf.Tensor, "s s 3"]:
    """Decode an image, resize its short side and crop it at the centre.

    Args:
      contents: as for ``random_crop``.
      resize_size: short side before the crop, pixels.
      image_size: side of the result, pixels; at most ``resize_size``.
      resampling: as for ``random_crop``.
      decoded_pixels: as for ``random_crop``.
      plain: as for ``random_crop``.

    Returns:
      ``[image_size image_size 3]`` uint8.

    Raises:
      tf.errors.InvalidArgumentError: as ``random_crop``.
    """
    file = _checked(contents, plain=plain)
    size = file.shape * resize_size // tf.reduce_min(file.shape)
    image = _rectangle(
        file,
        corner=tf.zeros_like(file.shape),
        sides=file.shape,
        size=size,
        resampling=resampling,
        decoded_pixels=decoded_pixels,
    )
    top, left = tf.unstack((size - image_size) // 2)
    image = image[top : top + image_size, left : left + image_size]
    return tf.ensure_shape(image, [image_size, image_size, 3])


class _File(NamedTuple):
    """An image file that may be decoded here."""

    contents: tf.Tensor
    shape: tf.Tensor  # height and width of the upright image, int32
    orientation: tf.Tensor | None  # None: 1


def _checked(contents: tf.Tensor, *, plain: bool) -> _File:
    """The file, once it is known not to need Pillow, nor to exceed ``MAX_PIXELS``."""
    if plain:
        checks = [tf.debugging.Assert(is_plain_jpeg(contents), ["no plain JPEG"])]
        with tf.control_dependencies(checks):
            shape = tf.cast(tf.io.extract_jpeg_shape(contents)[:2], tf.int64)
    else:
        checks, shape = [], stated_shape(contents)
    checks.append(tf.debugging.Assert(tf.reduce_prod(shape) <= MAX_PIXELS, ["too large", shape]))
    if not plain:
        checks.append(tf.debugging.Assert(~needs_pillow(contents), ["needs Pillow"]))
    with tf.control_dependencies(checks):
        contents, shape = tf.identity(contents), tf.cast(shape, tf.int32)
    if plain:
        return _File(contents, shape, None)
    orientation = jpeg_orientation(contents)
    return _File(contents, _turned(shape, orientation), orientation)


def _stored(
    shape: tf.Tensor, corner: tf.Tensor, sides: tf.Tensor, size: tf.Tensor, orientation: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Shape, corner, sides and size in the stored image of those in the upright one."""
    mirrored = tf.gather(_MIRRORED, orientation)
    corner = tf.where(mirrored, shape - corner - sides, corner)
    return tuple(_turned(pair, orientation) for pair in (shape, corner, sides, size))


def _turned(pair: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Rows and columns of the upright image from those of the stored one, or the reverse."""
    return tf.where(tf.gather(_TRANSPOSED, orientation), pair[::-1], pair)


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """The upright image of pixels as they are stored."""
    transposed = tf.gather(_TRANSPOSED, orientation)
    image = tf.cond(transposed, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    for axis in range(2):
        image = tf.cond(
            tf.gather(_MIRRORED[:, axis], orientation),
            partial(tf.reverse, image, [axis]),
            partial(tf.identity, image),
        )
    return image


def _random_window(
    height: tf.Tensor,
    width: tf.Tensor,
    numbers: tf.Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tf.Tensor:
    """Top, left, height and width of a random window, int32 pixels."""
    h, w = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
    share, shape = numbers[:_TRIES], numbers[_TRIES : 2 * _TRIES]
    area = h * w * (scale[0] + (scale[1] - scale[0]) * share)
    log_ratio = math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape
    heights = tf.concat([tf.sqrt(area * tf.exp(-log_ratio)), [w / ratio[0]]], axis=0)
    widths = tf.concat([tf.sqrt(area * tf.exp(log_ratio)), [h * ratio[1]]], axis=0)
    heights, widths = tf.maximum(tf.round(heights), 1), tf.maximum(tf.round(widths), 1)
    fits = (heights <= h) & (widths <= w)
    found = tf.cond(
        tf.reduce_any(fits[:_TRIES]), lambda: tf.argmax(fits), lambda: tf.constant(_TRIES, tf.int64)
    )
    crop = tf.stack([tf.minimum(heights[found], h), tf.minimum(widths[found], w)])
    free = tf.stack([h, w]) - crop
    centred = tf.floor(free / 2)
    drawn = tf.floor(numbers[2 * _TRIES : 2 * _TRIES + 2] * (free + 1))
    corner = tf.where(found == _TRIES, centred, drawn)
    return tf.cast(tf.concat([corner, crop], axis=0), tf.int32)


def _rectangle(
    file: _File,
    *,
    corner: tf.Tensor,
    sides: tf.Tensor,
    size: Any,
    resampling: str,
    decoded_pixels: int,
) -> UInt8[tf.Tensor, "h w 3"]:
    """A rectangle of the upright image, resized; ``corner`` (top, left) and ``sides`` are pixels.

    It is decoded and resized as it is stored, and turned then.
    """
    contents, shape, orientation = file
    if orientation is not None:
        pairs = shape, corner, sides, tf.stack(size)
        shape, corner, sides, size = _stored(*pairs, orientation)
    fits = tf.reduce_min(sides // size) >= LEAST * _SCALES[1:]
    halvings = tf.reduce_sum(tf.cast(fits, tf.int32))
    which = tf.where(tf.io.is_jpeg(contents), halvings, _OTHER)
    scale = tf.gather(np.append(_SCALES, _SCALES[:1]), which)
    first = corner // scale
    window = tf.concat([first, (corner + sides + scale - 1) // scale - first], axis=0)
    pixels = tf.reduce_prod(tf.where(tf.io.is_jpeg(contents), window[2:], shape))
    few = tf.debugging.Assert(pixels <= decoded_pixels, ["too many pixels to decode", pixels])
    with tf.control_dependencies([few]):
        contents = tf.identity(contents)

    def decode(ratio: int) -> tf.Tensor:
        return tf.image.decode_and_crop_jpeg(
            contents, window, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    def other() -> tf.Tensor:
        top, left, height, width = tf.unstack(window)
        return _decode_other(contents)[top : top + height, left : left + width]

    image = tf.switch_case(which, [*(partial(decode, int(ratio)) for ratio in _SCALES), other])
    # The resize takes uint8: a float32 copy of a large image would take four times its memory.
    resized = _resize(image, corner, sides, size=size, scale=scale, resampling=resampling)
    if resampling == "bicubic":  # it overshoots
        resized = tf.clip_by_value(resized, 0, 255)
    rounded = tf.cast(resized + 0.5, tf.uint8)  # the cast truncates
    return rounded if orientation is None else _upright(rounded, orientation)


def _resize(
    image: tf.Tensor,
    corner: tf.Tensor,
    sides: tf.Tensor,
    *,
    size: Any,
    scale: tf.Tensor,
    resampling: str,
) -> Float[tf.Tensor, "h w 3"]:
    """The rectangle of ``_rectangle`` from its pixels, which were decoded at 1 / ``scale``."""

    def plain() -> tf.Tensor:  # faster, and the same where both sides grow
        return tf.image.resize(image, size, method="bilinear")

    def antialiased() -> tf.Tensor:
        factor = tf.cast(size * scale / sides, tf.float32)
        offset = tf.cast((corner // scale * scale - corner) / scale, tf.float32)
        return _resize_antialiased(
            image, factor, offset * factor, size=size, kernel=_KERNELS[resampling]
        )

    if resampling != "bilinear":
        return antialiased()
    return tf.cond(tf.reduce_all(sides <= size), plain, antialiased)


def _resize_antialiased(
    image: tf.Tensor, scale: tf.Tensor, translation: tf.Tensor, *, size: Any, kernel: str
) -> Float[tf.Tensor, "h w 3"]:
    """``ScaleAndTranslate`` of both axes: of the rows, transposed, and once more.

    The values of a row count as the channels of one pixel, which TensorFlow adds by vector
    instructions, while it goes over the pixels of a row one by one. So this takes a third of the
    time of one call for both axes, transpositions included, and gives the same bits.
    """
    for axis in range(2):
        height, width, channels = tf.unstack(tf.shape(image))
        rows = tf.raw_ops.ScaleAndTranslate(
            images=tf.reshape(image, [1, height, 1, width * channels]),
            size=tf.stack([size[axis], 1]),
            scale=tf.stack([scale[axis], 1.0]),
            translation=tf.stack([translation[axis], 0.0]),
            kernel_type=kernel,
            antialias=True,
        )
        image = tf.transpose(tf.reshape(rows, [size[axis], width, 3]), [1, 0, 2])
    return image


def _decode_other(contents: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(contents, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])

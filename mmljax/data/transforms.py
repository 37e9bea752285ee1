"""Decoding, cropping and augmenting one image, in TensorFlow.

A random crop is a pure function of the file's bytes and of given uniform numbers. EXIF orientation
is ignored; grey images become colour ones. An image whose header states more than ``MAX_PIXELS`` is
refused before it is decoded. A JPEG is decoded at a half, a quarter or an eighth of its size where
that leaves at least twice the wanted pixels a side; the resize then starts from there.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from jaxtyping import Float, Int, Shaped, UInt8

_TRIES = 10

NUMBERS = 2 * _TRIES + 3
"""How many uniform numbers ``random_crop`` takes."""

_SCALES = np.array([1, 2, 4, 8], np.int32)  # by which a JPEG may be shrunk while it is decoded
_OTHER = len(_SCALES)  # branch of what is not a JPEG

MAX_PIXELS = 2**30 // 6
"""The largest image that is decoded; Pillow calls larger ones decompression bombs."""


def random_crop(
    contents: Shaped[tf.Tensor, ""],
    numbers: Float[tf.Tensor, " count"],
    *,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    decoded_pixels: int = MAX_PIXELS,
) -> UInt8[tf.Tensor, "s s 3"]:
    """Decode only a random window of an image, resize it and perhaps mirror it.

    The window is that of Inception training (Szegedy et al. 2015, arXiv 1409.4842, section 6) in
    torchvision's form: an area share uniform in ``scale`` and a log-uniform width over height; the
    first of ten draws that fits counts; else the largest window of an allowed shape, centred.

    Args:
      contents: JPEG, PNG, BMP or GIF file (its first picture), a scalar string.
      numbers: ``[NUMBERS]`` float64, uniform in [0, 1).
      image_size: side of the result, pixels.
      scale: least and greatest share of the area.
      ratio: least and greatest width over height.
      flip: whether to mirror when the last number is below a half.
      decoded_pixels: the most pixels to decode; of a JPEG, those of the window at its scale.

    Returns:
      ``[image_size image_size 3]`` uint8; resized bilinearly with antialiasing.

    Raises:
      tf.errors.InvalidArgumentError: if the file cannot be decoded, states more than
        ``MAX_PIXELS``, or takes more than ``decoded_pixels``.
    """
    contents, shape = _refuse_bombs(contents)
    window = _random_window(shape[0], shape[1], numbers, scale=scale, ratio=ratio)
    image = _rectangle(
        contents,
        shape,
        corner=window[:2],
        sides=window[2:],
        size=[image_size, image_size],
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
    decoded_pixels: int = MAX_PIXELS,
) -> UInt8[tf.Tensor, "s s 3"]:
    """Decode an image, resize its short side and crop it at the centre.

    Args:
      contents: as for ``random_crop``.
      resize_size: short side before the crop, pixels.
      image_size: side of the result, pixels; at most ``resize_size``.
      decoded_pixels: as for ``random_crop``.

    Returns:
      ``[image_size image_size 3]`` uint8; resized bilinearly with antialiasing.

    Raises:
      tf.errors.InvalidArgumentError: as ``random_crop``.
    """
    contents, shape = _refuse_bombs(contents)
    size = shape * resize_size // tf.reduce_min(shape)
    image = _rectangle(
        contents,
        shape,
        corner=tf.zeros_like(shape),
        sides=shape,
        size=size,
        decoded_pixels=decoded_pixels,
    )
    top, left = tf.unstack((size - image_size) // 2)
    image = image[top : top + image_size, left : left + image_size]
    return tf.ensure_shape(image, [image_size, image_size, 3])


def stated_shape(contents: Shaped[tf.Tensor, ""]) -> Int[tf.Tensor, "2"]:
    """Height and width that the header of an image file states, int64; nothing is decoded.

    Of a GIF it is the canvas, which all its pictures share.

    Raises:
      tf.errors.InvalidArgumentError: if it is not a JPEG, PNG, GIF or BMP file.
    """

    def number(start: int, kind: tf.DType, *, little_endian: bool) -> tf.Tensor:
        field = tf.strings.substr(contents, start, kind.size)
        return tf.cast(tf.io.decode_raw(field, kind, little_endian=little_endian)[0], tf.int64)

    def jpeg() -> tf.Tensor:
        return tf.cast(tf.io.extract_jpeg_shape(contents)[:2], tf.int64)

    def png() -> tf.Tensor:
        return tf.stack([number(at, tf.int32, little_endian=False) for at in (20, 16)])

    def gif() -> tf.Tensor:
        return tf.stack([number(at, tf.uint16, little_endian=True) for at in (8, 6)])

    def bmp() -> tf.Tensor:
        known = tf.debugging.Assert(magic == b"BM", ["not a JPEG, PNG, GIF or BMP file"])
        with tf.control_dependencies([known]):
            sides = [number(at, tf.int32, little_endian=True) for at in (22, 18)]
            return tf.abs(tf.stack(sides))  # a negative height means rows from the top down

    def other() -> tf.Tensor:
        return tf.case([(magic == b"\x89P", png), (magic == b"GI", gif)], default=bmp)

    magic = tf.strings.substr(contents, 0, 2)
    return tf.cond(tf.io.is_jpeg(contents), jpeg, other)


def _refuse_bombs(contents: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The contents and the stated shape, once it is known not to exceed ``MAX_PIXELS``."""
    shape = stated_shape(contents)
    small = tf.debugging.Assert(tf.reduce_prod(shape) <= MAX_PIXELS, ["too large", shape])
    with tf.control_dependencies([small]):
        return tf.identity(contents), tf.cast(shape, tf.int32)


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
    contents: tf.Tensor,
    shape: tf.Tensor,
    *,
    corner: tf.Tensor,
    sides: tf.Tensor,
    size: Any,
    decoded_pixels: int,
) -> UInt8[tf.Tensor, "h w 3"]:
    """A rectangle of an image, resized; its ``corner`` (top, left) and ``sides`` are pixels."""
    fits = tf.reduce_min(sides // size) >= 2 * _SCALES[1:]
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
    resized = _resize(image, corner, sides, size=size, scale=scale)
    return tf.cast(resized + 0.5, tf.uint8)  # the cast truncates, so this rounds


def _resize(
    image: tf.Tensor, corner: tf.Tensor, sides: tf.Tensor, *, size: Any, scale: tf.Tensor
) -> Float[tf.Tensor, "h w 3"]:
    """The rectangle of ``_rectangle`` from its pixels, which were decoded at 1 / ``scale``."""

    def plain() -> tf.Tensor:  # faster, and the same where both sides grow
        return tf.image.resize(image, size, method="bilinear")

    def antialiased() -> tf.Tensor:
        factor = tf.cast(size * scale / sides, tf.float32)
        offset = tf.cast((corner // scale * scale - corner) / scale, tf.float32)
        return tf.raw_ops.ScaleAndTranslate(
            images=image[None],
            size=size,
            scale=factor,
            translation=offset * factor,
            kernel_type="triangle",
            antialias=True,
        )[0]

    return tf.cond(tf.reduce_all(sides <= size), plain, antialiased)


def _decode_other(contents: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(contents, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])

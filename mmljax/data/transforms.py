"""Decoding, cropping and augmenting one image, in TensorFlow.

A random crop is a pure function of the file's bytes and of given uniform numbers. Its window is one
of the upright image: EXIF orientation is applied. Grey images become colour ones. An image whose
header states more than ``MAX_PIXELS`` is refused before it is decoded. A JPEG is decoded at a half,
a quarter or an eighth of its size where that leaves at least twice the wanted pixels a side; the
resize then starts from there.

A crop is made in three steps: what the file's header says (``header``), the arithmetic of many
images at once (``plan``), and the pixels (``picture``). TensorFlow takes as long to start an
operation for one image as for many, and the arithmetic has a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    crop = RandomCrop(image_size, scale, ratio, flip, resampling)
    return cropped(contents, numbers, crop=crop, decoded_pixels=decoded_pixels, plain=plain)


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
    crop, numbers = CenterCrop(image_size, resize_size, resampling), np.zeros(NUMBERS)
    return cropped(contents, numbers, crop=crop, decoded_pixels=decoded_pixels, plain=plain)


class RandomCrop(NamedTuple):
    """The settings of ``random_crop``; equal ones share their graphs."""

    image_size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    resampling: str

    def placed(self, shape: tf.Tensor, ratios: tf.Tensor, numbers: tf.Tensor) -> _Placed:
        """Random windows of images of ``shape`` ``[n 2]``."""
        windows = _random_windows(shape, ratios, numbers, scale=self.scale, ratio=self.ratio)
        size = tf.fill(tf.shape(shape), self.image_size)
        mirrored = (numbers[:, -1] < 0.5) & self.flip
        return _Placed(windows[:, :2], windows[:, 2:], size, tf.zeros_like(shape), mirrored)


class CenterCrop(NamedTuple):
    """The settings of ``center_crop``; equal ones share their graphs."""

    image_size: int
    resize_size: int
    resampling: str

    def placed(self, shape: tf.Tensor, ratios: tf.Tensor, numbers: tf.Tensor) -> _Placed:
        """The windows of images of ``shape`` ``[n 2]``; no number is used."""
        del ratios
        size = shape * self.resize_size // tf.reduce_min(shape, axis=1, keepdims=True)
        cut = (size - self.image_size) // 2
        return _Placed(tf.zeros_like(shape), shape, size, cut, tf.zeros_like(numbers[:, 0], bool))


class _Placed(NamedTuple):
    """Windows of upright images, and what becomes of them."""

    corner: tf.Tensor  # [n 2] top and left, pixels of the image
    sides: tf.Tensor  # [n 2]
    size: tf.Tensor  # [n 2] of the window, resized
    cut: tf.Tensor  # [n 2] top and left of the result in the resized window
    mirrored: tf.Tensor  # [n]


class Header(NamedTuple):
    """What is known of an image before its pixels; of several, with a leading axis."""

    shape: tf.Tensor  # [2] height and width as stored, int64
    orientation: tf.Tensor  # of EXIF
    decodable: tf.Tensor  # whether it may be decoded here
    ratios: tf.Tensor  # [tries] width over height of each drawn window


class Plan(NamedTuple):
    """How an image is decoded, resized and turned; of several, with a leading axis."""

    orientation: tf.Tensor
    which: tf.Tensor  # of ``_SCALES``, or ``_OTHER``
    window: tf.Tensor  # [4] top, left, height, width at that scale, as stored
    size: tf.Tensor  # [2] of the resized window, as stored
    factor: tf.Tensor  # [2] by which it is resized
    translation: tf.Tensor  # [2] pixels of the resized window
    grows: tf.Tensor  # whether no side shrinks
    cut: tf.Tensor  # [2] of the upright resized window
    mirrored: tf.Tensor


def cropped(
    contents: tf.Tensor, numbers: Any, *, crop: Any, decoded_pixels: int, plain: bool
) -> UInt8[tf.Tensor, "s s 3"]:
    """``random_crop`` or ``center_crop``, by the settings ``crop``, of one image."""
    one = tf.nest.map_structure(
        lambda tensor: tf.convert_to_tensor(tensor)[None],
        (contents, header(contents, numbers, crop=crop, plain=plain), numbers),
    )
    contents, planned = tf.nest.map_structure(
        lambda tensor: tensor[0], plan(*one, crop=crop, decoded_pixels=decoded_pixels)
    )
    allowed = tf.debugging.Assert(tf.strings.length(contents) > 0, ["too large, or needs Pillow"])
    with tf.control_dependencies([allowed]):
        return picture(tf.identity(contents), planned, crop=crop, plain=plain)


def header(contents: tf.Tensor, numbers: Any, *, crop: Any, plain: bool) -> Header:
    """What the header of a file says, and the ratios that its ``numbers`` draw.

    They are drawn here, since the last bit of an exponential may depend on its place in a vector.

    Raises:
      tf.errors.InvalidArgumentError: if the file is of no kind that TensorFlow decodes.
    """
    if isinstance(crop, RandomCrop):
        least, most = map(math.log, crop.ratio)
        ratios = tf.exp(least + (most - least) * numbers[_TRIES : 2 * _TRIES])
    else:
        ratios = tf.ones(_TRIES, tf.float64)
    if plain:
        shape = tf.cast(tf.io.extract_jpeg_shape(contents)[:2], tf.int64)
        return Header(shape, tf.constant(1), is_plain_jpeg(contents), ratios)
    decodable = ~needs_pillow(contents)
    return Header(stated_shape(contents), jpeg_orientation(contents), decodable, ratios)


def plan(
    contents: Shaped[tf.Tensor, " n"],
    headers: Header,
    numbers: Float[tf.Tensor, "n count"],
    *,
    crop: Any,
    decoded_pixels: int,
) -> tuple[tf.Tensor, Plan]:
    """How each of several images is cropped.

    The contents of one that may not be decoded are taken away, so that ``picture`` refuses it.
    """
    pixels = tf.reduce_prod(headers.shape, axis=1)
    fits = headers.decodable & (pixels > 0) & (pixels <= MAX_PIXELS)
    shape = tf.cast(tf.where(fits[:, None], headers.shape, 1), tf.int32)
    orientation = headers.orientation
    upright = _turned(shape, orientation)
    placed = crop.placed(upright, headers.ratios, numbers)
    corner, sides, size = _stored(upright, placed.corner, placed.sides, placed.size, orientation)
    halvings = tf.reduce_sum(
        tf.cast(
            tf.reduce_min(sides // size, axis=1)[:, None] >= LEAST * _SCALES[1:],
            tf.int32,
        ),
        axis=1,
    )
    is_jpeg = tf.strings.substr(contents, 0, 3) == b"\xff\xd8\xff"
    which = tf.where(is_jpeg, halvings, _OTHER)
    scale = tf.gather(np.append(_SCALES, _SCALES[:1]), which)[:, None]
    first = corner // scale
    window = tf.concat([first, (corner + sides + scale - 1) // scale - first], axis=1)
    decoded = tf.reduce_prod(tf.where(is_jpeg[:, None], window[:, 2:], shape), axis=1)
    factor = tf.cast(size * scale / sides, tf.float32)
    offset = tf.cast((first * scale - corner) / scale, tf.float32)
    return tf.where(fits & (decoded <= decoded_pixels), contents, b""), Plan(
        orientation=orientation,
        which=which,
        window=window,
        size=size,
        factor=factor,
        translation=offset * factor,
        grows=tf.reduce_all(sides <= size, axis=1),
        cut=placed.cut,
        mirrored=placed.mirrored,
    )


def picture(
    contents: Shaped[tf.Tensor, ""], plan: Plan, *, crop: Any, plain: bool
) -> UInt8[tf.Tensor, "s s 3"]:
    """The pixels of one image; it is decoded and resized as it is stored, and turned then.

    Raises:
      tf.errors.InvalidArgumentError: if it cannot be decoded.
    """

    def decode(ratio: int) -> tf.Tensor:
        return tf.image.decode_and_crop_jpeg(
            contents, plan.window, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    def other() -> tf.Tensor:
        top, left, height, width = tf.unstack(plan.window)
        return _decode_other(contents)[top : top + height, left : left + width]

    decoders = [partial(decode, int(ratio)) for ratio in _SCALES] + ([] if plain else [other])
    image = tf.switch_case(plan.which, decoders)
    # The resize takes uint8: a float32 copy of a large image would take four times its memory.
    resized = _resize(image, plan, resampling=crop.resampling)
    if crop.resampling == "bicubic":  # it overshoots
        resized = tf.clip_by_value(resized, 0, 255)
    image = tf.cast(resized + 0.5, tf.uint8)  # the cast truncates
    if not plain:
        image = _upright(image, plan.orientation)
    side = crop.image_size
    if isinstance(crop, CenterCrop):
        top, left = tf.unstack(plan.cut)
        image = image[top : top + side, left : left + side]
    elif crop.flip:
        whole = image
        image = tf.cond(plan.mirrored, lambda: tf.reverse(whole, [1]), lambda: whole)
    return tf.ensure_shape(image, [side, side, 3])


def _stored(
    shape: tf.Tensor, corner: tf.Tensor, sides: tf.Tensor, size: tf.Tensor, orientation: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """Corners, sides and sizes in the stored images of those in the upright ones."""
    mirrored = tf.gather(_MIRRORED, orientation)
    corner = tf.where(mirrored, shape - corner - sides, corner)
    return tuple(_turned(pair, orientation) for pair in (corner, sides, size))


def _turned(pairs: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Rows and columns ``[n 2]`` of upright images from those of stored ones, or the reverse."""
    return tf.where(tf.gather(_TRANSPOSED, orientation)[:, None], pairs[:, ::-1], pairs)


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


def _random_windows(
    shape: tf.Tensor,
    ratios: tf.Tensor,
    numbers: tf.Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tf.Tensor:
    """Top, left, height and width of random windows ``[n 4]``, int32 pixels."""
    sides = tf.cast(shape, tf.float64)
    h, w = sides[:, :1], sides[:, 1:]
    area = h * w * (scale[0] + (scale[1] - scale[0]) * numbers[:, :_TRIES])
    heights = tf.concat([tf.sqrt(area / ratios), w / ratio[0]], axis=1)
    widths = tf.concat([tf.sqrt(area * ratios), h * ratio[1]], axis=1)
    heights, widths = tf.maximum(tf.round(heights), 1), tf.maximum(tf.round(widths), 1)
    fits = ((heights <= h) & (widths <= w))[:, :_TRIES]
    none = ~tf.reduce_any(fits, axis=1)
    found = tf.where(none, _TRIES, tf.argmax(tf.cast(fits, tf.int32), axis=1, output_type=tf.int32))
    drawn = [tf.gather(length, found, batch_dims=1) for length in (heights, widths)]
    crop = tf.minimum(tf.stack(drawn, axis=1), sides)
    free = sides - crop
    corner = tf.where(
        none[:, None],
        tf.floor(free / 2),
        tf.floor(numbers[:, 2 * _TRIES : 2 * _TRIES + 2] * (free + 1)),
    )
    return tf.cast(tf.concat([corner, crop], axis=1), tf.int32)


def _resize(image: tf.Tensor, plan: Plan, *, resampling: str) -> Float[tf.Tensor, "h w 3"]:
    """The decoded window, resized: its rows, transposed, and once more.

    The values of a row count as the channels of one pixel, which TensorFlow adds by vector
    instructions, while it goes over the pixels of a row one by one. So this takes less time than
    one call for both axes (of ``ScaleAndTranslate`` a third), transpositions included.
    """

    def plain(rows: tf.Tensor, axis: int) -> tf.Tensor:  # faster, and the same where both grow
        return tf.raw_ops.ResizeBilinear(
            images=rows, size=tf.stack([plan.size[axis], 1]), half_pixel_centers=True
        )

    def antialiased(rows: tf.Tensor, axis: int) -> tf.Tensor:
        return tf.raw_ops.ScaleAndTranslate(
            images=rows,
            size=tf.stack([plan.size[axis], 1]),
            scale=tf.stack([plan.factor[axis], 1.0]),
            translation=tf.stack([plan.translation[axis], 0.0]),
            kernel_type=_KERNELS[resampling],
            antialias=True,
        )

    def both(resize: Callable[[tf.Tensor, int], tf.Tensor]) -> tf.Tensor:
        resized = image
        for axis in range(2):
            height, width, channels = tf.unstack(tf.shape(resized))
            rows = resize(tf.reshape(resized, [1, height, 1, width * channels]), axis)
            resized = tf.transpose(tf.reshape(rows, [plan.size[axis], width, 3]), [1, 0, 2])
        return resized

    if resampling != "bilinear":
        return both(antialiased)
    return tf.cond(plan.grows, lambda: both(plain), lambda: both(antialiased))


def _decode_other(contents: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(contents, channels=3, expand_animations=False)
    return tf.ensure_shape(image, [None, None, 3])

"""What the header of an image file says, read within TensorFlow's graph; nothing is decoded."""

from __future__ import annotations

import tensorflow as tf
from jaxtyping import Bool, Int, Shaped

_ORIENTATION = 0x0112  # EXIF's tag
_LONG = 4  # type of an EXIF field of four bytes
_ALPHA, _EXIF, _ANIMATED = 0x10, 0x08, 0x02  # flags of an extended WebP
_ALPHA_BIT = 28  # of a lossless WebP, after two sides of 14 bits


def stated_shape(contents: Shaped[tf.Tensor, ""]) -> Int[tf.Tensor, "2"]:
    """Height and width that the header of an image file states, as stored, int64.

    Of a GIF or a WebP they are those of the canvas, which all its pictures share.

    Raises:
      tf.errors.InvalidArgumentError: if it is not a JPEG, PNG, WebP, GIF or BMP file.
    """

    return tf.cond(
        tf.io.is_jpeg(contents),
        lambda: tf.cast(tf.io.extract_jpeg_shape(contents)[:2], tf.int64),
        lambda: _other_shape(contents),
    )


def _other_shape(contents: tf.Tensor) -> tf.Tensor:
    def png() -> tf.Tensor:
        return tf.stack([_number(contents, at, tf.int32, little_endian=False) for at in (20, 16)])

    def gif() -> tf.Tensor:
        return tf.stack([_number(contents, at, tf.uint16) for at in (8, 6)])

    def bmp() -> tf.Tensor:
        known = tf.debugging.Assert(magic == b"BM", ["not a JPEG, PNG, WebP, GIF or BMP file"])
        with tf.control_dependencies([known]):
            sides = [_number(contents, at, tf.int32) for at in (22, 18)]
            return tf.abs(tf.stack(sides))  # a negative height means rows from the top down

    magic = tf.strings.substr(contents, 0, 2)
    kinds = [
        (magic == b"\x89P", png),
        (magic == b"GI", gif),
        (_is_webp(contents), lambda: _webp_shape(contents)),
    ]
    return tf.case(kinds, default=bmp)


def needs_pillow(contents: Shaped[tf.Tensor, ""]) -> Bool[tf.Tensor, ""]:
    """Whether an image is left to Pillow: TensorFlow cannot decode it, or would differ.

    That is AVIF, GIF, PNG and WebP with EXIF, WebP with alpha or several pictures, BMP with a
    palette or compressed, and whatever is no image.
    """
    return tf.cond(tf.io.is_jpeg(contents), _false, lambda: _other_needs_pillow(contents))


def _other_needs_pillow(contents: tf.Tensor) -> tf.Tensor:
    def png() -> tf.Tensor:  # a wrong guess, from such bytes in the pixels, only costs time
        return tf.strings.regex_full_match(contents, rb"(?s)\C*(eXIf|Raw profile type )\C*")

    def webp() -> tf.Tensor:
        def lossless() -> tf.Tensor:
            return _number(contents, 21, tf.int32) & (1 << _ALPHA_BIT) != 0

        def extended() -> tf.Tensor:
            return _number(contents, 20, tf.uint8) & (_ALPHA | _EXIF | _ANIMATED) != 0

        kind = tf.strings.substr(contents, 12, 4)
        kinds = [(kind == b"VP8 ", _false), (kind == b"VP8L", lossless)]
        return tf.case(kinds, default=extended)

    def bmp() -> tf.Tensor:
        header, compression = (_number(contents, at, tf.int32) for at in (14, 30))
        bits = _number(contents, 28, tf.uint16)
        return (header < 40) | (compression != 0) | (bits < 24)

    magic = tf.strings.substr(contents, 0, 2)
    kinds = [(magic == b"\x89P", png), (_is_webp(contents), webp), (magic == b"BM", bmp)]
    return tf.case(kinds, default=lambda: tf.constant(True))


def is_plain_jpeg(contents: Shaped[tf.Tensor, ""]) -> Bool[tf.Tensor, ""]:
    """Whether a file is a JPEG without EXIF by its first bytes: tables follow JFIF at once."""
    jfif = tf.strings.substr(contents, 0, 6) == b"\xff\xd8\xff\xe0\0\x10"
    return jfif & (tf.strings.substr(contents, 20, 2) == b"\xff\xdb")


def jpeg_orientation(contents: Shaped[tf.Tensor, ""]) -> Int[tf.Tensor, ""]:
    """EXIF orientation of a JPEG, 1 to 8, int32; 1 if there is none, or for another kind of file.

    EXIF is looked for in the segments of applications and comments with which a JPEG begins, where
    its standard (CIPA DC-008, 4.5.4) puts it. Damaged EXIF counts as none.

    Raises:
      tf.errors.InvalidArgumentError: if the file ends within these segments.
    """

    def bytes_at(at: tf.Tensor, count: int) -> tf.Tensor:
        return tf.cast(tf.io.decode_raw(tf.strings.substr(contents, at, count), tf.uint8), tf.int32)

    def is_exif(at: tf.Tensor) -> tf.Tensor:
        return tf.strings.substr(contents, at + 4, 6) == b"Exif\0\0"

    def passes(at: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
        application = (head[0] == 0xFF) & ((head[1] & 0xF0 == 0xE0) | (head[1] == 0xFE))
        return application & ~is_exif(at)

    def following(at: tf.Tensor, head: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        at += 2 + 256 * head[2] + head[3]
        return at, bytes_at(at, 4)

    def jpeg() -> tf.Tensor:
        first = tf.constant(2)
        at, head = tf.while_loop(passes, following, (first, bytes_at(first, 4)))

        def stated() -> tf.Tensor:
            return _tiff_orientation(bytes_at(at + 10, tf.maximum(256 * head[2] + head[3] - 8, 0)))

        return tf.cond(is_exif(at), stated, _upright)

    return tf.cond(tf.io.is_jpeg(contents), jpeg, _upright)


def _tiff_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """The orientation that the first directory of a TIFF block ``[n]`` of bytes holds, or 1."""
    size = tf.size(tiff)
    tiff = tf.pad(tiff, [[0, 16]])  # so that what points beyond the end reads zeros
    little = tiff[0] == ord("I")

    def number(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        return tf.where(little, first + 256 * second, 256 * first + second)

    offset = tf.where(little, tiff[4:8], tiff[7:3:-1])  # of the directory, lowest byte first
    beyond = tf.reduce_any(offset[2:] > 0)  # a segment has less than 2**16 bytes
    start = tf.where(beyond, size, tf.minimum(offset[0] + 256 * offset[1], size))
    count = tf.minimum(number(tiff[start], tiff[start + 1]), (size - start) // 12)
    fields = tf.reshape(tiff[start + 2 : start + 2 + 12 * count], [-1, 12])
    tags = number(fields[:, 0], fields[:, 1])
    big_long = ~little & (fields[:, 3] == _LONG)
    values = tf.where(
        big_long, 256 * fields[:, 10] + fields[:, 11], number(fields[:, 8], fields[:, 9])
    )
    found = tf.reduce_max(tf.where(tags == _ORIENTATION, values, 0))
    return tf.where((found >= 1) & (found <= 8), found, 1)


def _webp_shape(contents: tf.Tensor) -> tf.Tensor:
    def lossy() -> tf.Tensor:
        return tf.stack([_number(contents, at, tf.uint16) & 0x3FFF for at in (28, 26)])

    def lossless() -> tf.Tensor:
        bits = _number(contents, 21, tf.int32)
        return tf.stack([((bits // 2**14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1])

    def extended() -> tf.Tensor:  # two sides of three bytes each
        height, width = _number(contents, 26, tf.int32) // 256, _number(contents, 24, tf.int32)
        return tf.stack([(height & 0xFFFFFF) + 1, (width & 0xFFFFFF) + 1])

    kind = tf.strings.substr(contents, 12, 4)
    return tf.case([(kind == b"VP8 ", lossy), (kind == b"VP8L", lossless)], default=extended)


def _is_webp(contents: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_full_match(tf.strings.substr(contents, 0, 16), rb"(?s)RIFF\C{4}WEBP\C*")


def _number(
    contents: tf.Tensor, start: int, kind: tf.DType, *, little_endian: bool = True
) -> tf.Tensor:
    """The int64 of a field of a header."""
    field = tf.strings.substr(contents, start, kind.size)
    return tf.cast(tf.io.decode_raw(field, kind, little_endian=little_endian)[0], tf.int64)


def _upright() -> tf.Tensor:
    return tf.constant(1)


def _false() -> tf.Tensor:
    return tf.constant(False)

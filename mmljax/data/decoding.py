"""How image files are decoded, and what Pillow decodes of them. No TensorFlow.

TensorFlow decodes JPEG, PNG, still WebP without alpha, and BMP with 24 or 32 bits a pixel, all as
Pillow does. Pillow decodes the rest (:func:`mmljax.data.headers.needs_pillow`), after the batch's
other images, which is slower.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np

from mmljax.errors import require
from mmljax.text import one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp")
"""What the names of images end in."""

UNREAD = (".heic", ".heif", ".tif", ".tiff", ".jxl")
"""What the names of pictures end in that are not read."""

KINDS = "JPEG, PNG, WebP, AVIF, GIF or BMP"
"""The files that are read, for errors."""

SCALES = (1, 2, 4, 8)
"""By which a JPEG may be shrunk while it is decoded."""

LEAST = 2
"""Pixels a side that the decoded window of a shrunk JPEG has at least, for each wanted one."""

MAX_PIXELS = 2**30 // 6
"""The largest image that is decoded; Pillow calls larger ones decompression bombs."""

DECODING = (
    f"upright by EXIF; JPEG at 1/{', 1/'.join(map(str, SCALES))} with at least {LEAST} times the "
    "wanted pixels a side"
)
"""What of the decoding changes scores; part of the evaluation protocol."""

_ISPE = re.compile(rb"ispe\0{4}(.{8})", re.DOTALL)
_HEADER = 1 << 16  # bytes of an AVIF file in which sizes are looked for


class NotAnImage(ValueError):
    """A file that Pillow cannot decode, and why."""


def is_avif(contents: bytes) -> bool:
    """Whether a file begins as AVIF."""
    return contents[4:12] in (b"ftypavif", b"ftypavis")


def avif_shape(contents: bytes) -> tuple[int, int]:
    """Height and width of the largest picture whose size an AVIF file states; nothing is decoded.

    Raises:
      NotAnImage: if it states none.
    """
    sizes = [struct.unpack(">II", size) for size in _ISPE.findall(contents[:_HEADER])]
    if not sizes:
        raise NotAnImage("it states no size")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return height, width


def upright_bmp(contents: bytes) -> bytes:
    """The upright first picture of an image file, as a BMP file of 24 bits a pixel.

    Alpha is dropped, as by ``Image.convert("RGB")``. Of 16 bits a channel the upper 8 count, where
    Pillow would make grey images white.

    Raises:
      NotAnImage: if Pillow cannot decode it.
      UserError: if Pillow is not installed.
    """
    require("PIL", extra="data", purpose="reading AVIF, GIF, animated WebP and PNG with EXIF")
    from PIL import Image, ImageOps

    file = io.BytesIO()
    try:
        with Image.open(
            io.BytesIO(contents), formats=("AVIF", "BMP", "GIF", "PNG", "WEBP")
        ) as image:
            picture = ImageOps.exif_transpose(image)
            if picture.mode.startswith("I;16"):
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture.convert("RGB").save(file, "BMP")
    except (
        *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, TypeError, LookupError),
        *(struct.error, zlib.error, Image.DecompressionBombError),
    ) as error:
        raise NotAnImage(one_line(error)) from error
    return file.getvalue()


def refusal(contents: bytes) -> str:
    """Why an undecodable file is none of the kinds that are read, as the end of a sentence."""
    kind = next((name for start, name in _UNREAD.items() if re.match(start, contents)), None)
    if kind is not None:
        return f"it is {kind}, which is not read; convert it to JPEG, WebP or AVIF"
    return (
        f"its {len(contents)} bytes are not a whole {KINDS} image; fetch the file again or remove "
        "it from the data set's list"
    )


_UNREAD = {
    rb"(?s).{4}ftyp(hei|hev|mif1|msf1)": "HEIC",
    rb"II\*\0|MM\0\*": "TIFF",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
}

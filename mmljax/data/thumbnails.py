"""Thumbnails of a split's images for reports, made by Pillow."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from mmljax.data import paths as files
from mmljax.errors import UserError
from mmljax.text import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmljax.types import Split


def thumbnail(split: Split, row: int, *, side: int) -> Image:
    """An image of a split in RGB, its longer side ``side`` pixels; smaller ones keep their size.

    Args:
      split: of paths, encoded bytes or arrays; of features, whose pictures are grey.
      row: which image.
      side: pixels.

    Raises:
      UserError: naming an image that cannot be read, is damaged, or is far too large.
    """
    from PIL import Image, ImageOps

    if split.images.ndim == 3:
        return Image.new("RGB", (side, side), "lightgrey")
    stored = split.images[row]
    too_large = Image.DecompressionBombWarning, Image.DecompressionBombError
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other oddities in a file that can be shown
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _opened(stored) as image:
                image.draft("RGB", (side, side))  # a JPEG is decoded at about this size
                small = ImageOps.exif_transpose(image).convert("RGB")
                small.thumbnail((side, side))
    except (OSError, ValueError, SyntaxError, *too_large) as error:
        raise UserError(
            f"image {split.names[row]} cannot be shown ({one_line(error)}); fetch it again"
        ) from None
    return small


def webp(image: Image, *, side: int, quality: int) -> bytes:
    """A picture as a WebP file, its longer side at most ``side`` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()


def _opened(stored: Any) -> Image:
    from PIL import Image

    if isinstance(stored, np.ndarray):
        return Image.fromarray(stored[..., 0] if stored.shape[-1] == 1 else stored)
    return Image.open(io.BytesIO(stored if isinstance(stored, bytes) else files.read(stored)))

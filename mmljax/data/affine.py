"""Affine resampling of images, each by a map of its own."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


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

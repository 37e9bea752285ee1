"""The two forms that objectives of every family apply to a block of similarities."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def promote(similarity: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Half precision to float32; float32 and float64 stay as they are."""
    half = jnp.finfo(similarity.dtype).bits < 32
    return similarity.astype(jnp.float32) if half else similarity


def chord_distance(similarity: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Euclidean distance ``sqrt(2 - 2 s)`` of unit vectors whose cosine is ``s``.

    Where the vectors coincide (or rounding lifts the cosine above 1) the distance and its
    gradient are 0, not infinite.
    """
    squared = 2 - 2 * similarity
    coincide = squared <= 0  # False for a NaN, which is not hidden
    return jnp.where(coincide, 0, jnp.sqrt(jnp.where(coincide, 1, squared)))

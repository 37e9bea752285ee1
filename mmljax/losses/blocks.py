"""Forms that the block losses of all families share, and the block of distances that some use."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmljax.numerics import promote, squared_distances
from mmljax.types import Values


def any_column(mask: Bool[Array, "n m"]) -> Bool[Array, " n"]:
    """Whether each row has a column in the mask."""
    return jnp.any(mask, axis=-1)


def all_valid(value: Float[Array, " n"]) -> Values:
    """Values whose mean runs over every row."""
    return Values(value, jnp.ones_like(value, bool))


def squared_chord(
    similarity: Float[Array, "n m"], squared_distance: Float[Array, "n m"] | None
) -> Float[Array, "n m"]:
    """Return the squared distances as given, or ``2 - 2 s`` where none are given."""
    return promote(2 - 2 * promote(similarity) if squared_distance is None else squared_distance)


def chord_distance(
    similarity: Float[Array, "n m"], squared_distance: Float[Array, "n m"] | None
) -> Float[Array, "n m"]:
    """Euclidean distance of unit vectors; it and its gradient are 0 where they coincide."""
    squared = squared_chord(similarity, squared_distance)
    coincide = squared <= 0  # False for a NaN, which is not hidden
    return jnp.where(coincide, 0, jnp.sqrt(jnp.where(coincide, 1, squared)))


def distances_for(
    loss: Callable[..., Values], rows: Float[Array, "n d"], columns: Float[Array, "m d"]
) -> tuple[Float[Array, "n m"], ...]:
    """Return what a block loss takes after its masks: squared distances, or nothing.

    ``loss(similarity, masks, *distances_for(loss, rows, columns))`` is exact to rounding at every
    distance. A loss that measures distances also runs without them, on ``2 - 2 s``, whose error
    is stated in :func:`mmljax.numerics.squared_distances`.

    Args:
      loss: a block loss, or a ``partial`` of one.
      rows: unit vectors.
      columns: unit vectors.
    """
    measured = "squared_distance" in inspect.signature(loss).parameters
    return (squared_distances(rows, columns),) if measured else ()

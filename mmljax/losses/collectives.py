"""Rows that a device owns, and the columns it fetches from the others, inside a ``shard_map``.

Samples and proxies are split over the devices by rows. Columns are all of them (:func:`gather`), or
only some proxies, by number (:func:`fetch_proxies`): what a step holds then does not grow with the
number of classes on other devices. No derivative is taken through a collective; the functions
that bring gradients home stand beside those that fetch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mmljax.mesh import AXIS
from mmljax.types import Points


def own_samples(embeddings: Float[Array, "b d"], labels: Int[Array, " b"]) -> Points:
    """This device's part of the batch."""
    count = labels.shape[0]
    positions = jax.lax.axis_index(AXIS) * count + jnp.arange(count)
    return Points(embeddings, labels, positions, jnp.full_like(labels, True, dtype=bool))


def own_proxies(vectors: Float[Array, "c d"], *, classes: int, centers: int) -> Points:
    """This device's part of the proxies; what is beyond the classes is padding."""
    count = vectors.shape[0]
    positions = jax.lax.axis_index(AXIS) * count + jnp.arange(count)
    labels = positions // centers
    return Points(vectors, labels, positions, labels < classes)


def gather(tree: Any) -> Any:
    """All devices' rows, in the order of the devices."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def append_memory(columns: Points, memory: dict[str, Array], *, active: Array) -> Points:
    """The references with those of the cross-batch memory after them."""
    further = Points(
        vectors=memory["vectors"],
        labels=memory["labels"],
        positions=jnp.full_like(memory["labels"], -1),
        valid=(memory["labels"] >= 0) & active,
    )
    return Points(*(jnp.concatenate(pair) for pair in zip(columns, further, strict=True)))


def draw_proxies(key: PRNGKeyArray, *, count: int, of: int) -> Int[Array, " s"]:
    """Numbers of ``count`` different ones of the first ``of`` proxies, in rising order.

    One is drawn uniformly from each of ``count`` ranges of equal length (but for one), so each
    has the chance ``count / of`` (almost), at a cost that does not depend on ``of``.
    """
    bounds = np.arange(count + 1, dtype=np.int64) * of // count
    low, high = (jnp.asarray(x, jnp.int32) for x in (bounds[:-1], bounds[1:]))
    return jax.random.randint(key, (count,), low, high)


def fetch_proxies(own: Float[Array, "c d"], positions: Int[Array, " s"]) -> Float[Array, "s d"]:
    """The proxies of these numbers, alike on all devices; exact, as all other terms are 0."""
    place, held = _place(own, positions)
    return jax.lax.psum(jnp.where(held[:, None], own[place], 0), AXIS)


def return_gradient(
    gradient: Float[Array, "s d"], positions: Int[Array, " s"], own: Float[Array, "c d"]
) -> Float[Array, "c d"]:
    """What all devices found for fetched proxies, added up, at the rows that this one owns."""
    place, held = _place(own, positions)
    total = jnp.where(held[:, None], jax.lax.psum(gradient, AXIS), 0)
    return jnp.zeros_like(own).at[place].add(total)


def class_proxies(
    own: Float[Array, "c d"], labels: Int[Array, " b"], *, centers: int
) -> Float[Array, "b k d"]:
    """All proxies of the class of each of this device's samples."""
    every = gather(labels)
    positions = (every[:, None] * centers + jnp.arange(centers)[None, :]).reshape(-1)
    place, held = _place(own, positions)
    found = jnp.where(held[:, None], own[place], 0)
    mine = jax.lax.psum_scatter(found, AXIS, tiled=True)
    return mine.reshape(labels.shape[0], centers, -1)


def _place(
    own: Float[Array, "c d"], positions: Int[Array, " s"]
) -> tuple[Int[Array, " s"], Bool[Array, " s"]]:
    """Where proxies of these numbers lie on this device, and whether they do."""
    place = positions - jax.lax.axis_index(AXIS) * own.shape[0]
    held = (place >= 0) & (place < own.shape[0])
    return jnp.clip(place, 0, own.shape[0] - 1), held

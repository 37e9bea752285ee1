"""Rows that a device owns, and columns gathered from all devices.

Samples and proxies are split over a named mesh axis by rows. Columns are all of them
(:meth:`Axis.gather`) or some proxies by number (:func:`fetch_proxies`), so what a step holds does
not grow with the number of classes on other devices. No derivative is taken through a collective:
the functions that return gradients to their owners stand beside those that fetch. Without a named
axis one device owns every row, and every collective is the identity.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mmljax.types import Points


@dataclasses.dataclass(frozen=True)
class Axis:
    """The mesh axis over which rows are split; ``name`` is None for a single owner."""

    name: str | None

    def index(self) -> Array | int:
        """The number of this device along the axis."""
        return 0 if self.name is None else jax.lax.axis_index(self.name)

    def gather(self, tree: Any) -> Any:
        """The rows of all devices, in the order of the devices."""
        if self.name is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.name, tiled=True), tree)

    def sum(self, tree: Any) -> Any:
        """The sum over all devices, equal on each."""
        return tree if self.name is None else jax.lax.psum(tree, self.name)

    def scatter_sum(self, x: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """The sum over all devices of gathered rows, each row at its owner."""
        return x if self.name is None else jax.lax.psum_scatter(x, self.name, tiled=True)

    def varying(self, x: Array) -> Array:
        """A value that is equal on all devices, typed as one that may differ."""
        return x if self.name is None else jax.lax.pcast(x, self.name, to="varying")


def own_samples(
    embeddings: Float[Array, "b d"], labels: Int[Array, " b"], valid: Bool[Array, " b"], axis: Axis
) -> Points:
    """This device's part of the batch."""
    count = labels.shape[0]
    return Points(embeddings, labels, axis.index() * count + jnp.arange(count), valid)


def own_proxies(vectors: Float[Array, "c d"], axis: Axis, *, classes: int, centers: int) -> Points:
    """This device's part of the proxies; rows beyond the classes are padding."""
    count = vectors.shape[0]
    positions = axis.index() * count + jnp.arange(count)
    labels = positions // centers
    return Points(vectors, labels, positions, labels < classes)


def draw_proxies(key: PRNGKeyArray, *, count: int, of: int) -> Int[Array, " s"]:
    """Numbers of ``count`` different proxies of the first ``of``, in rising order.

    One is drawn uniformly from each of ``count`` ranges of almost equal length, so each proxy has
    almost the chance ``count / of``, at a cost that does not depend on ``of``.
    """
    bounds = np.arange(count + 1, dtype=np.int64) * of // count
    low, high = (jnp.asarray(x, jnp.int32) for x in (bounds[:-1], bounds[1:]))
    return jax.random.randint(key, (count,), low, high)


def sample_classes(
    key: PRNGKeyArray, labels: Int[Array, " b"], valid: Bool[Array, " b"], *, count: int, of: int
) -> tuple[Int[Array, " s"], Bool[Array, " s"]]:
    """The classes of a batch, then ``count`` drawn of the first ``of``; each is valid once.

    Places are as many as the batch has samples and ``count`` together. Those of samples that repeat
    a class or are padding, and of drawn classes that the batch has, are not valid.

    Source: An et al. 2022, arXiv 2203.15565 (Partial FC), with the rate ``count / of``. Deviations:
    there the batch's classes are among the number that is sampled, here beside it; and each device
    draws from its own part, where here one draw over all parts is the same on any number of
    devices.
    """
    ordered = jnp.sort(jnp.where(valid, labels, -1))
    first = jnp.diff(ordered, prepend=-1) > 0
    drawn = draw_proxies(key, count=count, of=of)
    place = jnp.clip(jnp.searchsorted(ordered, drawn), 0, len(labels) - 1)
    new = ordered[place] != drawn
    return jnp.concatenate([ordered, drawn]), jnp.concatenate([first, new])


def proxies_of(classes: Int[Array, " c"], centers: int) -> Int[Array, " s"]:
    """The numbers of all proxies of classes, those of a class together."""
    return (classes[:, None] * centers + jnp.arange(centers)[None, :]).reshape(-1)


def fetch_proxies(
    own: Float[Array, "c d"], positions: Int[Array, " s"], axis: Axis
) -> Float[Array, "s d"]:
    """The proxies with these numbers, equal on all devices; exact, as all other terms are 0."""
    place, held = _place(own, positions, axis)
    return axis.sum(jnp.where(held[:, None], own[place], 0))


def return_gradient(
    gradient: Float[Array, "s d"], positions: Int[Array, " s"], own: Float[Array, "c d"], axis: Axis
) -> Float[Array, "c d"]:
    """The sum over all devices of the gradients at fetched proxies, at the rows owned here."""
    place, held = _place(own, positions, axis)
    total = jnp.where(held[:, None], axis.sum(gradient), 0)
    return jnp.zeros_like(own).at[place].add(total)


def class_proxies(
    own: Float[Array, "c d"], labels: Int[Array, " b"], axis: Axis, *, centers: int
) -> Float[Array, "b k d"]:
    """All proxies of the class of each of this device's samples."""
    every = axis.gather(labels)
    place, held = _place(own, proxies_of(every, centers), axis)
    mine = axis.scatter_sum(jnp.where(held[:, None], own[place], 0))
    return mine.reshape(labels.shape[0], centers, -1)


def _place(
    own: Float[Array, "c d"], positions: Int[Array, " s"], axis: Axis
) -> tuple[Int[Array, " s"], Bool[Array, " s"]]:
    """The local row of proxies with these numbers, and whether this device owns them."""
    place = positions - axis.index() * own.shape[0]
    held = (place >= 0) & (place < own.shape[0])
    return jnp.clip(place, 0, own.shape[0] - 1), held

"""Cross-batch memory: a ring of past embeddings that serve as further references.

Wang et al. 2020, arXiv 1912.06798. The ring's rows are split over the mesh axis. It holds the last
``size`` valid-or-padded rows of the batches, for any batch size, also one above ``size``. Rows
beyond ``size`` are padding for the devices: they are neither written nor read.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mmljax.losses.collectives import Axis
from mmljax.types import Points


def init_memory(size: int, dimension: int, *, dtype: Any, multiple_of: int) -> dict[str, Array]:
    """An empty ring of ``size`` slots; empty where ``size`` is 0.

    Rows are padded to a multiple of ``multiple_of``.
    """
    if not size:
        return {}
    rows = -(-size // multiple_of) * multiple_of
    return {
        "vectors": jnp.zeros((rows, dimension), dtype),
        "labels": jnp.full((rows,), -1, jnp.int32),
        "next": jnp.zeros((), jnp.int32),  # the slot that the next embedding takes
    }


def append_memory(columns: Points, memory: dict[str, Array], *, active: Array, size: int) -> Points:
    """The references with those of the gathered memory after them, valid if ``active``."""
    further = Points(
        vectors=memory["vectors"],
        labels=memory["labels"],
        positions=jnp.full_like(memory["labels"], -1),
        valid=(memory["labels"] >= 0) & (jnp.arange(len(memory["labels"])) < size) & active,
    )
    return Points(*(jnp.concatenate(pair) for pair in zip(columns, further, strict=True)))


def write_memory(
    memory: dict[str, Array], batch: Points, axis: Axis, *, size: int
) -> dict[str, Array]:
    """The ring after a batch: each row of this device takes the last embedding written to it.

    Element ``j`` of the global batch is written to slot ``(next + j) mod size``. A slot that
    several elements reach holds the last of them, so no write depends on the order of duplicate
    indices. ``next`` stays below ``size``, so it never overflows however long the run is.

    Args:
      memory: this device's rows of the ring.
      batch: the samples of the global batch; padded ones leave an empty slot.
      axis: over which the ring's rows are split.
      size: slots of the ring, without its padding.
    """
    if not memory:
        return memory
    rows, count = memory["labels"].shape[0], batch.labels.shape[0]
    slots = axis.index() * rows + jnp.arange(rows)
    first = (slots - memory["next"]) % size  # the first element that reaches the slot
    element = first + (count - 1 - first) // size * size  # the last one
    written = (slots < size) & (first < count)
    element = jnp.where(written, element, 0)
    labels = jnp.where(batch.valid, batch.labels, -1)
    vectors = batch.vectors[element].astype(memory["vectors"].dtype)
    return {
        "vectors": jnp.where(written[:, None], vectors, memory["vectors"]),
        "labels": jnp.where(written, labels[element], memory["labels"]),
        "next": (memory["next"] + count % size) % size,
    }

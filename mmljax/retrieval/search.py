"""Exact nearest neighbours and exact ranks by blocks of one matrix product.

Queries meet the gallery in blocks, so that the similarities held at once are bounded whatever the
sizes are: ``QUERY_BLOCK`` rows of ``chunk`` columns. Everything is exact: similarities are float32
products at full precision, equal similarities are ordered by their place in the gallery, and a
query is kept from finding itself by its index, never by its similarity.

:func:`nearest_neighbors` lists the neighbours that every metric of :mod:`mmljax.retrieval.metrics` reads;
:func:`sharded_nearest_neighbors` does so with the gallery split over devices;
:func:`positive_ranks` sorts nothing, and counts what Recall@K alone needs.

>>> import jax.numpy as jnp
>>> similarity, index = nearest_neighbors(jnp.eye(2), jnp.eye(2)[::-1], k=2, chunk=2)
>>> index.tolist()
[[1, 0], [0, 1]]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mmljax.numerics import similarity_matrix
from mmljax.retrieval.top_k import (
    WIDTH,
    Neighbors,
    best_of,
    check_search,
    in_blocks,
    in_chunks,
    own_rows,
    pad_rows,
    round_up,
    search_chunks,
)

QUERY_BLOCK = 512
"""Queries that meet the gallery at once."""

_LAST = 2**31 - 1  # as a label, sorts padding behind all else


class PositiveRanks(NamedTuple):
    """Where the best-ranked relevant gallery row of each query stands.

    Where nothing is relevant, ``best_similarity`` is -inf and only ``relevant`` has a meaning.
    """

    best_similarity: Float[Array, " q"]  # highest similarity of a relevant row
    above: Int[Array, " q"]  # irrelevant rows strictly above it
    tied: Int[Array, " q"]  # irrelevant rows exactly at it
    tied_relevant: Int[Array, " q"]  # relevant rows exactly at it, at least 1
    relevant: Int[Array, " q"]  # relevant rows in the gallery


@functools.partial(jax.jit, static_argnames=("k", "chunk"))
def nearest_neighbors(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"],
    *,
    k: int,
    chunk: int,
    self_index: Int[Array, " q"] | None = None,
) -> Neighbors:
    """The ``k`` gallery rows of highest inner product with each query, exactly.

    Args:
      queries: finite embeddings; of unit length where cosine similarity is meant.
      gallery: embeddings to search.
      k: neighbours per query.
      chunk: most gallery rows per matrix product, rounded up to a multiple of 128 that holds
        ``k``. The fewer products the faster, so the largest that memory allows.
      self_index: each query's own row of the gallery, which it shall not find.

    Returns:
      Similarities in falling order and gallery indices; equal similarities by rising index.

    Raises:
      UserError: the gallery has fewer than ``k`` rows to find, or ``k`` or ``chunk`` is below 1.
    """
    check_search(queries, gallery, k, chunk, self_index)
    queries = queries.astype(jnp.float32)
    chunks = in_chunks(gallery.astype(jnp.float32), k=k, chunk=chunk)
    search = functools.partial(search_chunks, chunks=chunks, rows=gallery.shape[0], k=k)
    return in_blocks(search, (queries, own_rows(self_index, queries)), block=QUERY_BLOCK)


@functools.partial(jax.jit, static_argnames=("k", "chunk", "mesh", "axis"))
def sharded_nearest_neighbors(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"],
    *,
    k: int,
    chunk: int,
    mesh: Mesh,
    axis: str = "data",
    self_index: Int[Array, " q"] | None = None,
) -> Neighbors:
    """:func:`nearest_neighbors` with the gallery in contiguous parts over ``mesh``'s ``axis``.

    Each device finds its part's neighbours of all queries (which are replicated); the lists are
    gathered in the order of the devices, that is of the gallery, and merged. The result is
    replicated, and equals that of one device in every bit, ties included, on a backend that rounds
    an inner product alike in all blocks whose widths are multiples of 128 (XLA's CPU does).
    """
    check_search(queries, gallery, k, chunk, self_index)
    rows, devices = gallery.shape[0], mesh.shape[axis]
    part_rows = -(-rows // devices)

    def on_device(queries: Array, own: Array, part: Array) -> Neighbors:
        first = lax.axis_index(axis) * part_rows
        held = jnp.minimum(rows - first, part_rows)  # less, even below 0, on the last devices
        chunks = in_chunks(part.astype(jnp.float32), k=k, chunk=chunk)

        def search(queries: Array, own: Array) -> Neighbors:
            found = search_chunks(queries, own - first, chunks=chunks, rows=held, k=k)
            found = found._replace(indices=found.indices + first)
            return best_of(lax.all_gather(found, axis, axis=1, tiled=True), k=k)

        return in_blocks(search, (queries.astype(jnp.float32), own), block=QUERY_BLOCK)

    split, whole = PartitionSpec(axis), PartitionSpec()
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole, check_vma=False
    )(queries, own_rows(self_index, queries), pad_rows(gallery, part_rows * devices))


@functools.partial(jax.jit, static_argnames="chunk")
def positive_ranks(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"],
    query_labels: Int[Array, " q"],
    gallery_labels: Int[Array, " g"],
    *,
    chunk: int,
    self_index: Int[Array, " q"] | None = None,
) -> PositiveRanks:
    """Counts of what ranks above, and level with, each query's best relevant gallery row.

    They give Recall@K for every K, and say what ties are worth
    (:func:`mmljax.retrieval.metrics.tied_recall_at_k`), without any sorting. A query's similarities to the
    whole gallery are held together, since what is above the best relevant row is known only once
    that row is; so fewer queries meet a larger gallery at once.

    Args:
      queries: finite embeddings.
      gallery: embeddings to search.
      query_labels: classes of the queries.
      gallery_labels: classes of the gallery; relevant is what has the query's.
      chunk: as in :func:`nearest_neighbors`, the same bound on the memory: ``QUERY_BLOCK`` times
        ``chunk`` similarities, or an eighth of ``QUERY_BLOCK`` times the gallery if that is more.
      self_index: each query's own row of the gallery, which does not count.

    Raises:
      UserError: the gallery has no row to find, or ``chunk`` is below 1.
    """
    check_search(queries, gallery, 1, chunk, self_index)
    rank = _make_rank(gallery, gallery_labels, rows=gallery.shape[0])
    arrays = queries, query_labels, own_rows(self_index, queries)
    return in_blocks(rank, arrays, block=_rank_block(gallery.shape[0], chunk))


@functools.partial(jax.jit, static_argnames=("chunk", "mesh", "axis"))
def sharded_positive_ranks(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"],
    query_labels: Int[Array, " q"],
    gallery_labels: Int[Array, " g"],
    *,
    chunk: int,
    mesh: Mesh,
    axis: str = "data",
    self_index: Int[Array, " q"] | None = None,
) -> PositiveRanks:
    """:func:`positive_ranks` with the gallery in contiguous parts over ``mesh``'s ``axis``.

    The devices agree on the best relevant similarity (a maximum), then add up what each counts in
    its part. The result is replicated, and equals that of one device under the same condition as
    :func:`sharded_nearest_neighbors`.
    """
    check_search(queries, gallery, 1, chunk, self_index)
    rows, devices = gallery.shape[0], mesh.shape[axis]
    part_rows = -(-rows // devices)

    def on_device(queries: Array, labels: Array, own: Array, *part: Array) -> PositiveRanks:
        first = lax.axis_index(axis) * part_rows
        held = jnp.clip(rows - first, 0, part_rows)
        rank = _make_rank(
            *part,
            rows=held,
            highest=lambda x: lax.pmax(x, axis),
            total=lambda x: lax.psum(x, axis),
        )
        block = _rank_block(part_rows, chunk)
        return in_blocks(rank, (queries, labels, own - first), block=block)

    split, whole = PartitionSpec(axis), PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, whole, whole, split, split),
        out_specs=whole,
        check_vma=False,
    )(
        queries,
        query_labels,
        own_rows(self_index, queries),
        pad_rows(gallery, part_rows * devices),
        pad_rows(gallery_labels, part_rows * devices),
    )


def _same(x: Array) -> Array:
    return x


def _make_rank(
    gallery: Array,
    labels: Array,
    *,
    rows: Array | int,
    highest: Callable[[Array], Array] = _same,
    total: Callable[[Array], Array] = _same,
) -> Callable[[Array, Array, Array], PositiveRanks]:
    """What ranks a block of queries (with labels and own rows) in the gallery's first ``rows``.

    Args:
      gallery: one part of a gallery, of which rows from ``rows`` on are padding.
      labels: of its rows.
      rows: that it holds.
      highest: of the parts' values, the largest.
      total: of the parts' counts, the sum.
    """
    width = round_up(gallery.shape[0], WIDTH)
    gallery = pad_rows(gallery.astype(jnp.float32), width)
    labels = pad_rows(labels, width)
    # In the gallery ordered by label, the rows relevant to a query lie side by side.
    labels = jnp.where(jnp.arange(width) < rows, labels.astype(jnp.int32), _LAST)
    order = jnp.argsort(labels)
    labels = labels[order]

    def rank(queries: Array, query_labels: Array, own: Array) -> PositiveRanks:
        similarity = similarity_matrix(queries.astype(jnp.float32), gallery)
        row = jnp.arange(queries.shape[0])
        start, end = (
            jnp.searchsorted(labels, query_labels, side=side).astype(jnp.int32)
            for side in ("left", "right")
        )

        def fold(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            best, level, relevant = carry
            column = order.at[start + step].get(mode="clip")
            counts = (start + step < end) & (column < rows) & (column != own)
            value = jnp.where(counts, similarity[row, column], -jnp.inf)
            level = jnp.where(value > best, 1, level + (counts & (value == best)))
            return jnp.maximum(value, best), level, relevant + counts

        none = jnp.zeros_like(start)
        lowest = jnp.full(start.shape, -jnp.inf, similarity.dtype)
        here, tied_relevant, relevant = lax.fori_loop(
            0, jnp.max(end - start), fold, (lowest, none, none)
        )
        best = highest(here)
        tied_relevant = total(jnp.where(here == best, tied_relevant, 0))
        above, level = _count_rows(similarity, best)
        # That pass counts padding, whose similarity is 0, and the query itself too.
        own = jnp.where((own >= 0) & (own < rows), own, width)
        itself = similarity.at[row, own].get(mode="fill", fill_value=-jnp.inf)
        above -= (itself > best) + jnp.where(best < 0, width - rows, 0)
        level -= (itself == best) + jnp.where(best == 0, width - rows, 0)
        return PositiveRanks(
            best, total(above), total(level) - tied_relevant, tied_relevant, total(relevant)
        )

    return rank


def _count_rows(x: Array, at: Array) -> tuple[Array, Array]:
    """Counts per row of what is above, and level with, a value; in one pass."""
    zero = jnp.int32(0)
    counts = lax.reduce(
        ((x > at[:, None]).astype(jnp.int32), (x == at[:, None]).astype(jnp.int32)),
        (zero, zero),
        lambda x, y: (x[0] + y[0], x[1] + y[1]),
        (1,),
    )
    return counts[0], counts[1]


def _rank_block(rows: int, chunk: int) -> int:
    return min(QUERY_BLOCK, max(QUERY_BLOCK * chunk // rows, QUERY_BLOCK // 8))

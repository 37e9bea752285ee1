"""Exact nearest neighbours and exact ranks, computed in blocks of the similarity matrix.

The similarities held at once are bounded whatever the sizes are: ``QUERY_BLOCK`` queries times
``chunk`` gallery rows. Everything is exact: similarities are float32 products at full precision,
equal similarities are ordered by their place in the gallery, and a query is excluded from its own
search by its index, never by its similarity.

:func:`nearest_neighbors` lists neighbours; :func:`sharded_nearest_neighbors` does so with the
gallery split over devices. :func:`positive_ranks` sorts nothing, and counts what Recall@K needs.
:func:`neighbors_and_ranks` gives both from one product, on any number of devices; an evaluation
(:mod:`mmljax.retrieval.evaluate`) is built on it.

Arrays of NumPy and JAX are accepted. Outside ``jax.jit`` the embeddings are checked: NaN or an
infinite value is an error (:func:`mmljax.retrieval.checks.check_embeddings`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mmljax.errors import UserError
from mmljax.mesh import AXIS
from mmljax.numerics import similarity_matrix
from mmljax.retrieval.checks import AnyArray, check_concrete, check_search
from mmljax.retrieval.top_k import (
    WIDTH,
    Neighbors,
    best_of,
    grouped_top_k,
    in_blocks,
    in_chunks,
    own_rows,
    pad_rows,
    round_up,
    search_chunks,
)

QUERY_BLOCK = 1024
"""Queries per matrix product."""

CHUNK = 32_768
"""Gallery rows per matrix product unless said otherwise: 128 MiB of similarities."""


class PositiveRanks(NamedTuple):
    """The rank of each query's best relevant gallery row, as counts.

    If no row is relevant, ``best_similarity`` is -inf and only ``relevant`` has a meaning.
    """

    best_similarity: Float[Array, " q"]  # highest similarity of a relevant row
    above: Int[Array, " q"]  # irrelevant rows strictly above it
    tied: Int[Array, " q"]  # irrelevant rows exactly at it
    tied_relevant: Int[Array, " q"]  # relevant rows exactly at it, at least 1
    relevant: Int[Array, " q"]  # relevant rows in the gallery


def nearest_neighbors(
    queries: Float[AnyArray, "q d"],
    gallery: Float[AnyArray, "g d"],
    *,
    k: int,
    chunk: int = CHUNK,
    self_index: Int[AnyArray, " q"] | None = None,
) -> Neighbors:
    """The ``k`` gallery rows of highest inner product with each query, exactly.

    >>> import jax.numpy as jnp
    >>> similarity, index = nearest_neighbors(jnp.eye(2), jnp.eye(2)[::-1], k=2)
    >>> index.tolist()
    [[1, 0], [0, 1]]

    Args:
      queries: finite embeddings; of unit length where cosine similarity is meant.
      gallery: embeddings to search.
      k: neighbours per query.
      chunk: most gallery rows per matrix product, rounded up to a multiple of 128 that holds
        ``k``. The fewer products the faster, so the largest that memory allows.
      self_index: each query's own row of the gallery, which is excluded from its search.

    Returns:
      Similarities in falling order and gallery indices, ``[q k]`` each; equal similarities by
      rising index.

    Raises:
      UserError: the gallery has fewer than ``k`` rows to find, ``k`` or ``chunk`` is below 1, the
        embedding sizes differ, or an embedding is not finite.
    """
    _check(queries, gallery, k=k, chunk=chunk, self_index=self_index)
    return _nearest(queries, gallery, self_index, k=k, chunk=chunk)


def sharded_nearest_neighbors(
    queries: Float[AnyArray, "q d"],
    gallery: Float[AnyArray, "g d"],
    *,
    k: int,
    mesh: Mesh,
    chunk: int = CHUNK,
    axis: str = AXIS,
    self_index: Int[AnyArray, " q"] | None = None,
) -> Neighbors:
    """:func:`nearest_neighbors` with the gallery in contiguous parts over ``mesh``'s ``axis``.

    Each device finds its part's neighbours of all queries (which are replicated); the lists are
    gathered in the order of the devices, which is that of the gallery, and merged. The result is
    replicated, and equals that of one device in every bit, ties included, on a backend that rounds
    an inner product alike in all blocks whose widths are multiples of 128 (XLA's CPU does).

    >>> import jax.numpy as jnp
    >>> from mmljax.mesh import make_mesh
    >>> found = sharded_nearest_neighbors(jnp.eye(2), jnp.eye(2)[::-1], k=1, mesh=make_mesh())
    >>> found.indices.tolist()
    [[1], [0]]

    Args:
      queries: as in :func:`nearest_neighbors`, like all that is not named here.
      gallery: padded to a multiple of the devices and split over them.
      k: neighbours per query.
      mesh: the devices.
      chunk: most rows of a device's part per matrix product.
      axis: the axis of the mesh.
      self_index: each query's own row of the gallery.

    Raises:
      UserError: as :func:`nearest_neighbors`.
    """
    _check(queries, gallery, k=k, chunk=chunk, self_index=self_index)
    return _sharded_nearest(queries, gallery, self_index, k=k, chunk=chunk, mesh=mesh, axis=axis)


def positive_ranks(
    queries: Float[AnyArray, "q d"],
    gallery: Float[AnyArray, "g d"],
    query_labels: Int[AnyArray, " q"],
    gallery_labels: Int[AnyArray, " g"],
    *,
    chunk: int = CHUNK,
    self_index: Int[AnyArray, " q"] | None = None,
) -> PositiveRanks:
    """Counts of what ranks above, and equal to, each query's best relevant gallery row.

    They give Recall@K for every K, and say how much ties matter
    (:func:`mmljax.retrieval.metrics.tied_recall_at_k`), without any sorting. A query's similarities
    to the whole gallery are held together, because what is above the best relevant row is known
    only once that row is; so a larger gallery means fewer queries per product.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    >>> ranks = positive_ranks(x[:1], x[1:], jnp.array([5]), jnp.array([4, 5]))
    >>> ranks.above.tolist(), ranks.relevant.tolist()
    ([1], [1])

    Args:
      queries: finite embeddings.
      gallery: embeddings to search.
      query_labels: classes of the queries.
      gallery_labels: classes of the gallery; a row is relevant if it has the query's. NumPy's
        64-bit integers and strings are compared exactly.
      chunk: bounds the similarities held at once: ``QUERY_BLOCK`` times ``chunk``, or an eighth of
        ``QUERY_BLOCK`` times the gallery if that is more.
      self_index: each query's own row of the gallery, which does not count.

    Raises:
      UserError: as :func:`nearest_neighbors`, with k = 1.
    """
    _check(queries, gallery, k=1, chunk=chunk, self_index=self_index)
    labels = renumbered(query_labels, gallery_labels)
    return _positive_ranks(queries, gallery, *labels, self_index, chunk=chunk)


def neighbors_and_ranks(
    queries: Float[AnyArray, "q d"],
    gallery: Float[AnyArray, "g d"],
    query_labels: Int[AnyArray, " q"],
    gallery_labels: Int[AnyArray, " g"],
    *,
    k: int,
    mesh: Mesh,
    chunk: int = CHUNK,
    axis: str = AXIS,
    self_index: Int[AnyArray, " q"] | None = None,
) -> tuple[Neighbors, PositiveRanks]:
    """:func:`nearest_neighbors` and :func:`positive_ranks` from one product per query block.

    The gallery lies in contiguous parts over ``mesh``'s ``axis``. Each device multiplies a block of
    queries with its whole part and takes both results from these similarities, so the similarity
    of a pair is the same number in both. The devices gather and merge their lists, take the
    maximum of their best relevant similarities, and add up what each counts in its part. The
    results are replicated, and equal those of one device under the same condition as in
    :func:`sharded_nearest_neighbors`.

    >>> import jax.numpy as jnp
    >>> from mmljax.mesh import make_mesh
    >>> x, labels = jnp.eye(3), jnp.array([0, 1, 1])
    >>> found, ranks = neighbors_and_ranks(x, x, labels, labels, k=1, mesh=make_mesh())
    >>> found.indices.tolist(), ranks.relevant.tolist()
    ([[0], [1], [2]], [1, 2, 2])

    Args:
      queries: finite embeddings, replicated.
      gallery: embeddings to search.
      query_labels: as in :func:`positive_ranks`.
      gallery_labels: as in :func:`positive_ranks`.
      k: neighbours per query.
      mesh: the devices.
      chunk: bounds the similarities that a device holds, as in :func:`positive_ranks` with its
        part in place of the gallery.
      axis: the axis of the mesh.
      self_index: each query's own row of the gallery, which is neither found nor counted.

    Raises:
      UserError: as :func:`nearest_neighbors`.
    """
    _check(queries, gallery, k=k, chunk=chunk, self_index=self_index)
    labels = renumbered(query_labels, gallery_labels)
    return _neighbors_and_ranks(
        queries, gallery, *labels, self_index, k=k, chunk=chunk, mesh=mesh, axis=axis
    )


def renumbered(query_labels: AnyArray, gallery_labels: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Labels that JAX can hold, equal wherever the given ones are.

    JAX keeps 32 bits of a 64-bit integer, so labels equal modulo 2**32 would become one. Labels of
    more than 32 bits, and those that are no integers, are numbered from 0 over both arrays.

    >>> import numpy as np
    >>> renumbered(np.array([7 + 2**32]), np.array([7, 7 + 2**32]))
    (array([1], dtype=int32), array([0, 1], dtype=int32))

    Raises:
      UserError: if one of the two is unknown inside ``jax.jit`` and the other is beyond 32 bits.
    """
    pair = query_labels, gallery_labels
    known = [labels for labels in pair if not isinstance(labels, jax.core.Tracer)]
    if len(known) < 2:
        if not all(map(_fits, known)):
            raise UserError(
                "labels beyond 32 bits cannot be numbered inside jax.jit, where others are "
                "unknown: number all of them before, by np.unique(labels, return_inverse=True)"
            )
        return pair
    if all(labels.dtype.kind in "iu" and labels.dtype in _EXACT for labels in pair):
        return pair
    values = [np.asarray(labels) for labels in pair]
    if np.result_type(*values).kind == "f" and all(x.dtype.kind in "iu" for x in values):
        values = [x.astype(object) for x in values]  # int64 and uint64 would become float64
    _, numbers = np.unique(np.concatenate(values), return_inverse=True)
    query, gallery = np.split(numbers.astype(np.int32), [len(values[0])])
    return query, gallery


_EXACT = tuple(map(np.dtype, ("int8", "uint8", "int16", "uint16", "int32")))


def _fits(labels: AnyArray) -> bool:
    """Whether every label is a 32-bit integer."""
    if labels.dtype in _EXACT or labels.dtype.kind not in "iu":
        return labels.dtype in _EXACT
    limits = np.iinfo(np.int32)
    return not labels.size or bool(limits.min <= labels.min() and labels.max() <= limits.max)


def _check(
    queries: AnyArray, gallery: AnyArray, *, k: int, chunk: int, self_index: AnyArray | None
) -> None:
    check_search(queries, gallery, k=k, chunk=chunk, self_index=self_index)
    check_concrete(queries, name="query")
    if gallery is not queries:
        check_concrete(gallery, name="gallery")


@functools.partial(jax.jit, static_argnames=("k", "chunk"))
def _nearest(
    queries: Array, gallery: Array, self_index: Array | None, *, k: int, chunk: int
) -> Neighbors:
    queries = queries.astype(jnp.float32)
    chunks = in_chunks(gallery.astype(jnp.float32), k=k, chunk=chunk)
    search = functools.partial(search_chunks, chunks=chunks, rows=gallery.shape[0], k=k)
    return in_blocks(search, (queries, own_rows(self_index, queries)), block=QUERY_BLOCK)


@functools.partial(jax.jit, static_argnames=("k", "chunk", "mesh", "axis"))
def _sharded_nearest(
    queries: Array,
    gallery: Array,
    self_index: Array | None,
    *,
    k: int,
    chunk: int,
    mesh: Mesh,
    axis: str,
) -> Neighbors:
    rows, devices = gallery.shape[0], mesh.shape[axis]
    part_rows = -(-rows // devices)

    def on_device(queries: Array, own: Array, part: Array) -> Neighbors:
        first = lax.axis_index(axis) * part_rows
        held = jnp.minimum(rows - first, part_rows)  # less, even below 0, on the last devices
        chunks = in_chunks(part.astype(jnp.float32), k=k, chunk=chunk)

        def search(queries: Array, own: Array) -> Neighbors:
            found = search_chunks(queries, own - first, chunks=chunks, rows=held, k=k)
            return _merged(found, first, axis=axis, k=k)

        return in_blocks(search, (queries.astype(jnp.float32), own), block=QUERY_BLOCK)

    split, whole = PartitionSpec(axis), PartitionSpec()
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole, check_vma=False
    )(queries, own_rows(self_index, queries), pad_rows(gallery, part_rows * devices))


@functools.partial(jax.jit, static_argnames="chunk")
def _positive_ranks(
    queries: Array,
    gallery: Array,
    query_labels: Array,
    gallery_labels: Array,
    self_index: Array | None,
    *,
    chunk: int,
) -> PositiveRanks:
    part = _make_part(gallery, gallery_labels, rows=gallery.shape[0], k=1)

    def rank(queries: Array, labels: Array, own: Array) -> PositiveRanks:
        return _rank(_similarity(queries, part), part, labels, own)

    arrays = queries, query_labels, own_rows(self_index, queries)
    return in_blocks(rank, arrays, block=_row_block(gallery.shape[0], chunk))


@functools.partial(jax.jit, static_argnames=("k", "chunk", "mesh", "axis"))
def _neighbors_and_ranks(
    queries: Array,
    gallery: Array,
    query_labels: Array,
    gallery_labels: Array,
    self_index: Array | None,
    *,
    k: int,
    chunk: int,
    mesh: Mesh,
    axis: str,
) -> tuple[Neighbors, PositiveRanks]:
    rows, devices = gallery.shape[0], mesh.shape[axis]
    part_rows = -(-rows // devices)
    highest = functools.partial(lax.pmax, axis_name=axis)
    total = functools.partial(lax.psum, axis_name=axis)

    def on_device(
        queries: Array, labels: Array, own: Array, gallery: Array, gallery_labels: Array
    ) -> tuple[Neighbors, PositiveRanks]:
        first = lax.axis_index(axis) * part_rows
        held = jnp.clip(rows - first, 0, part_rows)
        part = _make_part(gallery, gallery_labels, rows=held, k=k)

        def both(queries: Array, labels: Array, own: Array) -> tuple[Neighbors, PositiveRanks]:
            similarity = _similarity(queries, part)
            found = grouped_top_k(similarity, own, held, k=k)
            ranks = _rank(similarity, part, labels, own, highest=highest, total=total)
            return _merged(found, first, axis=axis, k=k), ranks

        block = _row_block(part_rows, chunk)
        return in_blocks(both, (queries, labels, own - first), block=block)

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


def _merged(found: Neighbors, first: Array, *, axis: str, k: int) -> Neighbors:
    """The best of all devices' lists; ``first`` is the gallery row at which a part starts."""
    found = found._replace(indices=found.indices + first)
    return best_of(lax.all_gather(found, axis, axis=1, tiled=True), k=k)


class _Part(NamedTuple):
    """A part of a gallery, and an index of its rows by label."""

    gallery: Array  # [width d], padded with zeros
    rows: Array | int  # of them that are no padding
    labels: Array  # [width] sorted, so that the rows relevant to a query lie side by side
    order: Array  # [width] the row of each sorted label


def _make_part(gallery: Array, labels: Array, *, rows: Array | int, k: int) -> _Part:
    width = round_up(max(gallery.shape[0], k), WIDTH)
    labels = pad_rows(labels, width)
    # Padding is sorted to the end; _rank tells it from an equal label by its row.
    last = jnp.iinfo(labels.dtype).max
    labels = jnp.where(jnp.arange(width) < rows, labels, last)
    order = jnp.argsort(labels)
    return _Part(pad_rows(gallery.astype(jnp.float32), width), rows, labels[order], order)


def _similarity(queries: Array, part: _Part) -> Array:
    return similarity_matrix(queries.astype(jnp.float32), part.gallery)


def _same(x: Array) -> Array:
    return x


def _rank(
    similarity: Array,
    part: _Part,
    query_labels: Array,
    own: Array,
    *,
    highest: Callable[[Array], Array] = _same,
    total: Callable[[Array], Array] = _same,
) -> PositiveRanks:
    """Ranks of a block of queries, from their similarities to a part of the gallery.

    Args:
      similarity: of the queries to the part.
      part: of the gallery.
      query_labels: of the queries.
      own: row of the part that each query is; outside the part if none.
      highest: the maximum over all parts.
      total: the sum over all parts.
    """
    rows, width = part.rows, part.order.shape[0]
    row = jnp.arange(similarity.shape[0])
    start, end = (
        jnp.searchsorted(part.labels, query_labels, side=side).astype(jnp.int32)
        for side in ("left", "right")
    )

    def fold(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, level, relevant = carry
        column = part.order.at[start + step].get(mode="clip")
        counts = (start + step < end) & (column < rows) & (column != own)
        value = jnp.where(counts, similarity[row, column], -jnp.inf)
        level = jnp.where(value > best, 1, level + (counts & (value == best)))
        return jnp.maximum(value, best), level, relevant + counts

    none = jnp.zeros_like(start)
    lowest = jnp.full(start.shape, -jnp.inf, similarity.dtype)
    most = jnp.max(end - start)
    here, tied_relevant, relevant = lax.fori_loop(0, most, fold, (lowest, none, none))
    best = highest(here)
    tied_relevant = total(jnp.where(here == best, tied_relevant, 0))
    above, level = _count_rows(similarity, best)
    # That pass also counts padding, whose similarity is 0, and the query itself.
    own = jnp.where((own >= 0) & (own < rows), own, width)
    itself = similarity.at[row, own].get(mode="fill", fill_value=-jnp.inf)
    above -= (itself > best) + jnp.where(best < 0, width - rows, 0)
    level -= (itself == best) + jnp.where(best == 0, width - rows, 0)
    return PositiveRanks(
        best, total(above), total(level) - tied_relevant, tied_relevant, total(relevant)
    )


def _count_rows(x: Array, at: Array) -> tuple[Array, Array]:
    """Counts per row of what is above a value, and equal to it; in one pass."""
    zero = jnp.int32(0)
    counts = lax.reduce(
        ((x > at[:, None]).astype(jnp.int32), (x == at[:, None]).astype(jnp.int32)),
        (zero, zero),
        lambda x, y: (x[0] + y[0], x[1] + y[1]),
        (1,),
    )
    return counts[0], counts[1]


def _row_block(rows: int, chunk: int) -> int:
    """Queries that meet ``rows`` gallery rows at once."""
    return min(QUERY_BLOCK, max(QUERY_BLOCK * chunk // rows, QUERY_BLOCK // 8))

"""Exact nearest neighbours and exact ranks by blocks of one matrix product.

Queries meet the gallery in blocks, so that the similarities held at once are bounded whatever the
sizes are: ``QUERY_BLOCK`` rows of ``chunk`` columns. Everything is exact: similarities are float32
products at full precision, equal similarities are ordered by their place in the gallery, and a
query is kept from finding itself by its index, never by its similarity.

:func:`nearest_neighbors` lists the neighbours that every metric of :mod:`mmljax.metrics` reads;
:func:`sharded_nearest_neighbors` does so with the gallery split over devices;
:func:`positive_ranks` sorts nothing, and counts what Recall@K alone needs.

>>> import jax.numpy as jnp
>>> similarity, index = nearest_neighbors(jnp.eye(2), jnp.eye(2)[::-1], k=2, chunk=2)
>>> index.tolist()
[[1, 0], [0, 1]]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mmljax.errors import UserError
from mmljax.numerics import similarity_matrix

QUERY_BLOCK = 512
"""Queries that meet the gallery at once."""

_WIDTH = 128  # chunks are multiples of it, so that backends choose one kernel, and round alike
_SMALLEST_GROUP = 8  # below it, finding the best groups costs more than it spares
_CPU_ROWS = 32  # of a query block, per call of top-k

_Result = TypeVar("_Result", bound=tuple)


class Neighbors(NamedTuple):
    """The gallery's rows most similar to each query, best first."""

    similarity: Float[Array, "q k"]
    indices: Int[Array, "q k"]


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
    _check(queries, gallery, k, chunk, self_index)
    chunks = _in_chunks(gallery, k=k, chunk=chunk)
    search = functools.partial(_search, chunks=chunks, rows=gallery.shape[0], k=k)
    return _in_blocks(search, (queries, _own(self_index, queries)), block=QUERY_BLOCK)


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
    _check(queries, gallery, k, chunk, self_index)
    rows, devices = gallery.shape[0], mesh.shape[axis]
    part_rows = -(-rows // devices)

    def on_device(queries: Array, own: Array, part: Array) -> Neighbors:
        first = lax.axis_index(axis) * part_rows
        held = jnp.minimum(rows - first, part_rows)  # less, even below 0, on the last devices
        chunks = _in_chunks(part, k=k, chunk=chunk)

        def search(queries: Array, own: Array) -> Neighbors:
            found = _search(queries, own - first, chunks=chunks, rows=held, k=k)
            found = found._replace(indices=found.indices + first)
            return _best_of(lax.all_gather(found, axis, axis=1, tiled=True), k)

        return _in_blocks(search, (queries, own), block=QUERY_BLOCK)

    split, whole = PartitionSpec(axis), PartitionSpec()
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole, check_vma=False
    )(queries, _own(self_index, queries), _pad_rows(gallery, part_rows * devices))


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
    (:func:`mmljax.metrics.tied_recall_at_k`), without any sorting. A query's similarities to the
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
    _check(queries, gallery, 1, chunk, self_index)
    own = _own(self_index, queries)
    # In the gallery ordered by label, the rows relevant to a query lie side by side.
    order = jnp.argsort(gallery_labels)
    start, end = (
        jnp.searchsorted(gallery_labels[order], query_labels, side=side).astype(jnp.int32)
        for side in ("left", "right")
    )
    most = jnp.max(end - start)
    float_gallery = gallery.astype(jnp.float32)

    def rank(queries: Array, own: Array, start: Array, end: Array) -> PositiveRanks:
        similarity = similarity_matrix(queries.astype(jnp.float32), float_gallery)
        row = jnp.arange(queries.shape[0])

        def fold(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            best, level, relevant = carry
            column = order.at[start + step].get(mode="clip")
            counts = (start + step < end) & (column != own)
            value = jnp.where(counts, similarity[row, column], -jnp.inf)
            level = jnp.where(value > best, 1, level + (counts & (value == best)))
            return jnp.maximum(value, best), level, relevant + counts

        none = jnp.zeros_like(start)
        lowest = jnp.full(start.shape, -jnp.inf, similarity.dtype)
        best, tied_relevant, relevant = lax.fori_loop(0, most, fold, (lowest, none, none))
        other = jnp.arange(gallery.shape[0]) != own[:, None]
        above, level = _count_rows(
            other & (similarity > best[:, None]), other & (similarity == best[:, None])
        )
        return PositiveRanks(best, above, level - tied_relevant, tied_relevant, relevant)

    block = min(QUERY_BLOCK, max(QUERY_BLOCK * chunk // gallery.shape[0], QUERY_BLOCK // 8))
    return _in_blocks(rank, (queries, own, start, end), block=block)


def _in_chunks(gallery: Array, *, k: int, chunk: int) -> Array:
    """The gallery, padded, as ``[chunks width d]`` in float32, all chunks of about one size."""
    count = -(-gallery.shape[0] // chunk)
    width = _round_up(max(-(-gallery.shape[0] // count), k), _WIDTH)
    return _pad_rows(gallery.astype(jnp.float32), count * width).reshape(count, width, -1)


def _search(queries: Array, own: Array, *, chunks: Array, rows: Array | int, k: int) -> Neighbors:
    """Neighbours of one block of queries among the first ``rows`` rows of the chunks.

    Where there are fewer than ``k``, the list ends in similarities of -inf.
    """
    queries = queries.astype(jnp.float32)

    def look(first: Array | int, part: Array) -> Neighbors:
        similarity = similarity_matrix(queries, part)
        found = _grouped_top_k(similarity, own - first, rows - first, k=k)
        return found._replace(indices=found.indices + first)

    def merge(best: Neighbors, item: tuple[Array, Array]) -> tuple[Neighbors, None]:
        new = look(*item)
        # What was found before has the lower indices, and goes first, as top-k prefers on ties.
        both = Neighbors(*(jnp.concatenate(pair, axis=1) for pair in zip(best, new, strict=True)))
        return _best_of(both, k), None

    firsts = jnp.arange(1, chunks.shape[0]) * chunks.shape[1]
    return lax.scan(merge, look(0, chunks[0]), (firsts, chunks[1:]))[0]


def _grouped_top_k(similarity: Array, own: Array, rows: Array | int, *, k: int) -> Neighbors:
    """Top-k of each row over the columns below ``rows`` other than ``own``.

    Of groups of columns side by side, only those with the highest maxima are looked into. That is
    exact: let x be one of the k best (by value, then by lower column), and k groups be preferred
    to its own. Each has a maximum above x, or equal to x at a lower column, as of equal maxima
    those of lower columns are preferred. So k columns come before x: a contradiction.

    To hide columns before the maxima would slow the one pass over all similarities. They are hidden
    afterwards, so two maxima may be hidden columns' (of the group of ``own``, and of the group that
    ``rows`` cuts in two), and two groups more are chosen.
    """
    group = _group_size(similarity.shape[1], k)
    if group == 1:
        column = jnp.arange(similarity.shape[1])
        hidden = (column >= rows) | (column == own[:, None])
        return Neighbors(*_top_k(jnp.where(hidden, -jnp.inf, similarity), k))
    grouped = similarity.reshape(similarity.shape[0], -1, group)
    starts = jnp.arange(grouped.shape[1]) * group
    # Not jnp.max, which XLA's CPU hands to a library that is slower on rows so short.
    peak = lax.reduce(grouped, -jnp.inf, lambda a, b: jnp.where(a > b, a, b), (2,))
    peak, chosen = _top_k(jnp.where(starts < rows, peak, -jnp.inf), k + 2)
    chosen = jnp.sort(chosen, axis=1)
    column = (chosen[:, :, None] * group + jnp.arange(group)).reshape(chosen.shape[0], -1)
    value = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1, mode="promise_in_bounds")
    value = value.reshape(column.shape)
    # Nothing below the lowest chosen peak is among the best; hiding it makes the top-k cheaper.
    hidden = (column >= rows) | (column == own[:, None]) | (value < peak[:, -1:])
    return _best_of(Neighbors(jnp.where(hidden, -jnp.inf, value), column), k)


def _best_of(found: Neighbors, k: int) -> Neighbors:
    """The k best of lists side by side, those of lower gallery indices first."""
    value, place = _top_k(found.similarity, k)
    return Neighbors(
        value, jnp.take_along_axis(found.indices, place, axis=1, mode="promise_in_bounds")
    )


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """``lax.top_k``; on CPU by slices, as XLA gives each call one thread but runs several."""

    def sliced(x: Array) -> tuple[Array, ...]:
        parts = [lax.top_k(part, k) for part in jnp.split(x, max(1, x.shape[0] // _CPU_ROWS))]
        return tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))

    return lax.platform_dependent(x, cpu=sliced, default=lambda x: tuple(lax.top_k(x, k)))


def _count_rows(a: Array, b: Array) -> tuple[Array, Array]:
    """Counts of True per row of two masks, in one pass over what they are computed from."""
    zero = jnp.int32(0)
    counts = lax.reduce(
        (a.astype(jnp.int32), b.astype(jnp.int32)),
        (zero, zero),
        lambda x, y: (x[0] + y[0], x[1] + y[1]),
        (1,),
    )
    return counts[0], counts[1]


def _in_blocks(
    function: Callable[..., _Result], arrays: tuple[Array, ...], *, block: int
) -> _Result:
    """``function`` over blocks of the arrays' rows, one after the other; the results joined."""
    rows = arrays[0].shape[0]
    blocks = -(-rows // block)
    block = _round_up(-(-rows // blocks), _CPU_ROWS)
    split = [_pad_rows(x, blocks * block).reshape(blocks, block, *x.shape[1:]) for x in arrays]
    results = lax.map(lambda items: function(*items), tuple(split))
    return jax.tree.map(lambda x: x.reshape(blocks * block, *x.shape[2:])[:rows], results)


def _group_size(width: int, k: int) -> int:
    """Columns per group: a power of two that makes about as many groups as candidates."""
    group = min(2 ** round(math.log2(math.sqrt(width / k))), _WIDTH)
    return group if group >= _SMALLEST_GROUP and width // group >= k + 2 else 1


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _own(self_index: Array | None, queries: Array) -> Array:
    """Each query's own gallery row, -1 for none."""
    if self_index is None:
        return jnp.full(queries.shape[0], -1, jnp.int32)
    return self_index.astype(jnp.int32)


def _pad_rows(x: Array, rows: int) -> Array:
    return jnp.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def _check(queries: Array, gallery: Array, k: int, chunk: int, self_index: Array | None) -> None:
    others = gallery.shape[0] - (self_index is not None)
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries and gallery differ in embedding size: {queries.shape[1]} and "
            f"{gallery.shape[1]}; embed both with the same network"
        )
    if k < 1 or chunk < 1:
        raise UserError(f"k and chunk must be at least 1, found k={k} and chunk={chunk}")
    if k > others:
        excluded = " besides each query itself" if self_index is not None else ""
        raise UserError(
            f"k={k} neighbours asked of a gallery of {others} rows{excluded}; lower k "
            "(--config.evaluation.recall_at) or add to the gallery"
        )

"""Exact top-k of a block of similarities, and merging of lists: the parts of every search.

:mod:`mmljax.retrieval.search` combines them. Equal similarities are always ordered by their place
in the gallery, lower first, and a query is excluded from its own search by its index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mmljax.numerics import similarity_matrix

WIDTH = 128
"""Chunk widths are multiples of it, so that backends use one kernel and round alike."""

CPU_ROWS = 32
"""Rows of a query block per call of top-k on CPU; query blocks are multiples of it."""

TOGETHER = 8
"""Queries that share a product with their candidates: fewer would be rounded in another way."""

_SMALLEST_GROUP = 8  # below it, finding the best groups costs more than it spares

_Result = TypeVar("_Result", bound=tuple)


class Neighbors(NamedTuple):
    """The gallery's rows most similar to each query, best first."""

    similarity: Float[Array, "q k"]
    indices: Int[Array, "q k"]


class Chunks(NamedTuple):
    """A gallery in parts, without a copy of it."""

    gallery: Float[Array, "g d"]
    width: int  # rows of a part
    whole: int  # parts of that width
    tail: Float[Array, "t d"] | None  # the rows after them, padded


def in_chunks(gallery: Array, *, k: int, chunk: int) -> Chunks:
    """Split a gallery into about equal parts of at most ``chunk`` rows, or ``k`` if larger."""
    rows = gallery.shape[0]
    width = round_up(max(-(-rows // -(-rows // chunk)), k), WIDTH)
    whole = rows // width
    left = rows - whole * width
    tail = pad_rows(gallery[whole * width :], round_up(max(left, k), WIDTH)) if left else None
    return Chunks(gallery, width, whole, tail)


def search_chunks(
    queries: Array,
    own: Array,
    *,
    chunks: Chunks,
    rows: Array | int,
    k: int,
) -> Neighbors:
    """Neighbours of one block of queries among the first ``rows`` rows of the chunks.

    With fewer than ``k`` rows, the list ends in similarities of -inf.
    """
    search = functools.partial(search_chunk, queries, own, rows=rows, k=k)

    def step(best: Neighbors, first: Array) -> tuple[Neighbors, None]:
        part = lax.dynamic_slice_in_dim(chunks.gallery, first, chunks.width)
        return merge(best, search(part, first=first, above=best.similarity[:, -1]), k=k), None

    if not chunks.whole and chunks.tail is not None:
        return search(chunks.tail, first=0)
    start = Neighbors(
        jnp.full((queries.shape[0], k), -jnp.inf, jnp.float32),
        jnp.zeros((queries.shape[0], k), jnp.int32),
    )
    best, _ = lax.scan(step, start, jnp.arange(chunks.whole) * chunks.width)
    if chunks.tail is None:
        return best
    first, above = chunks.whole * chunks.width, best.similarity[:, -1]
    return merge(best, search(chunks.tail, first=first, above=above), k=k)


def search_chunk(
    queries: Array,
    own: Array,
    part: Array,
    *,
    first: Array | int,
    rows: Array | int,
    k: int,
    above: Array | None = None,
) -> Neighbors:
    """Neighbours in the chunk that starts at gallery row ``first``, of rows below ``rows``.

    With ``above``, a similarity per query, only those of higher similarity count.
    """
    similarity = similarity_matrix(queries, part)
    found = grouped_top_k(similarity, own - first, rows - first, k=k, above=above)
    return found._replace(indices=found.indices + first)


def merge(best: Neighbors, new: Neighbors, *, k: int) -> Neighbors:
    """The k best of a list and one of later gallery rows."""
    # Earlier neighbours have the lower indices and come first: top-k prefers the first on ties.
    both = Neighbors(*(jnp.concatenate(pair, axis=1) for pair in zip(best, new, strict=True)))
    return best_of(both, k=k)


def best_of(found: Neighbors, *, k: int) -> Neighbors:
    """The k best of lists side by side, those of lower gallery indices first."""
    value, place = _top_k(found.similarity, k)
    return Neighbors(
        value, jnp.take_along_axis(found.indices, place, axis=1, mode="promise_in_bounds")
    )


def best_candidates(
    queries: Float[Array, "t d"],
    rows: Float[Array, "r d"],
    candidates: Int[Array, "t m"],
    *,
    k: int,
) -> Neighbors:
    """The k best of each query's own candidates, of ``TOGETHER`` queries.

    One product with the candidates of all of them rounds as a product with the whole gallery does.

    Args:
      queries: the queries.
      rows: of the gallery, those of all candidates in turn; more may follow.
      candidates: their indices, rising along each row, so that the lower index comes first on ties.
      k: neighbours per query.
    """
    count, each = candidates.shape
    similarity = similarity_matrix(queries, rows)[:, : count * each].reshape(count, count, each)
    query = jnp.arange(count)
    return best_of(Neighbors(similarity[query, query], candidates), k=k)


def grouped_top_k(
    similarity: Array, own: Array, rows: Array | int, *, k: int, above: Array | None = None
) -> Neighbors:
    """Top-k of each row over the columns below ``rows`` other than ``own``.

    With ``above``, columns at or below it do not count; what is not found is -inf. The fewer
    columns count, the cheaper the top-k.

    Of groups of adjacent columns, only those with the highest maxima are searched. That is exact:
    let x be one of the k best (by value, then by lower column), and let k groups be preferred to
    its own. Each has a maximum above x, or equal to x at a lower column, because of equal maxima
    those of lower columns are preferred. So k columns come before x: a contradiction.

    Hiding columns before the maxima would slow the one pass over all similarities. They are hidden
    afterwards, so two maxima may belong to hidden columns (in the group of ``own``, and in the
    group that ``rows`` cuts in two), and two more groups are chosen.
    """
    least = jnp.full(similarity.shape[0], -jnp.inf) if above is None else above
    group = _group_size(similarity.shape[1], k)
    if group == 1:
        column = jnp.arange(similarity.shape[1])
        hidden = (column >= rows) | (column == own[:, None]) | (similarity <= least[:, None])
        return Neighbors(*_top_k(jnp.where(hidden, -jnp.inf, similarity), k))
    grouped = similarity.reshape(similarity.shape[0], -1, group)
    starts = jnp.arange(grouped.shape[1]) * group
    # Not jnp.max: XLA's CPU calls a library for it that is slower on such short rows.
    peak = lax.reduce(
        grouped, jnp.array(-jnp.inf, grouped.dtype), lambda a, b: jnp.where(a > b, a, b), (2,)
    )
    counts = (starts < rows) & (peak > least[:, None])
    peak, chosen = _top_k(jnp.where(counts, peak, -jnp.inf), k + 2)
    chosen = jnp.sort(chosen, axis=1)
    column = (chosen[:, :, None] * group + jnp.arange(group)).reshape(chosen.shape[0], -1)
    value = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1, mode="promise_in_bounds")
    value = value.reshape(column.shape)
    # Nothing below the lowest chosen peak is among the best; hiding it makes the top-k cheaper.
    hidden = (column >= rows) | (column == own[:, None]) | (value < peak[:, -1:])
    hidden |= value <= least[:, None]
    return best_of(Neighbors(jnp.where(hidden, -jnp.inf, value), column), k=k)


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """``lax.top_k``; on CPU by slices, because XLA gives each call one thread but runs several."""

    def sliced(x: Array) -> tuple[Array, ...]:
        parts = [lax.top_k(part, k) for part in jnp.split(x, max(1, x.shape[0] // CPU_ROWS))]
        return tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))

    return lax.platform_dependent(x, cpu=sliced, default=lambda x: tuple(lax.top_k(x, k)))


def in_blocks(
    function: Callable[..., _Result], arrays: tuple[Array, ...], *, block: int
) -> _Result:
    """Apply ``function`` to blocks of the arrays' rows in turn, and join the results."""
    rows = arrays[0].shape[0]
    blocks, block = block_rows(rows, block)
    split = [pad_rows(x, blocks * block).reshape(blocks, block, *x.shape[1:]) for x in arrays]
    results = lax.map(lambda items: function(*items), tuple(split))
    return jax.tree.map(lambda x: x.reshape(blocks * block, *x.shape[2:])[:rows], results)


def block_rows(rows: int, block: int) -> tuple[int, int]:
    """Number of blocks of at most about ``block`` rows, and the rows of each."""
    blocks = -(-rows // block)
    return blocks, round_up(-(-rows // blocks), CPU_ROWS)


def own_rows(self_index: Array | None, queries: Array) -> Array:
    """Each query's own gallery row, -1 for none."""
    if self_index is None:
        return jnp.full(queries.shape[0], -1, jnp.int32)
    return jnp.asarray(self_index).astype(jnp.int32)


def pad_rows(x: Array, rows: int) -> Array:
    """``x`` with zeros below, up to that many rows."""
    return jnp.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least ``x``."""
    return -(-x // multiple) * multiple


def _group_size(width: int, k: int) -> int:
    """Columns per group: a power of two that makes about as many groups as candidates."""
    group = min(2 ** round(math.log2(math.sqrt(width / k))), WIDTH)
    return group if group >= _SMALLEST_GROUP and width // group >= k + 2 else 1

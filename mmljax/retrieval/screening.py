"""Exact neighbours from bfloat16 products: a rough search, and a proof that it missed nothing.

Accelerators multiply bfloat16 many times faster than float32, but rank a gallery by it wrongly.
Here bfloat16 only chooses candidates, float32 ranks them, and a bound on the error of bfloat16
tells of which queries the list is thereby *proven* to be what float32 alone would find. Blocks of
queries with one that is not are searched again without bfloat16, so the results are exact always.

>>> import jax.numpy as jnp
>>> found = screened_nearest_neighbors(jnp.eye(2), jnp.eye(2)[::-1], k=1, chunk=2)
>>> found.indices.tolist(), found.proven.tolist()
([[1], [0]], [True, True])
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mmljax.numerics import similarity_matrix
from mmljax.retrieval.search import QUERY_BLOCK
from mmljax.retrieval.top_k import (
    CPU_ROWS,
    Neighbors,
    best_of,
    check_search,
    in_blocks,
    in_chunks,
    own_rows,
    round_up,
    search_chunks,
)

_UNIT = 2.0**-22  # of rounding per term of a sum: float32's is 2**-24, truncating hardware's 2**-23
_SLACK = 1.01  # for the rounding of the bound itself


class Screened(NamedTuple):
    """As :class:`mmljax.retrieval.top_k.Neighbors`, with how the list was come by."""

    similarity: Float[Array, "q k"]
    indices: Int[Array, "q k"]
    proven: Bool[Array, " q"]  # False: bfloat16 left a doubt, and this block was searched without


@functools.partial(jax.jit, static_argnames=("k", "chunk", "candidates"))
def screened_nearest_neighbors(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"],
    *,
    k: int,
    chunk: int,
    candidates: int | None = None,
    self_index: Int[Array, " q"] | None = None,
) -> Screened:
    """:func:`mmljax.retrieval.search.nearest_neighbors` by bfloat16 products, with the same results.

    Worth its while where bfloat16 products are faster and the gallery is large; not on CPU.

    Why the results are the same. Let x be a query and g a gallery row, in float32; x', g' their
    roundings to bfloat16; s the float32 similarity that ``nearest_neighbors`` computes, and r the
    rough one, of x' and g' with float32 sums. Products of two bfloat16 numbers are exact in
    float32, so in r only sums round. With u the rounding of one term of a sum, c = d u / (1 - d u)
    and whatever order of the d terms, |r - x'.g'| <= c |x'| |g'| and
    |s - x.g| <= c |x| |g|. By Cauchy-Schwarz,
    |x.g - x'.g'| <= |x - x'| |g| + |x'| |g - g'|. With the largest |g|, |g'| and
    |g - g'| of the gallery, the three add up to a number e per query, computed from the
    roundings themselves, and |s - r| <= e for every row.

    The rough search gives the m candidates of highest r, the lowest of which is t. A row that is
    no candidate has r <= t, so s <= t + e. If the k-th best s among the candidates is above t + e,
    all others are strictly below it: the k best candidates are the k best of the gallery, and
    whatever ties at the k-th place is a candidate too. The query is then *proven*. Where the proof
    fails (ties beyond the candidates, more than m rows within 2 e of the k-th) its block is
    searched by ``nearest_neighbors``'s own steps.

    The s of the candidates come from products of other shapes than there. They are equal in every
    bit on a backend that rounds an inner product alike in all blocks whose widths are multiples of
    128 (XLA's CPU does); elsewhere the last bit may differ, as it may between two chunk sizes.

    Args:
      queries: finite embeddings, whose squares neither overflow nor vanish in float32.
      gallery: embeddings to search.
      k: neighbours per query.
      chunk: as in ``nearest_neighbors``.
      candidates: m per query, rounded up to a multiple of 4; twice ``k`` and at least 64 more than
        ``k`` by default. The more, the rarer the doubt and the dearer the ranking.
      self_index: each query's own row of the gallery, which it shall not find.

    Raises:
      UserError: as ``nearest_neighbors``.
    """
    check_search(queries, gallery, k, chunk, self_index)
    most = round_up(max(k + 1, candidates or max(2 * k, k + 64)), 4)
    rows, gallery = gallery.shape[0], gallery.astype(jnp.float32)
    queries = queries.astype(jnp.float32)
    rounded = _to_bfloat16(gallery)
    rough_chunks = in_chunks(rounded.astype(jnp.bfloat16), k=most, chunk=chunk)
    chunks = in_chunks(gallery, k=k, chunk=chunk)
    norms = [jnp.max(jnp.linalg.norm(x, axis=1)) for x in (gallery, rounded, gallery - rounded)]

    def search(queries: Array, own: Array, real: Array) -> Screened:
        rough_queries = _to_bfloat16(queries)
        rough = search_chunks(
            rough_queries.astype(jnp.bfloat16),
            own,
            chunks=rough_chunks,
            rows=rows,
            k=most,
            score=_bfloat16_products,
        )
        found = _rank(queries, rough, gallery, k=k)
        limit = rough.similarity[:, -1] + _error(queries, rough_queries, *norms)
        proven = found.similarity[:, -1] > limit  # also False where a bound is not finite
        found = lax.cond(
            jnp.all(proven | ~real),
            lambda: found,
            lambda: search_chunks(queries, own, chunks=chunks, rows=rows, k=k),
        )
        return Screened(found.similarity, found.indices, proven)

    real = jnp.ones(queries.shape[0], bool)
    return in_blocks(search, (queries, own_rows(self_index, queries), real), block=QUERY_BLOCK)


def _to_bfloat16(x: Array) -> Array:
    """Rounded to bfloat16, in float32. A cast there and back may be left out by the compiler."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _bfloat16_products(rows: Array, columns: Array) -> Array:
    return lax.dot_general(
        rows, columns, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _error(queries: Array, rounded: Array, largest: Array, rough: Array, off: Array) -> Array:
    """e per query, from the gallery's largest norm, that of its rounding and of the difference."""
    size, rough_size, query_off = (
        jnp.linalg.norm(x, axis=1) for x in (queries, rounded, queries - rounded)
    )
    sums = queries.shape[1] * _UNIT
    sums = sums / (1 - sums)
    rounding = query_off * largest + rough_size * off
    return _SLACK * (rounding + sums * (size * largest + rough_size * rough))


def _rank(queries: Array, rough: Neighbors, gallery: Array, *, k: int) -> Neighbors:
    """The k best candidates by float32 similarity, equal ones by gallery index."""
    # Hidden rows (the query itself, padding) are candidates where there are no others.
    hidden = rough.similarity == -jnp.inf
    index = jnp.sort(jnp.where(hidden, gallery.shape[0], rough.indices), axis=1)

    def few(queries: Array, index: Array) -> Array:
        """Products of a few queries with the candidates of all of them; each keeps its own."""
        columns = gallery.at[index.ravel()].get(mode="fill", fill_value=0)
        similarity = similarity_matrix(queries, columns).reshape(len(queries), *index.shape)
        return jnp.einsum("qqm->qm", similarity)

    parts = queries.shape[0] // CPU_ROWS
    similarity = lax.map(
        lambda items: few(*items), (_split(queries, parts), _split(index, parts))
    ).reshape(index.shape)
    similarity = jnp.where(index < gallery.shape[0], similarity, -jnp.inf)
    return best_of(Neighbors(similarity, index), k=k)


def _split(x: Array, parts: int) -> Array:
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

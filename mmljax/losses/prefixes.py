"""Matryoshka training: every objective on prefixes of the embeddings, each of unit length.

Kusupati et al. 2022, arXiv 2205.13147, equation 1: the loss of a batch is the sum over the sizes
``m`` of ``c_m`` times the loss of the first ``m`` dimensions. Here the prefixes of embeddings and
proxies are normalised before each objective, as a search with fewer dimensions normalises them.

The similarities of all sizes cost one product of the whole embeddings: the unnormalised product of
a prefix is that of the next shorter one plus the product of the dimensions between them, and is
divided by the lengths of the prefixes. The way back shares the products in the same manner.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from mmljax.errors import UserError
from mmljax.numerics import inverse_lengths, similarity_matrix
from mmljax.types import Points

_KEY = "--config.model.matryoshka"


class Prefixes(NamedTuple):
    """The sizes on which objectives are computed, and the weights of their losses."""

    sizes: tuple[int, ...]  # ascending; the last is the embedding size
    weights: tuple[float, ...]


def make_prefixes(
    sizes: Sequence[int], weights: Sequence[float] = (), *, dimension: int
) -> Prefixes:
    """The prefixes that a config asks for; the whole embedding alone if it names none.

    >>> make_prefixes((2, 8), dimension=8)
    Prefixes(sizes=(2, 8), weights=(1.0, 1.0))

    Args:
      sizes: of the prefixes.
      weights: of their losses; 1 each if empty.
      dimension: embedding size.

    Raises:
      UserError: if the sizes do not rise to the embedding size, or weights do not fit them.
    """
    found = tuple(sizes) or (dimension,)
    rises = all(0 < a < b for a, b in itertools.pairwise((*found, dimension + 1)))
    if not rises or found[-1] != dimension:
        raise UserError(
            f"{_KEY}={tuple(sizes)} must rise to --config.model.embedding_size={dimension}, its "
            f"last size; for example ({max(dimension // 2, 1)}, {dimension})"
        )
    if weights and (len(weights) != len(sizes) or not sum(weights) > 0):
        raise UserError(
            f"{_KEY}_weights={tuple(weights)} must hold a weight for each size of "
            f"{_KEY}={tuple(sizes)}, not all of them 0; leave it empty for 1 each"
        )
    return Prefixes(found, tuple(map(float, weights)) or (1.0,) * len(found))


def unit_prefix(vectors: Float[Array, "*n d"], size: int) -> Float[Array, "*n m"]:
    """The first ``size`` dimensions at unit length; unit vectors of that size as they are."""
    if size == vectors.shape[-1]:
        return vectors
    cut = vectors[..., :size]
    return cut * inverse_lengths(cut)


def prefix_blocks(
    rows: Points, columns: Points, sizes: Sequence[int]
) -> Iterator[tuple[Points, Points, Float[Array, "n m"]]]:
    """The points at each size, their vectors of unit length, with the block of similarities.

    Args:
      rows: ``n`` points.
      columns: ``m`` points.
      sizes: ascending.
    """
    product, start = None, 0
    for size in sizes:
        parts = (points.vectors[:, start:size] for points in (rows, columns))
        further, start = similarity_matrix(*parts), size
        product = further if product is None else product + further
        similarity = product
        if size < rows.vectors.shape[1]:
            scales = (inverse_lengths(points.vectors[:, :size]) for points in (rows, columns))
            row_scale, column_scale = scales
            similarity = product * row_scale * column_scale.T
        own, others = (p._replace(vectors=unit_prefix(p.vectors, size)) for p in (rows, columns))
        yield own, others, similarity

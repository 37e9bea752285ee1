"""k-reciprocal re-ranking of neighbours, in memory that is linear in the number of embeddings.

Zhong, Zheng, Cao, Li (2017), Re-ranking Person Re-identification with k-reciprocal Encoding,
arXiv 1701.08398, section 3. Two images are alike if they have the same neighbours. With queries
and gallery as one set of images, of similarity s and distance ``d = 1 - s``:

1. ``N(u, k)`` is u itself and its k nearest others; ``R(u, k)`` holds each v of ``N(u, k)`` with u
   in ``N(v, k)``: the k-reciprocal neighbours (3.2).
2. ``R*(u)`` is ``R(u, k1)``, joined by ``R(v, k1 / 2)`` of each v in it for which at least two
   thirds of that set are in ``R(u, k1)`` (3.2).
3. The encoding of u is a vector over all images: ``exp(-d(u, v))`` for v in ``R*(u)``, else 0,
   scaled to sum 1 (3.3), then averaged over ``N(u, k2 - 1)`` (3.4).
4. Gallery images are ordered by ``(1 - w) J + w s`` with the Jaccard similarity J of two encodings,
   the sum of their minima over the sum of their maxima (3.3), and the weight w of the original
   similarity, the paper's lambda (3.5).

What differs: only the best ``candidates`` of a query are ordered anew, in the paper the whole
gallery; the others keep their order behind them. As in the authors' program, u belongs to its own
sets and encodings have sum 1; their program also divides distances by the largest one and asks for
*more* than two thirds.

Encodings are sparse (compressed rows in NumPy, on the host) and queries come in blocks, so no
matrix of all pairs is ever held.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mmljax.errors import UserError
from mmljax.mesh import make_mesh, to_host
from mmljax.retrieval.checks import AnyArray
from mmljax.retrieval.search import CHUNK, sharded_nearest_neighbors
from mmljax.retrieval.top_k import Neighbors

_ROWS = 256  # whose sets are expanded at once
_COMPARED = 2**22  # pairs of members that are compared at once
_QUERIES = 4096  # whose candidates are held at once


class Encodings(NamedTuple):
    """One sparse vector per image in compressed rows: non-negative, of sum 1; NumPy."""

    starts: Int[np.ndarray, " n1"]  # [n + 1] where each row's entries start
    columns: Int[np.ndarray, " e"]  # the images that the entries are about, rising in a row
    weights: Float[np.ndarray, " e"]


def k_reciprocal_neighbors(
    queries: Float[AnyArray, "q d"],
    gallery: Float[AnyArray, "g d"],
    *,
    k: int,
    candidates: int,
    k1: int = 20,
    k2: int = 6,
    original_weight: float = 0.3,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
    self_index: Int[AnyArray, " q"] | None = None,
) -> Neighbors:
    """The ``k`` best of each query's ``candidates`` nearest gallery rows, re-ranked.

    Args:
      queries: embeddings of unit length.
      gallery: the same.
      k: neighbours per query, at most ``candidates``.
      candidates: gallery rows per query that are ordered anew.
      k1: neighbours in which reciprocal ones are looked for.
      k2: images whose encodings are averaged, the image itself among them; 1 for no average.
      original_weight: of the original similarity in the order, from 0 to 1; the paper's lambda.
      chunk: bounds the similarities held at once, as in
        :func:`mmljax.retrieval.search.nearest_neighbors`.
      mesh: the devices that share the searches; all by default.
      self_index: each query's own row of the gallery, which is excluded from its search. The
        queries are then not counted twice: the set of all images is the gallery.

    Returns:
      On the host, ``(1 - w) J + w s`` in falling order and gallery indices, ``[q k]`` each; equal
      values by rising index.

    Raises:
      UserError: ``k`` exceeds the candidates, these or ``k1`` or ``k2`` exceed the images, or as
        :func:`mmljax.retrieval.search.nearest_neighbors`.
    """
    if k > candidates:
        raise UserError(f"k={k} neighbours asked of {candidates} candidates; lower k")
    mesh = make_mesh() if mesh is None else mesh
    images: Any = gallery
    asked: Any = queries
    if self_index is None:
        images = jnp.concatenate([jnp.asarray(queries), jnp.asarray(gallery)])
        nodes, first = np.arange(len(queries)), len(queries)
    else:
        nodes, first = np.asarray(self_index), 0
    encodings = k_reciprocal_encodings(images, k1=k1, k2=k2, chunk=chunk, mesh=mesh)
    scratch = np.zeros(len(images), np.float32)
    vectors, blocks = to_host(asked), []
    for start in range(0, len(vectors), _QUERIES):
        block = slice(start, start + _QUERIES)
        found = sharded_nearest_neighbors(
            vectors[block],
            gallery,
            k=candidates,
            chunk=chunk,
            mesh=mesh,
            self_index=None if self_index is None else nodes[block].astype(np.int32),
        )
        similarity, indices = (to_host(x) for x in found)
        jaccard = np.stack(
            [
                _jaccard(encodings, node, first + row, scratch)
                for node, row in zip(nodes[block], indices, strict=True)
            ]
        )
        combined = np.float32(1 - original_weight) * jaccard + original_weight * similarity
        order = np.lexsort((indices, -combined), axis=1)[:, :k]
        blocks.append([np.take_along_axis(x, order, axis=1) for x in (combined, indices)])
    joined: Any = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
    return Neighbors(*joined)


def k_reciprocal_encodings(images: Any, *, k1: int, k2: int, chunk: int, mesh: Mesh) -> Encodings:
    """The encodings of step 3 of images ``[n d]``; arguments as in :func:`k_reciprocal_neighbors`.

    Raises:
      UserError: ``k1`` or ``k2`` is below 1 or exceeds the images, or one is not finite.
    """
    count, depth = len(images), max(k1, k2 - 1)
    if min(k1, k2) < 1 or depth >= count:
        raise UserError(
            f"k1={k1} and k2={k2} must be at least 1, k1 below and k2 at most the {count} images"
        )
    own = np.arange(count, dtype=np.int32)
    found = sharded_nearest_neighbors(
        images, images, k=depth, chunk=chunk, mesh=mesh, self_index=own
    )
    near = np.concatenate([own[:, None], to_host(found.indices)], axis=1)
    encodings = _encode(to_host(images), near[:, : k1 + 1])
    return encodings if k2 == 1 else _averaged(encodings, near[:, :k2])


def _encode(vectors: np.ndarray, near: np.ndarray) -> Encodings:
    """The encodings before they are averaged."""
    count, width = near.shape
    reach = _reach(near)
    half = width // 2  # k1 / 2, rounded up
    halves = np.where(reach[:, : half + 1] <= half, near[:, : half + 1], -2)
    step = max(1, min(_ROWS, _COMPARED // (width * (half + 1) * width)))
    sizes, columns, weights = [], [], []
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count))
        own = np.where(reach[rows] < width, near[rows], -1)
        row, column = _members(own, halves[near[rows]])
        similarity = np.einsum("nd,nd->n", vectors[start + row], vectors[column])
        weight = np.exp(similarity.astype(np.float64) - 1)
        weights.append((weight / np.bincount(row, weight)[row]).astype(np.float32))
        sizes.append(np.bincount(row))
        columns.append(column)
    return _compressed(sizes, columns, weights)


def _reach(near: Int[np.ndarray, "n m"]) -> Int[np.ndarray, "n m"]:
    """The least k with which an image and each of its neighbours are reciprocal; m for none."""
    count, width = near.shape
    reach = np.empty(near.shape, np.int32)
    for start in range(0, count, _ROWS):
        block = slice(start, start + _ROWS)
        same = near[near[block]] == near[block, :1, None]
        back = np.where(same.any(axis=2), same.argmax(axis=2), width)
        reach[block] = np.maximum(back, np.arange(width))
    return reach


def _members(
    own: Int[np.ndarray, "b m"], halves: Int[np.ndarray, "b m h"]
) -> tuple[np.ndarray, np.ndarray]:
    """Row and image of each member of the expanded sets of some rows, by rising row and image.

    Args:
      own: the set of each row; -1 for no member.
      halves: the smaller sets of what is near each row; -2 for no member.
    """
    shared = (halves[:, :, :, None] == own[:, None, None, :]).any(axis=3).sum(axis=2)
    joins = (own >= 0) & (3 * shared >= 2 * (halves >= 0).sum(axis=2))
    more = np.where(joins[:, :, None], halves, -2).reshape(len(own), -1)
    members = np.sort(np.concatenate([own, more], axis=1), axis=1)
    new = members >= 0
    new[:, 1:] &= members[:, 1:] != members[:, :-1]
    return np.nonzero(new)[0], members[new]


def _averaged(encodings: Encodings, near: Int[np.ndarray, "n k2"]) -> Encodings:
    """Each row's mean with those of the other images near it."""
    count, width = near.shape
    sizes, columns, weights = [], [], []
    for start in range(0, count, _ROWS):
        block = near[start : start + _ROWS]
        entries, lengths = _entries(encodings, block.ravel())
        row = np.repeat(np.arange(len(block)), lengths.reshape(-1, width).sum(axis=1))
        keys, place = np.unique(row * count + encodings.columns[entries], return_inverse=True)
        weights.append((np.bincount(place, encodings.weights[entries]) / width).astype(np.float32))
        sizes.append(np.bincount(keys // count))
        columns.append((keys % count).astype(np.int32))
    return _compressed(sizes, columns, weights)


def _compressed(
    sizes: list[np.ndarray], columns: list[np.ndarray], weights: list[np.ndarray]
) -> Encodings:
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Encodings(starts, np.concatenate(columns), np.concatenate(weights))


def _entries(
    encodings: Encodings, rows: Int[np.ndarray, " r"]
) -> tuple[Int[np.ndarray, " e"], Int[np.ndarray, " r"]]:
    """Where the entries of some rows are, row after row, and how many each row has."""
    starts = encodings.starts[rows]
    lengths = encodings.starts[rows + 1] - starts
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths), lengths


def _jaccard(
    encodings: Encodings, one: int, others: Int[np.ndarray, " m"], scratch: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """Jaccard similarity of one image to others; ``scratch`` is zeros, and is zeros afterwards."""
    own = slice(encodings.starts[one], encodings.starts[one + 1])
    scratch[encodings.columns[own]] = encodings.weights[own]
    entries, lengths = _entries(encodings, others)
    common = np.minimum(scratch[encodings.columns[entries]], encodings.weights[entries])
    scratch[encodings.columns[own]] = 0
    least = np.add.reduceat(common, np.cumsum(lengths) - lengths)  # no row is empty
    return least / (2 - least)  # as each sum is 1, that of the maxima is 2 less that of the minima

"""Exact similarities of candidates that a search of small vectors found, and a proof per query."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mmljax.retrieval.checks import UNIT_LENGTH, check_embeddings
from mmljax.retrieval.quantization import Codes
from mmljax.retrieval.search import CHUNK
from mmljax.retrieval.streaming import release_pages, streamed_nearest_neighbors
from mmljax.retrieval.top_k import TOGETHER, WIDTH, Neighbors, best_candidates, pad_rows, round_up

_ROWS_AT_ONCE = 128  # read from a mapped file between two releases of its pages


def rescored_nearest_neighbors(
    queries: Float[np.ndarray, "q d"],
    codes: Codes,
    gallery: Float[np.ndarray, "g d"],
    *,
    k: int,
    candidates: int,
    chunk: int = CHUNK,
    self_index: Int[np.ndarray, " q"] | None = None,
) -> tuple[Neighbors, Bool[np.ndarray, " q"]]:
    """The ``k`` best of each query's ``candidates`` best codes, by float32 similarity.

    Similarities and their order equal those of the float32 search in every bit, on a backend that
    rounds an inner product alike in all blocks whose widths are multiples of 128 (XLA's CPU does).

    Args:
      queries: embeddings of unit length.
      codes: of the gallery (:func:`mmljax.retrieval.quantization.quantize`).
      gallery: the float32 embeddings, of unit length; mapped from a file, only the candidates' rows
        are read.
      k: neighbours per query.
      candidates: rows that are scored again, at least ``k`` and at most those of the gallery.
        Eight times as many rows are held at once.
      chunk: codes on the device at once.
      self_index: each query's own row of the gallery, which is excluded from its search.

    Returns:
      Neighbours as :func:`mmljax.retrieval.search.nearest_neighbors` returns them; and for which
      queries it is proved that the float32 search finds the same (:func:`proved`).
    """
    on_device = jnp.asarray(queries)
    own = None if self_index is None else jnp.asarray(self_index)
    found = streamed_nearest_neighbors(
        on_device, codes, k=candidates, chunk=chunk, self_index=own, unit=True
    )
    best = rescore(queries, gallery, found, k=k)
    if candidates == len(gallery) - (own is not None):
        return best, np.ones(len(queries), bool)
    return best, proved(queries, found, best, error=float(codes.error.max()))


def rescore(
    queries: Float[np.ndarray, "q d"],
    gallery: Float[np.ndarray, "g d"],
    found: Neighbors,
    *,
    k: int,
) -> Neighbors:
    """The ``k`` best of the rows that were found, by float32 inner product; on the host.

    Equal similarities are ordered by their place in the gallery.
    """
    candidates = np.sort(np.asarray(found.indices), axis=1)  # top-k prefers the first on ties
    blocks = []
    for first in range(0, len(queries), TOGETHER):
        place = slice(first, first + TOGETHER)
        rows = _read_rows(gallery, candidates[place].ravel())
        check_embeddings(rows, name="candidates'", unit=True)
        block = _best_candidates(
            pad_rows(jnp.asarray(queries[place], jnp.float32), TOGETHER),
            pad_rows(jnp.asarray(rows), round_up(TOGETHER * candidates.shape[1], WIDTH)),
            pad_rows(jnp.asarray(candidates[place]), TOGETHER),
            k=k,
        )
        blocks.append([x[: len(candidates[place])] for x in block])
    return Neighbors(*(jnp.concatenate(parts) for parts in zip(*blocks, strict=True)))


def proved(
    queries: Float[np.ndarray, "q d"], found: Neighbors, best: Neighbors, *, error: float
) -> Bool[np.ndarray, " q"]:
    """Whether no row outside the candidates can be among a query's ``k`` best, or equal to them.

    Such a row has at most the similarity ``a`` of the last candidate's code, so its exact
    similarity is at most ``a + |q| error`` (Cauchy-Schwarz). A float32 inner product of ``d``
    numbers is off by at most ``g = (d + 2) u |q| |x|`` with ``u = 2^-24``, in any order of the
    summation (Higham 2002, section 3.1). ``g`` is counted twice on each side: for the code and the
    row, and for the candidate here and in the search that is compared with.

    Args:
      queries: embeddings.
      found: the candidates by their codes.
      best: the ``k`` best of them, rescored.
      error: the largest decoding error of a row of the gallery.
    """
    length = np.linalg.norm(np.asarray(queries, np.float64), axis=1)
    rounding = (queries.shape[1] + 2) * 2.0**-24 * (UNIT_LENGTH + error)
    bound = length * (error + 4 * rounding)
    last = np.asarray(found.similarity, np.float64)[:, -1]
    return np.asarray(best.similarity, np.float64)[:, -1] > last + bound


def _read_rows(
    gallery: Float[np.ndarray, "g d"], chosen: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    """Some rows, float32. Systems map many pages around each row, so they are released often."""
    rows = np.empty((len(chosen), gallery.shape[1]), np.float32)
    for first in range(0, len(chosen), _ROWS_AT_ONCE):
        place = slice(first, first + _ROWS_AT_ONCE)
        rows[place] = gallery[chosen[place]]
        release_pages(gallery)
    return rows


_best_candidates = jax.jit(best_candidates, static_argnames="k")

"""Retrieval metrics: the scores of a whole search, and each metric per query.

:func:`retrieval` embeds nothing and needs no mesh: two matrices of embeddings and their labels in,
a dict of scores out. The other functions are per query, from which neighbours are relevant
(:mod:`mmljax.retrieval.metrics`); :func:`masked_mean` averages them over the queries that have a
relevant item.

>>> import numpy as np
>>> relevant, relevant_count = np.array([[False, True], [True, False]]), np.array([1, 1])
>>> float(masked_mean(reciprocal_rank(relevant, relevant_count)))
0.75
"""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmljax.mesh import make_mesh
from mmljax.numerics import masked_mean
from mmljax.retrieval.evaluate import retrieval_scores
from mmljax.retrieval.metrics import (
    TiedRecall,
    is_tied,
    map_at_k,
    map_at_r,
    pessimistic_reciprocal_rank,
    pessimistic_relevance,
    precision_at_k,
    r_precision,
    recall_at_k,
    reciprocal_rank,
    relevance,
    tied_recall_at_k,
)
from mmljax.retrieval.search import CHUNK

__all__ = [
    "TiedRecall",
    "is_tied",
    "map_at_k",
    "map_at_r",
    "masked_mean",
    "pessimistic_reciprocal_rank",
    "pessimistic_relevance",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "reciprocal_rank",
    "relevance",
    "retrieval",
    "tied_recall_at_k",
]


def retrieval(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"] | None,
    query_labels: Int[np.ndarray, " q"],
    gallery_labels: Int[np.ndarray, " g"] | None = None,
    *,
    recall_at: tuple[int, ...] = (1, 10),
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
    geometry: bool = False,
    clustering: bool = False,
) -> dict[str, float]:
    """Scores of queries against a gallery, or among themselves, by inner product.

    Ties never help: a score is what the worst order of equal similarities gives, so an embedding
    that maps everything to one point has 0. Queries without a relevant gallery row are in no score.

    >>> import numpy as np
    >>> x = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    >>> scores = retrieval(x[:2], x, np.array([4, 4]), np.array([5, 4, 5]), recall_at=(1, 2))
    >>> scores["recall@1"], scores["recall@2"], scores["mrr"]
    (0.5, 1.0, 0.75)

    Args:
      queries: embeddings, of unit length where cosine similarity is meant.
      gallery: embeddings, or None for self-retrieval: each query is excluded from its own search.
      query_labels: integers or strings; equal labels are relevant to each other.
      gallery_labels: of the gallery; None for self-retrieval.
      recall_at: the K of Recall@K.
      chunk: bounds the memory: 512 times ``chunk`` similarities are held at once.
      mesh: the devices that share the gallery; all by default.
      geometry: whether to add ``embedding_density`` and ``spectral_decay``.
      clustering: whether to add ``nmi`` and ``ami``; needs scikit-learn, and takes long.

    Returns:
      Shares between 0 and 1: ``recall@K``, ``recall_expected@K`` and ``recall_optimistic@K`` of
      each K, ``mrr``, ``r_precision``, ``map@r``, ``map@K`` of the largest K, ``tie_rate``, and
      ``chance``, the expected Recall@1 of a random order; counts: ``queries``, ``gallery``,
      ``lone_queries``. Values per query: :func:`mmljax.retrieval.evaluate.retrieval_scores`.

    Raises:
      UserError: if an embedding is not finite, a K is below 1 or exceeds the gallery, labels do not
        fit the embeddings, or no query has a relevant gallery row.
    """
    return retrieval_scores(
        queries,
        np.asarray(query_labels),
        gallery,
        None if gallery_labels is None else np.asarray(gallery_labels),
        recall_at=recall_at,
        chunk=chunk,
        mesh=make_mesh() if mesh is None else mesh,
        geometry=geometry,
        clustering=clustering,
    ).summary()

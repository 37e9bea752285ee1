"""Scores of an embedding network: embed query and gallery, search, count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmljax.errors import UserError
from mmljax.mesh import to_host
from mmljax.retrieval import metrics
from mmljax.retrieval.clustering import clustering_scores
from mmljax.retrieval.geometry import embedding_density, spectral_decay
from mmljax.retrieval.search import (
    PositiveRanks,
    sharded_nearest_neighbors,
    sharded_positive_ranks,
)
from mmljax.types import Batch, Params, Values

NEIGHBORS = 10
"""How many of a query's nearest gallery images are told."""

Embed = Callable[[Params, Params, Array], Float[Array, "b d"]]


def make_embed(graphdef: nnx.GraphDef) -> Embed:
    """A jitted ``(network, model_state, images) -> embeddings`` in evaluation mode."""

    @jax.jit
    def embed(network: Params, model_state: Params, images: Array) -> Array:
        return nnx.merge(graphdef, network, model_state)(images, train=False)

    return embed


def embed_batches(
    embed: Callable[[Array], Array], batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings ``[n d]`` and labels ``[n]`` of all valid rows, in order, on the host."""
    vectors, labels = [], []
    for batch in batches:
        valid = to_host(batch.valid)
        vectors.append(to_host(embed(batch.images))[valid])
        labels.append(to_host(batch.labels)[valid])
    return np.concatenate(vectors), np.concatenate(labels)


class Retrieval(NamedTuple):
    """Scores of a whole split, the counts behind them, and what each query had."""

    scores: dict[str, float]
    queries: int
    gallery: int
    lone_queries: int  # without a relevant item in the gallery; in no score
    chance: float  # expected Recall@1 of a random order
    per_query: dict[str, np.ndarray]  # [q] of each score that is a mean; NaN for lone queries
    neighbors: np.ndarray  # [q k] rows of the gallery, nearest first, of the NEIGHBORS nearest
    similarity: np.ndarray  # [q k] of these

    def summary(self) -> dict[str, float]:
        """Scores and counts in one flat dict: a row of the log."""
        counts = {k: v for k, v in self._asdict().items() if isinstance(v, int | float)}
        return {**self.scores, **counts}


def retrieval_scores(
    queries: Any,
    query_labels: Any,
    gallery: Any | None,
    gallery_labels: Any | None,
    *,
    recall_at: tuple[int, ...],
    chunk: int,
    mesh: Mesh,
    geometry: bool = False,
    clustering: bool = False,
) -> Retrieval:
    """Scores of queries against a gallery, or among themselves; equal similarities help nobody.

    A score is what the worst order of equally similar items gives, so that an embedding which maps
    all images to one point has 0. ``recall@K`` and ``mrr`` look at the whole gallery;
    ``r_precision``, ``map@r`` and ``map@K`` (of the largest K) read the neighbours by
    :func:`mmljax.retrieval.metrics.pessimistic_relevance`. What ties are worth is told by
    ``recall_expected@K``, ``recall_optimistic@K`` and ``tie_rate``: the share of queries whose best
    relevant item has an irrelevant one exactly level with it.

    Args:
      queries: unit vectors in NumPy, ``[q d]``.
      query_labels: their items, ``[q]``.
      gallery: ``[g d]``, or None for self-retrieval, where each query is left out of its own search
        by its index.
      gallery_labels: their items, ``[g]``.
      recall_at: the K of Recall@K.
      chunk: gallery rows per matrix product.
      mesh: the devices that share the gallery.
      geometry: whether to add ``embedding_density`` and ``spectral_decay`` of queries and gallery
        together (:mod:`mmljax.retrieval.geometry`).
      clustering: whether to add ``nmi`` and ``ami`` of the same (:mod:`mmljax.retrieval.clustering`).

    Raises:
      UserError: if an embedding is not finite, a K exceeds the gallery, no query has a relevant
        item, or scikit-learn is asked for and absent.
    """
    own = np.arange(len(queries), dtype=np.int32) if gallery is None else None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, query_labels
    for name, vectors in (("query", queries), ("gallery", gallery)):
        if broken := int(np.sum(~np.isfinite(vectors).all(axis=1))):
            raise UserError(
                f"{broken} of {len(vectors)} {name} embeddings are not finite, so nothing can be "
                "ranked; the last checkpoint is kept: lower --config.optimizer.*.learning_rate or "
                "set --config.optimizer.clip_norm"
            )
    candidates = len(gallery) - (own is not None)
    if max(recall_at) > candidates:
        raise UserError(
            f"--config.evaluation.recall_at asks for Recall@{max(recall_at)}, but a query has "
            f"only {candidates} candidates; leave out what is larger"
        )
    items, sizes = np.unique(gallery_labels, return_counts=True)
    place = np.clip(np.searchsorted(items, query_labels), 0, len(items) - 1)
    relevant_count = np.where(items[place] == query_labels, sizes[place], 0) - (own is not None)
    counted = relevant_count > 0
    if not np.any(counted):
        raise UserError("no query has an image of its item in the gallery; check the split file")

    search = {"chunk": chunk, "mesh": mesh, "self_index": own}
    ranks = sharded_positive_ranks(queries, gallery, query_labels, gallery_labels, **search)
    values = _by_rank(PositiveRanks(*map(_local, ranks)), recall_at)
    k = min(max(*recall_at, int(relevant_count.max()), NEIGHBORS), candidates)
    # One more, so that it shows whether the last ones tie with what comes after them.
    found = sharded_nearest_neighbors(queries, gallery, k=min(k + 1, candidates), **search)
    relevant = gallery_labels[to_host(found.indices)] == query_labels[:, None]
    relevant = metrics.pessimistic_relevance(_local(found.similarity), jnp.asarray(relevant), k=k)
    values |= _by_list(relevant, jnp.asarray(relevant_count), max(recall_at))

    per_query = {
        name: np.where(counted, value.value, np.nan).astype(np.float32)
        for name, value in values.items()
    }
    scores = {
        name: float(np.sum(value[counted], dtype=np.float64) / np.sum(counted))
        for name, value in per_query.items()
    }
    every, every_label = queries, query_labels
    if own is None:
        every = np.concatenate([queries, gallery])
        every_label = np.concatenate([query_labels, gallery_labels])
    if geometry:
        scores["embedding_density"] = embedding_density(every, every_label)
        scores["spectral_decay"] = spectral_decay(every)
    if clustering:
        scores |= clustering_scores(every, every_label, seed=0)
    return Retrieval(
        scores=scores,
        queries=len(queries),
        gallery=len(gallery),
        lone_queries=int(np.sum(~counted)),
        chance=float(np.mean(relevant_count[counted] / candidates)),
        per_query=per_query,
        neighbors=to_host(found.indices)[:, :NEIGHBORS],
        similarity=to_host(found.similarity)[:, :NEIGHBORS],
    )


def _local(x: Array) -> Array:
    """A global array as one of this process alone, to be reckoned with further."""
    return jnp.asarray(to_host(x))


def _by_rank(ranks: PositiveRanks, recall_at: tuple[int, ...]) -> dict[str, Values]:
    """What follows from where the best relevant item stands in the whole gallery."""
    level = ranks.above, ranks.tied, ranks.tied_relevant, ranks.relevant
    recalls = {k: metrics.tied_recall_at_k(*level, k=k) for k in recall_at}
    return {
        **{f"recall@{k}": recalls[k].pessimistic for k in recall_at},
        **{f"recall_expected@{k}": recalls[k].expected for k in recall_at},
        **{f"recall_optimistic@{k}": recalls[k].optimistic for k in recall_at},
        "mrr": metrics.pessimistic_reciprocal_rank(ranks.above, ranks.tied, ranks.relevant),
        "tie_rate": metrics.is_tied(ranks.tied, ranks.relevant),
    }


def _by_list(relevant: Array, relevant_count: Array, most: int) -> dict[str, Values]:
    """What follows from which neighbours are relevant."""
    return {
        "r_precision": metrics.r_precision(relevant, relevant_count),
        "map@r": metrics.map_at_r(relevant, relevant_count),
        f"map@{most}": metrics.map_at_k(relevant, relevant_count, k=most),
    }


def evaluate(
    embed: Callable[[Array], Array],
    query_batches: Iterable[Batch],
    gallery_batches: Iterable[Batch] | None,
    **options: Any,
) -> Retrieval:
    """Embed the batches and score them; ``options`` are those of ``retrieval_scores``."""
    queries, query_labels = embed_batches(embed, query_batches)
    if gallery_batches is None:
        return retrieval_scores(queries, query_labels, None, None, **options)
    gallery, gallery_labels = embed_batches(embed, gallery_batches)
    return retrieval_scores(queries, query_labels, gallery, gallery_labels, **options)

"""Scores of an embedding network: embed query and gallery, search, count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmljax import metrics
from mmljax.errors import UserError
from mmljax.mesh import to_host
from mmljax.numerics import masked_mean
from mmljax.retrieval import sharded_nearest_neighbors
from mmljax.types import Batch, Params

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
    """Scores of a whole split and the counts behind them."""

    scores: dict[str, float]
    queries: int
    gallery: int
    lone_queries: int  # without a relevant item in the gallery; in no score
    chance: float  # expected Recall@1 of a random order


def retrieval_scores(
    queries: Any,
    query_labels: Any,
    gallery: Any | None,
    gallery_labels: Any | None,
    *,
    recall_at: tuple[int, ...],
    chunk: int,
    mesh: Mesh,
) -> Retrieval:
    """Recall@K, R-precision and MAP@R of queries against a gallery, or among themselves.

    Args:
      queries: unit vectors in NumPy, ``[q d]``.
      query_labels: their items, ``[q]``.
      gallery: ``[g d]``, or None for self-retrieval, where each query is left out of its own search
        by its index.
      gallery_labels: their items, ``[g]``.
      recall_at: the K of Recall@K.
      chunk: gallery rows per matrix product.
      mesh: the devices that share the gallery.

    Raises:
      UserError: if a K exceeds the gallery, or no query has a relevant item.
    """
    own = np.arange(len(queries), dtype=np.int32) if gallery is None else None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, query_labels
    candidates = len(gallery) - (own is not None)
    if max(recall_at) > candidates:
        raise UserError(
            f"--config.evaluation.recall_at asks for Recall@{max(recall_at)}, but a query has "
            f"only {candidates} candidates; leave out what is larger"
        )
    items, sizes = np.unique(gallery_labels, return_counts=True)
    place = np.clip(np.searchsorted(items, query_labels), 0, len(items) - 1)
    relevant_count = np.where(items[place] == query_labels, sizes[place], 0) - (own is not None)
    if not np.any(relevant_count > 0):
        raise UserError("no query has an image of its item in the gallery; check the split file")
    k = min(max(*recall_at, int(relevant_count.max())), candidates)
    search = partial(sharded_nearest_neighbors, k=k, chunk=chunk, mesh=mesh)
    found = search(queries, gallery, self_index=own)
    relevant = jnp.asarray(gallery_labels[to_host(found.indices)] == query_labels[:, None])
    counts = jnp.asarray(relevant_count)
    values = {f"recall@{at}": metrics.recall_at_k(relevant, counts, k=at) for at in recall_at}
    values["r_precision"] = metrics.r_precision(relevant, counts)
    values["map@r"] = metrics.map_at_r(relevant, counts)
    counted = relevant_count > 0
    return Retrieval(
        scores={name: float(masked_mean(value)) for name, value in values.items()},
        queries=len(queries),
        gallery=len(gallery),
        lone_queries=int(np.sum(~counted)),
        chance=float(np.mean(relevant_count[counted] / candidates)),
    )


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

"""Evaluation of an embedding network: embed query and gallery images, search, score.

Embeddings stay on the devices from the network to the scores. One matrix product per block of
queries gives the neighbours and the ranks (:func:`mmljax.retrieval.search.neighbors_and_ranks`),
and the results are fetched once. Only the optional diagnostics read the embeddings on the host.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmljax.losses.prefixes import unit_prefix
from mmljax.mesh import to_host
from mmljax.numerics import l2_normalize
from mmljax.retrieval import metrics
from mmljax.retrieval.checks import (
    check_embeddings,
    check_labels,
    check_recall_at,
    relevant_counts,
)
from mmljax.retrieval.diagnostics import clustering_scores, embedding_density, spectral_decay
from mmljax.retrieval.k_reciprocal import k_reciprocal_neighbors
from mmljax.retrieval.rerank import database_augmentation, query_expansion
from mmljax.retrieval.search import PositiveRanks, neighbors_and_ranks, renumbered
from mmljax.retrieval.top_k import Neighbors
from mmljax.types import Batch, Params, Values

if TYPE_CHECKING:
    from flax import nnx

    from mmljax.config import RerankConfig

NEIGHBORS = 10
"""How many of a query's nearest gallery images a result keeps."""

_CURE = (
    "nothing can be ranked, and the last checkpoint is kept: lower "
    "--config.optimizer.*.learning_rate or set --config.optimizer.clip_norm"
)
_OF_VARIANTS = re.compile(r"recall@\d+|r_precision|map@r|mrr")
_JOINED = 32  # batches joined at once: a program of many more arguments takes long to compile

Embed = Callable[[Params, Params, Array], Float[Array, "b d"]]


class Retrieval(NamedTuple):
    """Scores of a whole split, the counts behind them, and each query's results."""

    scores: dict[str, float]
    queries: int
    gallery: int
    lone_queries: int  # without a relevant item in the gallery; in no score
    chance: float  # expected Recall@1 of a random order
    per_query: dict[str, np.ndarray]  # [q] of each score that is a mean; NaN for lone queries
    neighbors: np.ndarray  # [q k] gallery rows of the NEIGHBORS nearest, nearest first
    similarity: np.ndarray  # [q k] of these
    at_sizes: Mapping[int, Mapping[str, float]] = MappingProxyType({})  # of shorter prefixes

    def summary(self) -> dict[str, float]:
        """Scores and counts in one flat dict: a row of the log.

        Scores of a prefix of 64 dimensions are named ``recall@1@64``.
        """
        counts = {k: v for k, v in self._asdict().items() if isinstance(v, int | float)}
        at_sizes = {
            f"{name}@{size}": value
            for size, scores in self.at_sizes.items()
            for name, value in scores.items()
        }
        return {**self.scores, **counts, **at_sizes}


@functools.lru_cache(maxsize=8)
def make_embed(graphdef: nnx.GraphDef) -> Embed:
    """A jitted ``(network, model_state, images) -> embeddings`` in evaluation mode."""
    from flax import nnx  # here, as mmljax.metrics does without it

    @jax.jit
    def embed(network: Params, model_state: Params, images: Array) -> Array:
        return nnx.merge(graphdef, network, model_state)(images, train=False)

    return embed


@functools.lru_cache(maxsize=8)
def make_embed_pooled(graphdef: nnx.GraphDef) -> Embed:
    """A jitted function like that of :func:`make_embed`: unit vectors of the pooled features.

    These are the backbone's, without the head: what a pretrained network gives before any training.
    """
    from flax import nnx

    @jax.jit
    def embed(network: Params, model_state: Params, images: Array) -> Array:
        return l2_normalize(nnx.merge(graphdef, network, model_state).pooled(images))

    return embed


def evaluate(
    embed: Callable[[Array], Array],
    query_batches: Iterable[Batch],
    gallery_batches: Iterable[Batch] | None,
    distractor_batches: Iterable[Batch] | None = None,
    *,
    prefixes: Sequence[int] = (),
    **options: Any,
) -> Retrieval:
    """Embed the batches and score them, and the prefixes of the embeddings.

    Args:
      embed: images to embeddings ``[b d]``.
      query_batches: of every query image.
      gallery_batches: of every gallery image, or None for self-retrieval.
      distractor_batches: of images that match no query, or None.
      prefixes: numbers of dimensions; of those below the embedding size, unit prefixes are scored
        by Recall@K, R-precision, MAP@R and MRR, without distractors and second stages. Each costs a
        search.
      options: as of :func:`retrieval_scores`.

    Raises:
      UserError: as :func:`retrieval_scores`.
    """
    queries, query_labels = embed_on_devices(embed, query_batches)
    gallery, gallery_labels = None, None
    if gallery_batches is not None:
        gallery, gallery_labels = embed_on_devices(embed, gallery_batches)
    distractors = None
    if distractor_batches is not None:
        distractors, _ = embed_on_devices(embed, distractor_batches)
    result = retrieval_scores(
        queries, query_labels, gallery, gallery_labels, distractors=distractors, **options
    )
    options |= {"rerank": None, "geometry": False, "clustering": False}
    at_sizes = {}
    for size in prefixes:
        if size < queries.shape[1]:
            cut, others = (
                x if x is None else first_dimensions(x, size) for x in (queries, gallery)
            )
            found = retrieval_scores(cut, query_labels, others, gallery_labels, **options)
            at_sizes[size] = {k: v for k, v in found.scores.items() if _OF_VARIANTS.fullmatch(k)}
    return result._replace(at_sizes=at_sizes)


first_dimensions = jax.jit(unit_prefix, static_argnames="size")
"""The first dimensions of embeddings at unit length, of ``(vectors, size)``."""


def embed_batches(
    embed: Callable[[Array], Array], batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings ``[n d]`` and labels ``[n]`` of all valid rows, in order, on the host."""
    vectors, labels = embed_on_devices(embed, batches)
    return to_host(vectors), labels


def embed_on_devices(
    embed: Callable[[Array], Array], batches: Iterable[Batch]
) -> tuple[Float[Array, "n d"], Int[np.ndarray, " n"]]:
    """Embeddings of all valid rows, in order, on the devices, and their labels on the host.

    Every device holds all embeddings in the end, as the search needs of the queries. The batches
    are embedded without waiting for each other, but for the last two, so that images do not pile
    up on the devices.
    """
    parts: list[Any] = []
    pending: list[Any] = []
    kind: Any = None
    for batch in batches:
        if len(pending) > 1:
            jax.block_until_ready(pending[-2][0])
        if len(pending) == _JOINED:
            parts.append(_join(pending))
            pending = []
        kind = batch.labels.dtype
        pending.append((embed(batch.images), _in_words(batch.labels), batch.valid))
    vectors, labels, valid = _join([*parts, *pending])
    kept = np.flatnonzero(to_host(valid))
    numbers = to_host(labels)[kept]
    if numbers.ndim > 1:
        numbers = numbers.view(kind)[:, 0]
    return _take(vectors, kept.astype(np.int32)), numbers


def _in_words(labels: Any) -> Any:
    """NumPy's labels of 64 bits as two words each, ``[b 2]``: JAX would drop the upper ones."""
    if isinstance(labels, np.ndarray) and labels.dtype.itemsize == 8:
        return np.ascontiguousarray(labels).view(np.uint32).reshape(-1, 2)
    return labels


@jax.jit
def _join(parts: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    vectors, labels, valid = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return vectors, labels, valid


@jax.jit
def _take(x: Array, rows: Array) -> Array:
    return jnp.take(x, rows, axis=0, mode="clip")


def retrieval_scores(
    queries: Any,
    query_labels: Any,
    gallery: Any | None,
    gallery_labels: Any | None,
    *,
    recall_at: tuple[int, ...],
    chunk: int,
    mesh: Mesh,
    distractors: Any | None = None,
    rerank: RerankConfig | None = None,
    geometry: bool = False,
    clustering: bool = False,
) -> Retrieval:
    """Scores of queries against a gallery, or among themselves; equal similarities never help.

    A score is what the worst order of equally similar items gives, so an embedding that maps
    all images to one point has 0. ``recall@K`` and ``mrr`` look at the whole gallery;
    ``r_precision``, ``map@r`` and ``map@K`` (of the largest K) read the neighbours by
    :func:`mmljax.retrieval.metrics.pessimistic_relevance`. ``recall_expected@K``,
    ``recall_optimistic@K`` and ``tie_rate`` (the share of queries whose best relevant item has an
    irrelevant one of exactly equal similarity) show how much ties matter.

    Args:
      queries: unit vectors ``[q d]``, in NumPy or on the devices.
      query_labels: their items, ``[q]``, on the host; integers of any width are told apart.
      gallery: ``[g d]``, or None for self-retrieval, where each query is excluded from its own
        search by its index.
      gallery_labels: their items, ``[g]``.
      recall_at: the K of Recall@K.
      chunk: bounds the similarities held at once, as in
        :func:`mmljax.retrieval.search.neighbors_and_ranks`.
      mesh: the devices that share the gallery.
      distractors: ``[n d]`` of images that match no query, or None. They add each score as it is
        once they have joined the gallery, named as in ``recall@1/distractors``, and their number.
      rerank: the second stages. Each adds Recall@K, R-precision, MAP@R and MRR of a search with
        it, without distractors, named as in ``recall@1/query_expansion``. ``k_reciprocal`` orders
        as many candidates anew as the scores read, if the config names fewer.
      geometry: whether to add ``embedding_density`` and ``spectral_decay`` of queries and gallery
        together (:mod:`mmljax.retrieval.diagnostics`).
      clustering: whether to add ``nmi`` and ``ami`` of the same.

    Raises:
      UserError: if an embedding is not finite, a K exceeds the gallery, no query has a relevant
        item, labels do not fit the embeddings, or scikit-learn is asked for and absent.
    """
    query_labels, gallery_labels = _checked_labels(queries, query_labels, gallery, gallery_labels)
    own = np.arange(len(queries), dtype=np.int32) if gallery is None else None
    relevant = relevant_counts(query_labels, None if gallery is None else gallery_labels)
    against = queries if gallery is None else gallery
    candidates = len(against) - (own is not None)
    check_recall_at(recall_at, candidates=candidates, relevant=relevant)
    options: dict[str, Any] = {
        "recall_at": tuple(recall_at),
        "k": min(max(*recall_at, int(relevant.max()), NEIGHBORS), candidates),
        "chunk": chunk,
        "mesh": mesh,
    }
    counts = relevant.astype(np.int32), own
    arrays = queries, against, query_labels, gallery_labels, *counts
    on_device = score_queries(*arrays, **options)
    on_device[0].update(_variants(arrays, on_device[0]["mrr"], distractors, rerank, options))
    pairs = (queries, query_labels), (gallery, gallery_labels)
    splits = [pair for pair in pairs if pair[0] is not None]
    extra = _diagnostics(splits, geometry=geometry, clustering=clustering)  # during the search
    extra |= {} if distractors is None else {"distractors": len(distractors)}
    values, neighbors, similarity = jax.tree.map(to_host, on_device)
    counted = relevant > 0
    per_query = {k: np.where(counted, v, np.float32(np.nan)) for k, v in values.items()}
    return Retrieval(
        scores=_means(per_query, counted) | extra,
        queries=len(queries),
        gallery=len(against),
        lone_queries=int(np.sum(~counted)),
        chance=float(np.mean(relevant[counted] / candidates)),
        per_query=per_query,
        neighbors=neighbors,
        similarity=similarity,
    )


def _variants(
    arrays: tuple[Any, ...],
    reciprocal_rank: Array,
    distractors: Any | None,
    rerank: RerankConfig | None,
    options: dict[str, Any],
) -> dict[str, Array]:
    """Values ``[q]`` of the scores with distractors and after second stages, as they are named.

    ``arrays`` and ``options`` are those of :func:`score_queries`.
    """
    found = {}
    if distractors is not None:
        queries, gallery, query_labels, gallery_labels, *counts = arrays
        joined = _joined(gallery, query_labels, gallery_labels, distractors)
        found["distractors"], *_ = score_queries(
            queries, joined[0], query_labels, joined[1], *counts, **options
        )
    if rerank is not None:
        for method in rerank.methods:
            found[method] = _second_stage(
                method, *arrays, reciprocal_rank=reciprocal_rank, rerank=rerank, **options
            )
    return {
        f"{name}/{variant}": value
        for variant, values in found.items()
        for name, value in values.items()
    }


def _second_stage(
    method: str,
    queries: Any,
    gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    relevant_count: np.ndarray,
    own: np.ndarray | None,
    *,
    reciprocal_rank: Array,
    rerank: RerankConfig,
    recall_at: tuple[int, ...],
    k: int,
    chunk: int,
    mesh: Mesh,
) -> dict[str, Array]:
    """Values ``[q]`` of the scores after a second stage; ``reciprocal_rank`` is that without it."""
    labels = query_labels, gallery_labels, relevant_count
    options: dict[str, Any] = {"chunk": chunk, "mesh": mesh}
    if method == "k_reciprocal":
        candidates = min(max(rerank.candidates, k), len(gallery) - (own is not None))
        found = k_reciprocal_neighbors(
            queries,
            gallery,
            k=candidates,
            candidates=candidates,
            k1=rerank.k1,
            k2=rerank.k2,
            original_weight=rerank.original_weight,
            self_index=own,
            **options,
        )
        values = _score_lists(found, *labels, reciprocal_rank, recall_at=recall_at)
    else:
        options |= {"k": rerank.k, "alpha": rerank.alpha}
        if method == "query_expansion":
            queries = query_expansion(queries, gallery, self_index=own, **options)
        else:
            gallery = database_augmentation(gallery, **options)
        values, *_ = score_queries(
            queries, gallery, *labels, own, recall_at=recall_at, k=k, chunk=chunk, mesh=mesh
        )
    return {name: value for name, value in values.items() if _OF_VARIANTS.fullmatch(name)}


@functools.partial(jax.jit, static_argnames="recall_at")
def _score_lists(
    found: Neighbors,
    query_labels: Array,
    gallery_labels: Array,
    relevant_count: Array,
    reciprocal_rank: Array,
    *,
    recall_at: tuple[int, ...],
) -> dict[str, Array]:
    """Values of each score of lists whose rest of the gallery follows in the plain order.

    A query without a relevant item in its list keeps its plain ``reciprocal_rank``.
    """
    places = found.indices.shape[1]
    relevant = metrics.relevance(found.indices, query_labels, gallery_labels)
    relevant = metrics.pessimistic_relevance(found.similarity, relevant, k=places)
    values = _by_list(relevant, relevant_count, max(recall_at))
    for k in recall_at:
        values[f"recall@{k}"] = metrics.recall_at_k(relevant, relevant_count, k=k)
    by_name = {name: value.value.astype(jnp.float32) for name, value in values.items()}
    first = metrics.reciprocal_rank(relevant, relevant_count).value
    return by_name | {"mrr": jnp.where(first > 0, first, reciprocal_rank)}


def _joined(
    gallery: Any, query_labels: Any, gallery_labels: Any, distractors: Any
) -> tuple[Array, Int[np.ndarray, " g"]]:
    """The gallery and its labels with distractors below, whose label no query has."""
    check_embeddings(distractors, name="distractor", cure=_CURE)
    labels = np.asarray(gallery_labels, np.int32)
    taken = np.asarray(query_labels)
    free = np.setdiff1d(np.arange(len(taken) + 1, dtype=np.int32), taken)[:1]
    vectors = jnp.concatenate([jnp.asarray(gallery), jnp.asarray(distractors)])
    return vectors, np.concatenate([labels, np.repeat(free, len(distractors))])


def _checked_labels(
    queries: Any, query_labels: Any, gallery: Any, gallery_labels: Any
) -> tuple[Any, Any]:
    """Labels of queries and gallery, numbered alike, once labels and embeddings are checked."""
    check_labels(queries, query_labels, name="query")
    check_labels(gallery, gallery_labels, name="gallery")
    check_embeddings(queries, name="query", cure=_CURE)
    if gallery is None:
        return renumbered(query_labels, query_labels)
    check_embeddings(gallery, name="gallery", cure=_CURE)
    return renumbered(query_labels, gallery_labels)


@functools.partial(jax.jit, static_argnames=("recall_at", "k", "chunk", "mesh"))
def score_queries(
    queries: Array,
    gallery: Array,
    query_labels: Array,
    gallery_labels: Array,
    relevant_count: Array,
    own: Array | None,
    *,
    recall_at: tuple[int, ...],
    k: int,
    chunk: int,
    mesh: Mesh,
) -> tuple[dict[str, Array], Array, Array]:
    """Values of each score ``[q]``, and the first neighbours with their similarities."""
    # One neighbour more, which shows whether the last ones tie with what follows.
    found, ranks = neighbors_and_ranks(
        queries,
        gallery,
        query_labels,
        gallery_labels,
        k=min(k + 1, gallery.shape[0] - (own is not None)),
        mesh=mesh,
        chunk=chunk,
        self_index=own,
    )
    relevant = metrics.relevance(found.indices, query_labels, gallery_labels)
    relevant = metrics.pessimistic_relevance(found.similarity, relevant, k=k)
    values = _by_rank(ranks, recall_at) | _by_list(relevant, relevant_count, max(recall_at))
    by_name = {name: value.value.astype(jnp.float32) for name, value in values.items()}
    return by_name, found.indices[:, :NEIGHBORS], found.similarity[:, :NEIGHBORS]


def _by_rank(ranks: PositiveRanks, recall_at: tuple[int, ...]) -> dict[str, Values]:
    """The scores that follow from the rank of the best relevant item in the whole gallery."""
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
    """The scores that follow from which neighbours are relevant."""
    return {
        "r_precision": metrics.r_precision(relevant, relevant_count),
        "map@r": metrics.map_at_r(relevant, relevant_count),
        f"map@{most}": metrics.map_at_k(relevant, relevant_count, k=most),
    }


def _means(per_query: dict[str, np.ndarray], counted: np.ndarray) -> dict[str, float]:
    """The mean of each score over the counted queries, summed in float64."""
    return {
        name: float(np.sum(value[counted], dtype=np.float64) / np.sum(counted))
        for name, value in per_query.items()
    }


def _diagnostics(
    splits: list[tuple[Any, np.ndarray]], *, geometry: bool, clustering: bool
) -> dict[str, float]:
    """Diagnostics of the embeddings of all splits together; nothing is fetched for none."""
    scores: dict[str, float] = {}
    if not (geometry or clustering):
        return scores
    vectors = np.concatenate([to_host(split_vectors) for split_vectors, _ in splits])
    labels = np.concatenate([split_labels for _, split_labels in splits])
    if geometry:
        scores["embedding_density"] = embedding_density(vectors, labels)
        scores["spectral_decay"] = spectral_decay(vectors)
    if clustering:
        scores |= clustering_scores(vectors, labels, seed=0)
    return scores

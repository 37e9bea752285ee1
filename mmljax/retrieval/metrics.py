"""Retrieval metrics per query, from which of its neighbours are relevant.

A query's *neighbours* are gallery items, best first; an item is *relevant* if it has the query's
label; ``relevant_count`` (R) is how many relevant items the whole gallery holds, found or not. A
*lone* query has none: every metric here is undefined for it, so it is not valid and enters no mean
(:func:`mmljax.numerics.masked_mean`, a total over a count). Recall@1 is also Precision@1, and top-1
accuracy.

A list has its ties in some order. Where that must not matter, take it through
:func:`pessimistic_relevance` first, or use :func:`tied_recall_at_k` and
:func:`pessimistic_reciprocal_rank`, which look at the whole gallery.

>>> import jax.numpy as jnp
>>> relevant = jnp.array([[False, True, True], [False, False, False]])
>>> value, valid = recall_at_k(relevant, jnp.array([2, 0]), k=2)
>>> value.tolist(), valid.tolist()
([1.0, 0.0], [True, False])
>>> map_at_r(relevant, jnp.array([2, 0])).value.tolist()  # (0 + 1/2) / 2
[0.25, 0.0]
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmljax.numerics import masked_mean
from mmljax.types import Values


class TiedRecall(NamedTuple):
    """Recall@K under each way of ordering what is equally similar."""

    pessimistic: Values  # irrelevant items first
    expected: Values  # the mean over all orders
    optimistic: Values  # relevant items first


def relevance(
    indices: Int[Array, "q k"], query_labels: Int[Array, " q"], gallery_labels: Int[Array, " g"]
) -> Bool[Array, "q k"]:
    """Which neighbours, given as gallery indices, have their query's label."""
    return jnp.asarray(gallery_labels)[indices] == jnp.asarray(query_labels)[:, None]


def recall_at_k(
    relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"], *, k: int
) -> Values:
    """Whether a relevant item is among the first ``k`` neighbours: 1 or 0.

    So the field of metric learning calls it; elsewhere it is the hit rate.
    """
    _check_width(relevant, k)
    found = jnp.any(jnp.asarray(relevant)[:, :k], axis=1)
    return _values(found.astype(jnp.float32), relevant_count)


def precision_at_k(
    relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"], *, k: int
) -> Values:
    """Share of relevant items among the first ``k`` neighbours."""
    _check_width(relevant, k)
    hits = jnp.sum(jnp.asarray(relevant)[:, :k], axis=1)
    return _values(hits / k, relevant_count)


def r_precision(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"]) -> Values:
    """Share of relevant items among the first R neighbours.

    NaN where R exceeds the number of neighbours given: it cannot be known from so few.
    """
    hits = _first_r(relevant, relevant_count)
    return _divided_by_r(jnp.sum(hits, axis=1), relevant, relevant_count)


def map_at_r(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"]) -> Values:
    """Mean average precision at R: ``(1/R) sum_{i <= R} precision(i) relevant(i)``.

    NaN where R exceeds the number of neighbours given: it cannot be known from so few.

    Reference: Musgrave, Belongie, Lim, A Metric Learning Reality Check (2020), arXiv 2003.08505.
    """
    hits = _first_r(relevant, relevant_count)
    return _divided_by_r(jnp.sum(_precision(hits) * hits, axis=1), relevant, relevant_count)


def map_at_k(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"], *, k: int) -> Values:
    """Average precision of the first k: ``(1/min(R, k)) sum_{i <= k} precision(i) relevant(i)``.

    Divided by the most relevant items that k places can hold, so that a perfect list has 1. Some
    libraries divide by R, or by the relevant items found; all agree where k places find them all.
    """
    _check_width(relevant, k)
    hits = jnp.asarray(relevant)[:, :k].astype(jnp.float32)
    most = jnp.clip(jnp.asarray(relevant_count), 1, k)
    return _values(jnp.sum(_precision(hits) * hits, axis=1) / most, relevant_count)


def reciprocal_rank(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"]) -> Values:
    """One over the place of the first relevant neighbour; 0 where none is among those given."""
    hits = jnp.asarray(relevant)
    first = jnp.argmax(hits, axis=1)
    return _values(jnp.where(jnp.any(hits, axis=1), 1 / (first + 1), 0), relevant_count)


def cumulative_match(
    relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"]
) -> Float[Array, " k"]:
    """The cumulative match characteristic: Recall@1 to Recall@k, each the mean over valid queries.

    So re-identification calls it, where each query has one relevant item or the first found counts.
    0 where no query is valid.
    """
    found = jnp.cumsum(jnp.asarray(relevant), axis=1) > 0
    return masked_mean(_values(found.T.astype(jnp.float32), relevant_count))


def pessimistic_relevance(
    similarity: Float[Array, "q n"], relevant: Bool[Array, "q n"], *, k: int
) -> Bool[Array, "q k"]:
    """Relevance of the first ``k`` neighbours with irrelevant items first among equal similarities.

    What :func:`map_at_r` and others make of it owes nothing to the gallery's order. Where a tie
    goes on beyond place ``k``, all its places are taken for irrelevant ones: the true worst case if
    the gallery has as many irrelevant items in that tie, else a bound from below.

    Args:
      similarity: in falling order, of ``n`` neighbours: ``k + 1``, so that a tie which goes on is
        seen, or ``k`` where the gallery has no more.
      relevant: of the same neighbours.
      k: places.
    """
    similarity, relevant = jnp.asarray(similarity), jnp.asarray(relevant)
    _check_width(relevant, k)
    falls = similarity[:, 1:] < similarity[:, :-1]
    tie = jnp.pad(jnp.cumsum(falls, axis=1), ((0, 0), (1, 0)))
    if relevant.shape[1] > k:
        relevant = relevant & (tie != tie[:, k : k + 1])
    tie, relevant = tie[:, :k], relevant[:, :k]
    order = jnp.argsort(2 * tie + relevant, axis=1)
    return jnp.take_along_axis(relevant, order, axis=1)


def pessimistic_reciprocal_rank(
    above: Int[Array, " q"], tied: Int[Array, " q"], relevant_count: Int[Array, " q"]
) -> Values:
    """One over the place of the first relevant item in the whole gallery, behind what ties with it.

    Args:
      above: irrelevant items strictly above the best relevant one, as from
        :func:`mmljax.retrieval.search.positive_ranks`.
      tied: irrelevant items level with it.
      relevant_count: R.
    """
    return _values(1 / (jnp.asarray(above) + jnp.asarray(tied) + 1), relevant_count)


def tied_recall_at_k(
    above: Int[Array, " q"],
    tied: Int[Array, " q"],
    tied_relevant: Int[Array, " q"],
    relevant_count: Int[Array, " q"],
    *,
    k: int,
) -> TiedRecall:
    """Recall@K that owes nothing to the order of equal similarities.

    With s the highest similarity of a relevant item, ``t`` irrelevant and ``p >= 1`` relevant
    items at exactly s, and ``above`` irrelevant items above it, the ``m = k - above`` places left
    are filled from the ``t + p``. All orders of these being equally likely, no relevant item is
    among the first m with probability ``C(t, m) / C(t + p, m)``, which is
    ``prod_{j < m} (t - j) / (t + p - j)``, and 0 from ``m > t`` on.

    An embedding that maps everything to one point has 0, the chance level and 1.

    Args:
      above: irrelevant items strictly above s, as from :func:`mmljax.retrieval.search.positive_ranks`.
      tied: irrelevant items at s.
      tied_relevant: relevant items at s.
      relevant_count: R.
      k: places.
    """
    above, tied, tied_relevant = (jnp.asarray(x) for x in (above, tied, tied_relevant))

    def fill(place: Array, miss: Array) -> Array:
        left = jnp.maximum(tied - place, 0)
        share = left / jnp.maximum(left + tied_relevant, 1)
        return jnp.where(place < k - above, miss * share, miss)

    miss = jax.lax.fori_loop(0, k, fill, jnp.ones(above.shape))
    return TiedRecall(
        pessimistic=_values((above + tied < k).astype(jnp.float32), relevant_count),
        expected=_values(1 - miss, relevant_count),
        optimistic=_values((above < k).astype(jnp.float32), relevant_count),
    )


def is_tied(tied: Int[Array, " q"], relevant_count: Int[Array, " q"]) -> Values:
    """Whether the best relevant item is level with an irrelevant one: 1 or 0.

    Args:
      tied: irrelevant items level with it, as from :func:`mmljax.retrieval.search.positive_ranks`.
      relevant_count: R.
    """
    return _values((jnp.asarray(tied) > 0).astype(jnp.float32), relevant_count)


def _values(value: Float[Array, "*terms q"], relevant_count: Int[Array, " q"]) -> Values:
    valid = jnp.asarray(relevant_count) > 0
    return Values(jnp.where(valid, value, 0), valid)


def _precision(hits: Float[Array, "q k"]) -> Float[Array, "q k"]:
    """Precision of the first i neighbours, for each i."""
    return jnp.cumsum(hits, axis=1) / jnp.arange(1, hits.shape[1] + 1)


def _first_r(relevant: Array, relevant_count: Array) -> Float[Array, "q k"]:
    place = jnp.arange(relevant.shape[1])
    within = place < jnp.asarray(relevant_count)[:, None]
    return (jnp.asarray(relevant) & within).astype(jnp.float32)


def _divided_by_r(total: Array, relevant: Array, relevant_count: Array) -> Values:
    count = jnp.asarray(relevant_count)
    known = count <= relevant.shape[1]
    return _values(jnp.where(known, total / jnp.maximum(count, 1), jnp.nan), count)


def _check_width(relevant: Array, k: int) -> None:
    if k > relevant.shape[1]:
        raise ValueError(f"k={k} of only {relevant.shape[1]} neighbours; search for at least k")

"""Retrieval metrics per query, from which of its neighbours are relevant.

A query's *neighbours* are gallery items, best first; an item is *relevant* if it has the query's
label; ``relevant_count`` (R) is how many relevant items the whole gallery holds, found or not. A
*lone* query has none: every metric is undefined for it, so it is not valid and enters no mean
(:func:`mmljax.numerics.masked_mean`, a total over a count). Every metric returns
:class:`mmljax.types.Values`: ``value [q]`` float32 between 0 and 1, ``valid [q]``.

A list has its ties in some order. Where that must not matter, reorder it with
:func:`pessimistic_relevance` first, or use :func:`tied_recall_at_k` and
:func:`pessimistic_reciprocal_rank`, which count ties in the whole gallery.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmljax.retrieval.search import renumbered
from mmljax.types import Values


class TiedRecall(NamedTuple):
    """Recall@K under each way of ordering equal similarities.

    >>> found = tied_recall_at_k(*map(jnp.array, ([0], [1], [1], [1])), k=1)  # two items tie
    >>> [float(x.value[0]) for x in found]
    [0.0, 0.5, 1.0]
    """

    pessimistic: Values  # irrelevant items first
    expected: Values  # the mean over all orders
    optimistic: Values  # relevant items first


def relevance(
    indices: Int[Array, "q k"], query_labels: Int[Array, " q"], gallery_labels: Int[Array, " g"]
) -> Bool[Array, "q k"]:
    """Which neighbours, given as gallery indices, have their query's label.

    >>> import numpy as np
    >>> relevance(np.array([[2, 0]]), np.array([7]), np.array([7, 8, 9])).tolist()
    [[False, True]]

    Args:
      indices: of gallery rows.
      query_labels: integers of any width or strings.
      gallery_labels: the same.
    """
    own, others = renumbered(query_labels, gallery_labels)
    return jnp.asarray(others)[indices] == jnp.asarray(own)[:, None]


def recall_at_k(
    relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"], *, k: int
) -> Values:
    """Whether a relevant item is among the first ``k`` neighbours: 1 or 0.

    This is Recall@K as metric learning defines it; elsewhere it is the hit rate. Recall@1 is also
    Precision@1, and top-1 accuracy.

    >>> import numpy as np
    >>> relevant = np.array([[False, True, True], [False, False, False]])
    >>> value, valid = recall_at_k(relevant, np.array([2, 0]), k=2)
    >>> value.tolist(), valid.tolist()
    ([1.0, 0.0], [True, False])

    Args:
      relevant: which neighbours are relevant, best first.
      relevant_count: R.
      k: places; at most the number of neighbours.

    Raises:
      ValueError: ``k`` is below 1 or above the number of neighbours.
    """
    found = jnp.any(_first(relevant, k), axis=1)
    return _values(found.astype(jnp.float32), relevant_count)


def precision_at_k(
    relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"], *, k: int
) -> Values:
    """Share of relevant items among the first ``k`` neighbours; arguments as :func:`recall_at_k`.

    >>> import numpy as np
    >>> precision_at_k(np.array([[True, False, True]]), np.array([2]), k=2).value.tolist()
    [0.5]
    """
    hits = jnp.sum(_first(relevant, k), axis=1)
    return _values(hits / k, relevant_count)


def r_precision(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"]) -> Values:
    """Share of relevant items among the first R neighbours.

    NaN if R exceeds the number of neighbours given: so few do not determine it.

    >>> import numpy as np
    >>> r_precision(np.array([[True, False, True]]), np.array([2])).value.tolist()
    [0.5]
    """
    hits = _first_r(relevant, relevant_count)
    return _divided_by_r(jnp.sum(hits, axis=1), relevant, relevant_count)


def map_at_r(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"]) -> Values:
    """Mean average precision at R: ``(1/R) sum_{i <= R} precision(i) relevant(i)``.

    NaN if R exceeds the number of neighbours given: so few do not determine it.

    Reference: Musgrave, Belongie, Lim, A Metric Learning Reality Check (2020), arXiv 2003.08505.

    >>> import numpy as np
    >>> map_at_r(np.array([[False, True, True]]), np.array([2])).value.tolist()  # (0 + 1/2) / 2
    [0.25]
    """
    hits = _first_r(relevant, relevant_count)
    return _divided_by_r(jnp.sum(_precision(hits) * hits, axis=1), relevant, relevant_count)


def map_at_k(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"], *, k: int) -> Values:
    """Average precision of the first k: ``(1/min(R, k)) sum_{i <= k} precision(i) relevant(i)``.

    The divisor is the most relevant items that k places can hold, so a perfect list has 1. Some
    libraries divide by R, or by the relevant items found; all agree if k places find them all.
    Arguments and errors as :func:`recall_at_k`.

    >>> import numpy as np
    >>> map_at_k(np.array([[True, False, False]]), np.array([3]), k=2).value.tolist()
    [0.5]
    """
    hits = _first(relevant, k).astype(jnp.float32)
    most = jnp.clip(jnp.asarray(relevant_count), 1, k)
    return _values(jnp.sum(_precision(hits) * hits, axis=1) / most, relevant_count)


def reciprocal_rank(relevant: Bool[Array, "q k"], relevant_count: Int[Array, " q"]) -> Values:
    """One over the place of the first relevant neighbour; 0 if none is among those given.

    >>> import numpy as np
    >>> reciprocal_rank(np.array([[False, True]]), np.array([1])).value.tolist()
    [0.5]
    """
    hits = jnp.asarray(relevant)
    first = jnp.argmax(hits, axis=1)
    return _values(jnp.where(jnp.any(hits, axis=1), 1 / (first + 1), 0), relevant_count)


def pessimistic_relevance(
    similarity: Float[Array, "q n"], relevant: Bool[Array, "q n"], *, k: int
) -> Bool[Array, "q k"]:
    """Relevance of the first ``k`` neighbours with irrelevant items first among equal similarities.

    Metrics of it, such as :func:`map_at_r`, do not depend on the gallery's order. If a tie
    continues beyond place ``k``, all its places count as irrelevant: the true worst case if
    the gallery has as many irrelevant items in that tie, else a lower bound.

    >>> import numpy as np
    >>> similarity, relevant = np.array([[0.9, 0.9, 0.1]]), np.array([[True, False, True]])
    >>> pessimistic_relevance(similarity, relevant, k=2).tolist()
    [[False, True]]

    Args:
      similarity: in falling order, of ``n`` neighbours: ``k + 1``, so that a tie which continues
        is seen, or ``k`` if the gallery has no more.
      relevant: of the same neighbours.
      k: places.

    Raises:
      ValueError: ``k`` is below 1 or above the number of neighbours.
    """
    similarity, relevant = jnp.asarray(similarity), jnp.asarray(relevant)
    _check_places(relevant, k)
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
    """One over the rank of the first relevant item in the whole gallery, behind its ties.

    >>> import numpy as np
    >>> pessimistic_reciprocal_rank(np.array([0]), np.array([1]), np.array([1])).value.tolist()
    [0.5]

    Args:
      above: irrelevant items strictly above the best relevant one, as from
        :func:`mmljax.retrieval.search.positive_ranks`.
      tied: irrelevant items equal to it.
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
    """Recall@K that does not depend on the order of equal similarities.

    With s the highest similarity of a relevant item, ``t`` irrelevant and ``p >= 1`` relevant
    items at exactly s, and ``above`` irrelevant items above it, the ``m = k - above`` places left
    are filled from the ``t + p``. All orders of these being equally likely, no relevant item is
    among the first m with probability ``C(t, m) / C(t + p, m)``, which is
    ``prod_{j < m} (t - j) / (t + p - j)``, and 0 from ``m > t`` on.

    An embedding that maps everything to one point has 0, the chance level and 1.

    >>> import numpy as np
    >>> one = np.array([1])
    >>> recall = tied_recall_at_k(0 * one, one, one, one, k=1)  # a tie of one and one
    >>> [float(values.value[0]) for values in recall]
    [0.0, 0.5, 1.0]

    Args:
      above: irrelevant items strictly above s, as from
        :func:`mmljax.retrieval.search.positive_ranks`.
      tied: irrelevant items at s.
      tied_relevant: relevant items at s.
      relevant_count: R.
      k: places.
    """
    above, tied, tied_relevant = (jnp.asarray(x) for x in (above, tied, tied_relevant))
    miss = _miss(above, tied, tied_relevant, k=k)
    return TiedRecall(
        pessimistic=_values((above + tied < k).astype(jnp.float32), relevant_count),
        expected=_values(1 - miss, relevant_count),
        optimistic=_values((above < k).astype(jnp.float32), relevant_count),
    )


def is_tied(tied: Int[Array, " q"], relevant_count: Int[Array, " q"]) -> Values:
    """Whether the best relevant item has an irrelevant one of equal similarity: 1 or 0.

    >>> import numpy as np
    >>> is_tied(np.array([0, 2]), np.array([1, 1])).value.tolist()
    [0.0, 1.0]

    Args:
      tied: irrelevant items equal to it, as from :func:`mmljax.retrieval.search.positive_ranks`.
      relevant_count: R.
    """
    return _values((jnp.asarray(tied) > 0).astype(jnp.float32), relevant_count)


@functools.partial(jax.jit, static_argnames="k")  # else every call would compile its loop
def _miss(above: Array, tied: Array, tied_relevant: Array, *, k: int) -> Float[Array, " q"]:
    """Probability that no relevant item is among the first k, over all orders of equal items."""

    def fill(place: Array, miss: Array) -> Array:
        left = jnp.maximum(tied - place, 0)
        share = left / jnp.maximum(left + tied_relevant, 1)
        return jnp.where(place < k - above, miss * share, miss)

    return jax.lax.fori_loop(0, k, fill, jnp.ones(above.shape))


def _values(value: Float[Array, "*terms q"], relevant_count: Int[Array, " q"]) -> Values:
    valid = jnp.asarray(relevant_count) > 0
    return Values(jnp.where(valid, value, 0), valid)


def _precision(hits: Float[Array, "q k"]) -> Float[Array, "q k"]:
    """Precision of the first i neighbours, for each i."""
    return jnp.cumsum(hits, axis=1) / jnp.arange(1, hits.shape[1] + 1)


def _first(relevant: Array, k: int) -> Bool[Array, "q k"]:
    _check_places(relevant, k)
    return jnp.asarray(relevant)[:, :k]


def _first_r(relevant: Array, relevant_count: Array) -> Float[Array, "q k"]:
    place = jnp.arange(relevant.shape[1])
    within = place < jnp.asarray(relevant_count)[:, None]
    return (jnp.asarray(relevant) & within).astype(jnp.float32)


def _divided_by_r(total: Array, relevant: Array, relevant_count: Array) -> Values:
    count = jnp.asarray(relevant_count)
    known = count <= relevant.shape[1]
    return _values(jnp.where(known, total / jnp.maximum(count, 1), jnp.nan), count)


def _check_places(relevant: Array, k: int) -> None:
    if not 1 <= k <= relevant.shape[1]:
        raise ValueError(f"k={k} of only {relevant.shape[1]} neighbours; search for at least k")

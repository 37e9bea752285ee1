"""Pair losses that relax a retrieval metric; anchors are queries.

The signature and notation are those of :mod:`mmljax.losses.pair`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmljax.errors import UserError
from mmljax.numerics import masked_mean, promote
from mmljax.types import PairMasks, Values

_Row = Callable[[Float[Array, " m"], Bool[Array, " m"], Bool[Array, " m"]], Float[Array, ""]]


def smooth_ap_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, temperature: float = 0.01
) -> Values:
    """Smooth-AP: 1 minus the average precision with ranks counted by sigmoids.

    ``1 - mean_(i in P) r_P(i) / r_(P and N)(i)``, where the rank ``r_S(i)`` among a set is
    ``1 + sum_(j in S, j != i) sigmoid((s_j - s_i) / t)``.
    Relation: sample to sample. Mean over the queries with a positive.
    Time ``O(n m m)``, memory ``O(m m)``: rows are computed one at a time, and again in the
    backward pass, so this is for batches, not for a long memory.
    Use: when the metric is mean average precision and batches are large.

    Source: Brown et al. 2020, arXiv 2007.12163. Deviation: the query itself is not one
    of its positives unless the mask says so (the authors' code counts it).

    Args:
      similarity: queries by references.
      masks: of the same shape.
      temperature: ``t`` of the sigmoids, in cosine; default of the paper.
    """

    def row(
        s: Float[Array, " m"], positive: Bool[Array, " m"], negative: Bool[Array, " m"]
    ) -> Float[Array, ""]:
        above = _above(s, temperature)
        # A positive counts itself as sigmoid(0), so 0.5 of its rank's 1 is in the sum.
        rank = 0.5 + jnp.sum(jnp.where(positive, above, 0), axis=-1)
        ahead = jnp.sum(jnp.where(negative, above, 0), axis=-1)
        return 1 - masked_mean(Values(rank / (rank + ahead), positive))

    return _row_by_row(row, similarity, masks)


def recall_at_k_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    ks: tuple[int, ...] = (1, 2, 4, 8, 16),
    temperature: float = 0.01,
    rank_temperature: float = 1.0,
) -> Values:
    """Recall@k surrogate: 1 minus the recall at k with both step functions relaxed to sigmoids.

    ``1 - mean_k min(k, sum_(i in P) sigmoid((k - r_i) / t1)) / min(k, |P|)``, where the rank
    ``r_i`` is ``1 + sum_(j in P and N, j != i) sigmoid((s_j - s_i) / t2)``.
    Relation: sample to sample. Mean over the queries with a positive.
    Time ``O(n m m)``, memory ``O(m m)``: rows are computed one at a time, and again in the
    backward pass, so this is for batches, not for a long memory.
    Use: when the metric is recall and batches are large.

    Source: Patel, Tolias, Matas 2022 (CVPR), arXiv 2108.11179; the clipping at ``k`` and the
    division by ``min(k, |P|)`` are the authors' code's. Deviations from that code: the query is
    in no rank unless a mask says so (there it is, so every rank is greater by almost 1), and
    ``t1`` is one number (there its default is ``k`` itself).

    Args:
      similarity: queries by references.
      masks: of the same shape.
      ks: the ranks at which recall is taken, at least 1 each; default of the authors' code.
      temperature: ``t2``, of the sigmoids that count ranks, in cosine; default of the paper.
      rank_temperature: ``t1``, of the sigmoids that compare a rank with ``k``, in ranks; default
        of the paper.

    Raises:
      UserError: if ``ks`` is empty or holds other than positive integers.
    """
    if not ks or not all(isinstance(k, int) and k > 0 for k in ks):
        raise UserError(f"ks={ks!r} must be one or more positive integers, such as (1, 2, 4)")

    def row(
        s: Float[Array, " m"], positive: Bool[Array, " m"], negative: Bool[Array, " m"]
    ) -> Float[Array, ""]:
        # Every column counts itself as sigmoid(0), so 0.5 of its rank's 1 is in the sum.
        rank = 0.5 + jnp.sum(jnp.where(positive | negative, _above(s, temperature), 0), axis=-1)
        k = jnp.asarray(ks, s.dtype)
        within = jax.nn.sigmoid((k[:, None] - rank) / rank_temperature)
        found = jnp.sum(jnp.where(positive, within, 0), axis=-1)
        possible = jnp.minimum(k, jnp.maximum(jnp.sum(positive, dtype=s.dtype), 1))
        return 1 - jnp.mean(jnp.minimum(found, possible) / possible)

    return _row_by_row(row, similarity, masks)


def _above(s: Float[Array, " m"], temperature: float) -> Float[Array, "m m"]:
    """At ``[i, j]`` how far column ``j`` is before column ``i``, from 0 to 1."""
    return jax.nn.sigmoid((s - s[:, None]) / temperature)


def _row_by_row(row: _Row, similarity: Float[Array, "n m"], masks: PairMasks) -> Values:
    """The values of queries with a positive, computed one at a time, and again on the way back."""
    operands = (promote(similarity), masks.positive, masks.negative)
    value = jax.lax.map(jax.checkpoint(lambda own: row(*own)), operands)
    valid = jnp.any(masks.positive, axis=-1)
    return Values(jnp.where(valid, value, 0), valid)

"""Pair losses that relax a retrieval metric; anchors are queries.

The signature and notation are those of :mod:`mmljax.losses.pair`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmljax.numerics import masked_mean, promote
from mmljax.types import PairMasks, Values


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

    @jax.checkpoint
    def row(
        operands: tuple[Float[Array, " m"], Bool[Array, " m"], Bool[Array, " m"]],
    ) -> Float[Array, ""]:
        s, positive, negative = operands
        above = jax.nn.sigmoid((s - s[:, None]) / temperature)  # [i, j]: j before i
        # A positive counts itself as sigmoid(0), so 0.5 of its rank's 1 is in the sum.
        rank = 0.5 + jnp.sum(jnp.where(positive, above, 0), axis=-1)
        ahead = jnp.sum(jnp.where(negative, above, 0), axis=-1)
        return 1 - masked_mean(Values(rank / (rank + ahead), positive))

    value = jax.lax.map(row, (promote(similarity), masks.positive, masks.negative))
    valid = jnp.any(masks.positive, axis=-1)
    return Values(jnp.where(valid, value, 0), valid)

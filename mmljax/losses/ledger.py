"""The ledger: the contribution of each objective to a step, as a flat dict of scalars.

``loss`` is the weighted sum. Of each objective: ``loss/``, ``weight/`` and ``weighted/`` (their
product); ``gradient_embeddings/`` and ``gradient_proxies/``, the norms of its unweighted gradient
on the unit sphere; ``share_embeddings/`` and ``share_proxies/``, its part of the weighted norms in
each group; ``kept_positive/`` and ``kept_negative/``, the fractions that mining keeps. Of each pair
of objectives: ``conflict/a_b``, the cosine of their gradients at the embeddings.

With several sizes (:mod:`mmljax.losses.prefixes`) these are of the weighted sum over the sizes, and
``loss@SIZE/``, ``kept_positive@SIZE/`` and ``kept_negative@SIZE/`` of each alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmljax.losses.combination import contribution_shares
from mmljax.losses.relations import RELATIONS, SAMPLES, Kept
from mmljax.types import BoundObjective

Scalars = dict[str, Float[Array, ""]]


def contributions(
    objectives: Sequence[BoundObjective],
    loss: Float[Array, " o"],
    weights: Float[Array, " o"],
    norms: Float[Array, "2 o"],
    gram: Float[Array, "o o"],
    kept: Sequence[Kept],
) -> Scalars:
    """The ledger's row of one step.

    Args:
      objectives: in the order of every other argument.
      loss: unweighted.
      weights: contribution weights.
      norms: of each objective's gradient at the embeddings (row 0) and the proxies (row 1).
      gram: inner products of the gradients at the embeddings.
      kept: numbers of pairs before and after mining, of all sizes.
    """
    shares = contribution_shares(weights, norms)
    scalars = {"loss": jnp.sum(weights * loss)}
    for k, objective in enumerate(objectives):
        name = objective.name
        scalars |= {
            f"loss/{name}": loss[k],
            f"weight/{name}": weights[k],
            f"weighted/{name}": weights[k] * loss[k],
            f"gradient_embeddings/{name}": norms[0, k],
            f"gradient_proxies/{name}": norms[1, k],
            f"share_embeddings/{name}": shares[0, k],
            f"share_proxies/{name}": shares[1, k],
        }
        if objective.miner is not None:
            scalars |= _fractions(Kept(*map(jnp.sum, kept[k])), name)
        for j, other in enumerate(objectives[:k]):
            if not all(SAMPLES in RELATIONS[o.relation] for o in (objective, other)):
                continue  # objectives among proxies have no gradient at the embeddings
            size = norms[0, j] * norms[0, k]
            cosine = jnp.where(size > 0, gram[j, k] / jnp.where(size > 0, size, 1), 0)
            scalars[f"conflict/{other.name}_{name}"] = cosine
    return scalars


def of_sizes(
    objectives: Sequence[BoundObjective],
    sizes: Sequence[int],
    losses: Float[Array, "o s"],
    kept: Sequence[Kept],
) -> Scalars:
    """The ledger's entries of each size, where there are several.

    Args:
      objectives: in the order of losses and counts.
      sizes: of the embeddings' prefixes.
      losses: unweighted.
      kept: numbers of pairs before and after mining, at each size.
    """
    scalars: Scalars = {}
    if len(sizes) < 2:
        return scalars
    for k, objective in enumerate(objectives):
        for place, size in enumerate(sizes):
            scalars[f"loss@{size}/{objective.name}"] = losses[k, place]
            if objective.miner is not None:
                own = Kept(*(count[place] for count in kept[k]))
                scalars |= _fractions(own, objective.name, at=f"@{size}")
    return scalars


def _fractions(pairs: Kept, name: str, *, at: str = "") -> Scalars:
    """The fractions that mining keeps."""
    return {
        f"kept_positive{at}/{name}": pairs.positive / jnp.maximum(pairs.all_positive, 1),
        f"kept_negative{at}/{name}": pairs.negative / jnp.maximum(pairs.all_negative, 1),
    }

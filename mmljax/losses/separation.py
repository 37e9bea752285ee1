"""Separation losses on a block of similarities: proxy to proxy.

``loss(similarity, masks, *, ...) -> Values``, with the notation of :mod:`mmljax.losses.pair`.
``similarity`` holds the cosines of **unit** proxies: rows are proxies, columns all proxies.
Negatives are the real proxies of other classes, positives the other centers of the same class (if
classes have several). The proxy itself and padding are in neither mask.

>>> import jax.numpy as jnp
>>> from mmljax.types import PairMasks
>>> similarity = jnp.array([[1.0, 0.5, -0.5]])
>>> masks = PairMasks(jnp.array([[False] * 3]), jnp.array([[False, True, True]]))
>>> soft_orthogonality_loss(similarity, masks).value.tolist()
[0.5]
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmljax.losses.blocks import all_valid, any_column, chord_distance, squared_chord
from mmljax.numerics import masked_logsumexp, masked_mean, promote
from mmljax.types import PairMasks, Values

_CLOSEST = 1e-4  # squared distance below which the energy is constant


def nearest_proxy_separation_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, gamma: float = 32.0, margin: float = 0.1
) -> Values:
    """Nearest-proxy separation: ``log(1 + sum_N e^(g (s - m))) / g``.

    Between the mean of all cosines (``gamma`` to 0) and the hinge on the nearest proxy alone
    (``gamma`` to infinity). Relation: proxy to proxy. Mean over all proxies.
    Use: the default separation loss; it has a gradient also where classes outnumber dimensions,
    where the mean cosine and ``soft_orthogonality`` are nearly flat at the start.

    Source: this project; the negative term of Multi-Similarity (arXiv 1904.06627) among proxies.
    Its limit is the inter-class term of RegularFace (Zhao et al. 2019, CVPR) with a margin.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
      gamma: sharpness ``g``; this project's default, which gives random proxies a gradient.
      margin: cosine ``m`` from which proxies count as near; this project's default. At 0.5 random
        proxies have no gradient.
    """
    s = promote(similarity)
    repulsion = masked_logsumexp(
        gamma * (s - margin), masks.negative, add_one=True, bound=gamma * (1 - margin)
    )
    return all_valid(repulsion / gamma)


def soft_orthogonality_loss(similarity: Float[Array, "n m"], masks: PairMasks) -> Values:
    """Soft orthogonality: ``sum_N s^2``, whose mean is ``||P P^T - I||_F^2 / C``.

    Relation: proxy to proxy. Mean over all proxies. Nearly flat where there are many more proxies
    than dimensions: random ones are already close to its minimum.
    Use: fewer classes than dimensions.

    Source: Saberi-Movahed et al. 2023, arXiv 2306.13055; Bansal et al. 2018, arXiv 1810.09102.
    Deviations: divided by the number of proxies; centers of the same class are exempt.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
    """
    s = promote(similarity)
    return all_valid(jnp.sum(jnp.where(masks.negative, s * s, 0), axis=-1))


def hyperspherical_energy_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    squared_distance: Float[Array, "n m"] | None = None,
    *,
    power: float = 2.0,
) -> Values:
    """Minimum hyperspherical energy: the mean over ``N`` of ``D^-power``, or of ``-log D`` for 0.

    Relation: proxy to proxy. Mean over all proxies. ``D^2`` is at least 1e-4, below which the
    energy is constant: coincident proxies cost much, and nothing is infinite.
    Use: few classes, which it spreads to a simplex.

    Source: Liu et al. 2018, arXiv 1805.09298, eq. 1, divided by the number of pairs.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
      squared_distance: of the same shape, see :func:`mmljax.losses.blocks.distances_for`.
      power: the paper's ``s``, of which it studies 0, 1 and 2; a Python number, at least 0.
        Default: the largest that the paper studies.
    """
    squared = jnp.maximum(squared_chord(similarity, squared_distance), _CLOSEST)
    energy = -jnp.log(squared) / 2 if power == 0 else squared ** (-power / 2)
    return all_valid(masked_mean(Values(energy, masks.negative)))


def soft_triple_regularizer(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    squared_distance: Float[Array, "n m"] | None = None,
) -> Values:
    """SoftTriple's regulariser: half the mean Euclidean distance to the class's other centers.

    It merges superfluous centers of a class and does not separate classes. Relation: proxy to
    proxy. Mean over the proxies whose class has another center.
    Use: beside ``soft_triple``.

    Source: Qian et al. 2019, arXiv 1909.05235: ``sum D / (C K (K - 1))`` over the pairs
    of centers of each class. Deviation: exact and finite at coincident centers, where the authors'
    code adds 1e-5 under the root.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
      squared_distance: of the same shape, see :func:`mmljax.losses.blocks.distances_for`.
    """
    distance = chord_distance(similarity, squared_distance)
    valid = any_column(masks.positive)
    return Values(masked_mean(Values(distance, masks.positive)) / 2, valid)

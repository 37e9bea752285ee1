"""Objectives among proxies: keep the classes' representatives apart.

All are pure functions of a block of cosine similarities of **unit** proxies, with the contract of
:mod:`mmljax.losses.pair`: rows are the proxies, columns all proxies, negatives the real
proxies of other classes, positives the other centres of the same class (if classes have several).
The proxy itself and padding are in neither mask. Every row is valid, except where said.

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

from mmljax.losses.blocks import chord_distance, promote
from mmljax.numerics import masked_logsumexp, masked_mean
from mmljax.types import PairMasks, Values

_CLOSEST = 1e-4  # squared distance under which proxies' energy grows no more


def nearest_proxy_separation_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, gamma: float, margin: float
) -> Values:
    """Push away the nearest proxies: ``log(1 + sum_N e^(g (s - m))) / g``.

    Between the mean of all cosines (``gamma`` to 0) and the hinge on the nearest alone (``gamma``
    to infinity). Relation: proxy to proxy.

    Source: own; the negative term of Multi-Similarity (arXiv 1904.06627) among proxies.
    Its limit is the inter-class term of RegularFace (Zhao et al. 2019, CVPR) with a margin.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
      gamma: sharpness.
      margin: cosine from which proxies count as near.
    """
    s = promote(similarity)
    return _all_valid(masked_logsumexp(gamma * (s - margin), masks.negative, add_one=True) / gamma)


def soft_orthogonality_loss(similarity: Float[Array, "n m"], masks: PairMasks) -> Values:
    """Soft orthogonality: ``sum_N s^2``, whose mean is ``||P P^T - I||_F^2 / C``.

    Relation: proxy to proxy. Nearly flat where there are many more proxies than dimensions:
    random ones are already close to its minimum.

    Source: Saberi-Movahed et al. 2023, arXiv 2306.13055; Bansal et al. 2018, arXiv 1810.09102.
    Deviations: divided by the number of proxies; centres of the same class are exempt.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
    """
    s = promote(similarity)
    return _all_valid(jnp.sum(jnp.where(masks.negative, s * s, 0), axis=-1))


def hyperspherical_energy_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, power: float
) -> Values:
    """Minimum hyperspherical energy: the mean over ``N`` of ``D^-power``, or of ``-log D`` for 0.

    Relation: proxy to proxy. ``D^2 = 2 - 2 s`` has the floor 1e-4, under which the energy is
    constant: coincident proxies cost much, and nothing is infinite.

    Source: Liu et al. 2018, arXiv 1805.09298, eq. 1, divided by the number of pairs.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
      power: the paper's s, of which it studies 0, 1 and 2; a Python number, at least 0.
    """
    squared = jnp.maximum(2 - 2 * promote(similarity), _CLOSEST)
    energy = -jnp.log(squared) / 2 if power == 0 else squared ** (-power / 2)
    return _all_valid(masked_mean(Values(energy, masks.negative)))


def soft_triple_regularizer(similarity: Float[Array, "n m"], masks: PairMasks) -> Values:
    """Merge superfluous centres: half the mean Euclidean distance over the positives.

    Relation: proxy to proxy, looking at the centres of the same class only. Valid: proxies whose
    class has another centre. Part of SoftTriple beside
    :func:`mmljax.losses.proxy.soft_triple_loss`; it does not separate classes.

    Source: Qian et al. 2019, arXiv 1909.05235: ``sum D / (C K (K - 1))`` over the pairs
    of centres of each class. Deviation: exact and safe at coincident centres, where the authors'
    code adds 1e-5 under the root.

    Args:
      similarity: proxies by proxies.
      masks: of the same shape.
    """
    distance = chord_distance(promote(similarity))
    valid = jnp.any(masks.positive, axis=-1)
    return Values(masked_mean(Values(distance, masks.positive)) / 2, valid)


def _all_valid(value: Float[Array, " n"]) -> Values:
    return Values(value, jnp.ones_like(value, bool))

"""Objectives between proxies (learned class representatives) and samples.

All are pure functions of a block of cosine similarities of **unit** embeddings and proxies, with
the contract of :mod:`mmljax.losses.pair`. Two relations occur:

* proxy to sample (:func:`proxy_anchor_loss`): rows are proxies, columns samples, and a
  positive is a sample of the proxy's class;
* sample to proxy (the softmax family): rows are samples, columns all proxies, positive is the
  own class's proxy, negative every other real proxy; padding is in neither mask.

The softmax family takes several positive columns too: their exponentials are summed.

>>> import jax.numpy as jnp
>>> from mmljax.types import PairMasks
>>> similarity = jnp.array([[0.9, 0.1]])  # a sample, its proxy, another proxy
>>> masks = PairMasks(jnp.array([[True, False]]), jnp.array([[False, True]]))
>>> value, _ = cosface_loss(similarity, masks, scale=2.0, margin=0.3)
>>> bool(jnp.allclose(value[0], jnp.log(1 + jnp.exp(2.0 * (0.1 - (0.9 - 0.3))))))
True
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmljax.errors import UserError
from mmljax.losses.blocks import promote
from mmljax.numerics import masked_logsumexp
from mmljax.types import PairMasks, Values


def proxy_anchor_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, alpha: float, margin: float
) -> Values:
    """Proxy-Anchor, two terms of their own means, stacked: ``[2, n]``.

    Term 0, ``log(1 + sum_P e^(-a (s - m)))``, valid for proxies with a positive in the batch;
    term 1, ``log(1 + sum_N e^(a (s + m)))``, valid for every proxy. The loss is the sum of the
    two means. Relation: proxy to sample.

    Source: Kim et al. 2020, arXiv 2003.13911, eq. 4.

    Args:
      similarity: proxies by samples.
      masks: of the same shape.
      alpha: sharpness.
      margin: ``m``, in cosine.
    """
    s = promote(similarity)
    attraction = masked_logsumexp(-alpha * (s - margin), masks.positive, add_one=True)
    repulsion = masked_logsumexp(alpha * (s + margin), masks.negative, add_one=True)
    present = jnp.any(masks.positive, axis=-1)
    return Values(jnp.stack([attraction, repulsion]), jnp.stack([present, jnp.ones_like(present)]))


def proxy_nca_pp_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, temperature: float
) -> Values:
    """ProxyNCA++: softmax cross-entropy over ``-D^2 / t`` with ``D^2 = 2 - 2 s``.

    Relation: sample to proxy. Valid: samples with a proxy of their own.

    Source: Teh, DeVries, Taylor 2020, arXiv 2004.01113. The authors' code scales both
    sides by 3 instead, which is ``t = 1/9``. Since ``D^2`` is affine in ``s``, this is
    :func:`normalized_softmax_loss` at half the temperature.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      temperature: ``t``, in squared distance.
    """
    return _cross_entropy((2 * promote(similarity) - 2) / temperature, masks)


def normalized_softmax_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, temperature: float
) -> Values:
    """Normalised softmax: cross-entropy over ``s / t``.

    Relation: sample to proxy. Valid: samples with a proxy of their own.

    Source: Zhai and Wu 2019, arXiv 1811.12649.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      temperature: ``t``, in cosine.
    """
    return _cross_entropy(promote(similarity) / temperature, masks)


def cosface_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, scale: float, margin: float
) -> Values:
    """CosFace: cross-entropy over ``scale * s``, with ``scale * (s - margin)`` for the own proxy.

    Relation: sample to proxy. Valid: samples with a proxy of their own.

    Source: Wang et al. 2018, arXiv 1801.09414, eq. 4.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature.
      margin: in cosine.
    """
    s = promote(similarity)
    return _cross_entropy(scale * jnp.where(masks.positive, s - margin, s), masks)


def arcface_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, scale: float, margin: float
) -> Values:
    """ArcFace: cross-entropy over ``scale * s``, ``scale * cos(angle + margin)`` for the own proxy.

    Beyond ``angle = pi - margin``, where the cosine of the sum would rise again, the own logit
    is ``scale * (s - margin * sin(margin))``: a step down, then falling on. The sum is expanded,
    ``cos a cos m - sin a sin m``, so no arccosine is taken; ``sin^2 a`` has the floor
    ``eps`` of the dtype, so the gradient is finite at ``s = 1`` and ``s = -1``.
    Relation: sample to proxy. Valid: samples with a proxy of their own.

    Source: Deng et al. 2019, arXiv 1801.07698, eq. 3; the part beyond ``pi - margin`` is the
    authors' code's.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature.
      margin: angle in radians.
    """
    s = promote(similarity)
    sine = jnp.sqrt(jnp.maximum(1 - s * s, jnp.finfo(s.dtype).eps))
    shifted = jnp.where(
        s > -math.cos(margin),
        s * math.cos(margin) - sine * math.sin(margin),
        s - margin * math.sin(margin),
    )
    return _cross_entropy(scale * jnp.where(masks.positive, shifted, s), masks)


def subcenter_arcface_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    scale: float,
    margin: float,
    centers: int,
) -> Values:
    """ArcFace on the nearest of each class's several proxies.

    Relation: sample to proxy; columns come in contiguous groups of ``centers``, one group per
    class. Valid: samples with a proxy of their own.

    Source: Deng et al. 2020 (ECCV, sub-center ArcFace).

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature.
      margin: angle in radians.
      centers: proxies per class.

    Raises:
      UserError: if the columns do not divide into groups of ``centers``.
    """
    s, kept, classes = _grouped(promote(similarity), masks, centers)
    nearest = jnp.max(jnp.where(kept, s, -jnp.inf), axis=-1)
    nearest = jnp.where(jnp.any(kept, axis=-1), nearest, 0)
    return arcface_loss(nearest, classes, scale=scale, margin=margin)


def soft_triple_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    scale: float,
    gamma: float,
    margin: float,
    centers: int,
) -> Values:
    """SoftTriple: CosFace on ``S = sum_k softmax_k(s_k / gamma) s_k`` over each class's proxies.

    Relation: sample to proxy; columns come in contiguous groups of ``centers``, one group per
    class. Valid: samples with a proxy of their own. The term that merges a class's centres is
    :func:`mmljax.losses.separation.soft_triple_regularizer`.

    Source: Qian et al. 2019, arXiv 1909.05235.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature, the paper's lambda.
      gamma: temperature among the centres of a class.
      margin: in cosine, the paper's delta.
      centers: proxies per class, the paper's K.

    Raises:
      UserError: if the columns do not divide into groups of ``centers``.
    """
    s, kept, classes = _grouped(promote(similarity), masks, centers)
    lowest = jnp.finfo(s.dtype).min
    weights = jax.nn.softmax(jnp.where(kept, s / gamma, lowest), axis=-1)
    relaxed = jnp.sum(jnp.where(kept, weights * s, 0), axis=-1)
    return cosface_loss(relaxed, classes, scale=scale, margin=margin)


def _cross_entropy(logits: Float[Array, "n m"], masks: PairMasks) -> Values:
    """``-log(sum_P e^z / sum_(P and N) e^z)``, as a softplus so that small losses keep digits."""
    own = masked_logsumexp(logits, masks.positive)
    others = masked_logsumexp(logits, masks.negative)
    valid = jnp.any(masks.positive, axis=-1)
    both = valid & jnp.any(masks.negative, axis=-1)
    return Values(jnp.where(both, jax.nn.softplus(others - own), 0), valid)


def _grouped(
    s: Float[Array, "n m"], masks: PairMasks, centers: int
) -> tuple[Float[Array, "n classes centers"], Bool[Array, "n classes centers"], PairMasks]:
    """Split columns into classes: similarities, which centres play a part, masks of classes."""
    rows, columns = s.shape
    if centers < 1 or columns % centers:
        raise UserError(
            f"centers={centers}: the {columns} proxies are not whole groups of {centers}; "
            "give every class, padding included, that many proxies"
        )
    shape = (rows, columns // centers, centers)
    positive, negative = (mask.reshape(shape) for mask in masks)
    classes = PairMasks(jnp.any(positive, axis=-1), jnp.any(negative, axis=-1))
    return s.reshape(shape), positive | negative, classes

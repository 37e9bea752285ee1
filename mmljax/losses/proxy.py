"""Proxy losses on a block of similarities between proxies (learned class vectors) and samples.

``loss(similarity, masks, *, ...) -> Values``, with the notation of :mod:`mmljax.losses.pair`, for
**unit** embeddings and proxies. There are two relations:

* proxy to sample (:func:`proxy_anchor_loss`): rows are proxies, columns samples, and a
  positive is a sample of the proxy's class;
* sample to proxy (the softmax family): rows are samples, columns all proxies; the proxy of the
  sample's class is the positive, every other real proxy a negative, padding neither.

The softmax family is ``-log(sum_P e^z / sum_(P and N) e^z)`` over logits ``z``, computed as a
softplus so that small losses keep their digits. Several positive columns are summed.

>>> import jax.numpy as jnp
>>> from mmljax.types import PairMasks
>>> similarity = jnp.array([[0.9, 0.1]])  # a sample, its proxy, another proxy
>>> masks = PairMasks(jnp.array([[True, False]]), jnp.array([[False, True]]))
>>> value, _ = cosface_loss(similarity, masks, scale=2.0, margin=0.3)
>>> bool(jnp.allclose(value[0], jnp.log(1 + jnp.exp(2.0 * (0.1 - (0.9 - 0.3))))))
True
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmljax.errors import UserError
from mmljax.numerics import masked_logsumexp, promote
from mmljax.types import PairMasks, Values


def proxy_anchor_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, alpha: float = 32.0, margin: float = 0.1
) -> Values:
    """Proxy-Anchor: ``log(1 + sum_P e^(-a (s - m)))`` and ``log(1 + sum_N e^(a (s + m)))``.

    The first term is averaged over the proxies with a positive in the batch, the second over all
    proxies; the loss is the sum of the two means. Relation: proxy to sample.
    Use: the default proxy loss.

    Source: Kim et al. 2020, arXiv 2003.13911, eq. 4.

    Args:
      similarity: proxies by samples.
      masks: of the same shape.
      alpha: sharpness ``a``; default of the paper.
      margin: ``m``, in cosine; default of the paper.

    Returns:
      The two terms, stacked: ``[2, n]``.
    """
    s = promote(similarity)
    bound = alpha * (1 + margin)
    attraction = masked_logsumexp(-alpha * (s - margin), masks.positive, add_one=True, bound=bound)
    repulsion = masked_logsumexp(alpha * (s + margin), masks.negative, add_one=True, bound=bound)
    present = jnp.any(masks.positive, axis=-1)
    return Values(jnp.stack([attraction, repulsion]), jnp.stack([present, jnp.ones_like(present)]))


def proxy_nca_pp_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, temperature: float = 1 / 9
) -> Values:
    """ProxyNCA++: softmax cross-entropy over ``-D^2 / t`` with ``D^2 = 2 - 2 s``.

    Relation: sample to proxy. Mean over the samples whose class has a proxy.

    Since ``D^2`` is affine in ``s``, this is ``normalized_softmax`` at half the temperature.

    Source: Teh, DeVries, Taylor 2020, arXiv 2004.01113.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      temperature: ``t``, in squared distance; default of the authors' code, which scales both
        sides by 3 instead.
    """
    return _cross_entropy((2 * promote(similarity) - 2) / temperature, masks)


def normalized_softmax_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, temperature: float = 0.05
) -> Values:
    """Normalised softmax: cross-entropy over ``s / t``.

    Relation: sample to proxy. Mean over the samples whose class has a proxy.

    Use: the plain choice. A low temperature has no gradient once samples are on the right side
    of the proxies.

    Source: Zhai and Wu 2019, arXiv 1811.12649.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      temperature: ``t``, in cosine; default of the paper.
    """
    return _cross_entropy(promote(similarity) / temperature, masks)


def cosface_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    scale: float = 32.0,
    margin: float | Float[Array, "n 1"] = 0.25,
) -> Values:
    """CosFace: cross-entropy over ``scale * s``, with ``scale * (s - margin)`` for the own proxy.

    Relation: sample to proxy. Mean over the samples whose class has a proxy.

    Source: Wang et al. 2018, arXiv 1801.09414, eq. 4.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature. Default: Unicom's (arXiv 2304.05884, an ArcFace on In-Shop); the
        paper, on faces, has 64.
      margin: in cosine; a number, or one per row (per class in ``mmljax.losses``). Default:
        Unicom's; the paper has 0.35.
    """
    s = promote(similarity)
    own = s - jnp.asarray(margin, s.dtype)
    return _cross_entropy(scale * jnp.where(masks.positive, own, s), masks)


def arcface_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    scale: float = 32.0,
    margin: float | Float[Array, "n 1"] = 0.25,
) -> Values:
    """ArcFace: cross-entropy over ``scale * s``, ``scale * cos(angle + margin)`` for the own proxy.

    Beyond ``angle = pi - margin``, where the cosine of the sum would rise again, the own logit
    is ``scale * (s - margin * sin(margin))``, which keeps falling. The sum is expanded,
    ``cos a cos m - sin a sin m``, so no arccosine is computed; ``sin^2 a = 1 - s^2`` is at least
    ``eps`` of the dtype, so the gradient is finite at ``s = 1`` and ``s = -1``. In float32 the
    gradient's relative error is 1 % at 3e-3 radians and grows with the angle's inverse square.
    Relation: sample to proxy. Mean over the samples whose class has a proxy.

    Source: Deng et al. 2019, arXiv 1801.07698, eq. 3; beyond ``pi - margin`` the authors' code.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature. Default: Unicom's on In-Shop (arXiv 2304.05884); the paper, on
        faces, has 64.
      margin: angle in radians; a number, or one per row (per class in ``mmljax.losses``).
        Default: Unicom's on In-Shop; the paper has 0.5.
    """
    s = promote(similarity)
    sine = jnp.sqrt(jnp.maximum(1 - s * s, jnp.finfo(s.dtype).eps))
    angle = jnp.asarray(margin, s.dtype)
    shifted = jnp.where(
        s > -jnp.cos(angle),
        s * jnp.cos(angle) - sine * jnp.sin(angle),
        s - angle * jnp.sin(angle),
    )
    return _cross_entropy(scale * jnp.where(masks.positive, shifted, s), masks)


def subcenter_arcface_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    scale: float = 32.0,
    margin: float | Float[Array, "n 1"] = 0.25,
    centers: int,
) -> Values:
    """Sub-center ArcFace: ArcFace on the nearest of each class's several proxies.

    Relation: sample to proxy; proxies come in contiguous groups of ``centers``, one group per
    class. Mean over the samples whose class has a proxy.

    Use: classes with several modes (a garment worn and laid flat), noisy labels; with a margin per
    class, :func:`mmljax.losses.margins.dynamic_margins`, classes of very different sizes.

    Source: Deng et al. 2020 (ECCV, sub-center ArcFace).

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature. Default: Unicom's on In-Shop (arXiv 2304.05884); the paper, on
        faces, has 64.
      margin: angle in radians; a number, or one per row (per class in ``mmljax.losses``).
        Default: Unicom's on In-Shop; the paper has 0.5.
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
    scale: float = 20.0,
    gamma: float = 0.1,
    margin: float | Float[Array, "n 1"] = 0.01,
    centers: int,
) -> Values:
    """SoftTriple: CosFace on ``S = sum_k softmax_k(s_k / gamma) s_k`` over each class's proxies.

    Relation: sample to proxy; proxies come in contiguous groups of ``centers``, one group per
    class. Mean over the samples whose class has a proxy. The term that merges a class's
    centers is ``soft_triple_regularizer``.
    Use: classes with several modes (a garment worn and laid flat).

    Source: Qian et al. 2019, arXiv 1909.05235.

    Args:
      similarity: samples by proxies.
      masks: of the same shape.
      scale: inverse temperature, the paper's lambda; default of the paper.
      gamma: temperature among the centers of a class; default of the paper.
      margin: in cosine, the paper's delta; a number, or one per row (per class in
        ``mmljax.losses``); default of the paper.
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
    """Split columns into classes: similarities, which centers have an effect, masks of classes."""
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

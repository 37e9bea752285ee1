"""Pair losses on a block of similarities: sample to sample.

``loss(similarity, masks, *, ...) -> Values``. ``similarity`` holds the cosines of **unit**
embeddings: rows are the anchors, columns the references (the global batch, or the batch and a
memory). ``masks`` says which columns are positives and negatives of each row; a column in neither
(the anchor itself, padding, an unmined pair) has no effect. The result has one value per anchor
and says which anchors enter the mean. Half precision is computed in float32.

Notation: ``s`` similarity, ``P`` and ``N`` the positives and negatives of a row,
``[z]+ = max(0, z)``, ``D = sqrt(2 - 2 s)`` the Euclidean distance.

>>> import jax.numpy as jnp
>>> from mmljax.types import PairMasks
>>> similarity = jnp.array([[1.0, 0.7, 0.6, -0.5]])  # the anchor, a positive, two negatives
>>> masks = PairMasks(
...     positive=jnp.array([[False, True, False, False]]),
...     negative=jnp.array([[False, False, True, True]]),
... )
>>> value, valid = triplet_hard_loss(similarity, masks, margin=0.2)  # 0.2 + 0.6 - 0.7
>>> round(float(value[0]), 4), bool(valid[0])
(0.1, True)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmljax.losses.blocks import all_valid, any_column, chord_distance
from mmljax.numerics import masked_logsumexp, masked_mean, promote
from mmljax.types import PairMasks, Values


def multi_similarity_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    alpha: float = 2.0,
    beta: float = 40.0,
    base: float = 0.5,
) -> Values:
    """Multi-Similarity: ``log(1 + sum_P e^(-a (s - l))) / a + log(1 + sum_N e^(b (s - l))) / b``.

    Relation: sample to sample. Mean over all anchors, also those with no pair left after mining.
    Use: the default pair loss, made for mined pairs.

    Source: Wang et al. 2019, arXiv 1904.06627. Deviation: only the masks remove pairs. The
    authors' code also drops positives with ``s >= 1 - 1e-5``, duplicates among them, and skips an
    anchor without a mined positive or a mined negative.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      alpha: sharpness ``a`` over the positives; default of the authors' code and the paper.
      beta: sharpness ``b`` over the negatives; default of the authors' code (the paper has 50).
      base: the cosine ``l`` at which both sides push; default of the authors' code (the paper
        has 1).
    """
    s = promote(similarity)
    attraction = masked_logsumexp(
        -alpha * (s - base), masks.positive, add_one=True, bound=alpha * (1 + base)
    )
    repulsion = masked_logsumexp(
        beta * (s - base), masks.negative, add_one=True, bound=beta * (1 - base)
    )
    return all_valid(attraction / alpha + repulsion / beta)


def contrastive_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    *,
    positive_margin: float = 1.0,
    negative_margin: float = 0.5,
) -> Values:
    """Contrastive loss on cosines: ``sum_P [m_p - s]+ + sum_N [s - m_n]+``.

    Relation: sample to sample. Mean over all anchors.
    Use: with a large memory, where its constant gradient per pair is an advantage.

    Source: Hadsell, Chopra, LeCun 2006 (CVPR), eq. 4, with cosines for distances and no square,
    as in Wang et al. 2020 (cross-batch memory, arXiv 1912.06798). Deviation from the code of
    the latter: the margin is subtracted from the negatives, so the hinge is continuous.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      positive_margin: ``m_p``, positives at least this similar cost nothing; default of the
        cross-batch memory's code.
      negative_margin: ``m_n``, negatives at most this similar cost nothing; default of the
        cross-batch memory's code.
    """
    s = promote(similarity)
    attraction = jnp.where(masks.positive, jax.nn.relu(positive_margin - s), 0)
    repulsion = jnp.where(masks.negative, jax.nn.relu(s - negative_margin), 0)
    return all_valid(jnp.sum(attraction + repulsion, axis=-1))


def triplet_hard_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, margin: float = 0.1
) -> Values:
    """Batch-hard triplet: ``[margin + max_N s - min_P s]+``.

    Relation: sample to sample. Mean over the anchors with a positive and a negative.
    Use: clean labels and a pretrained network; an untrained one can collapse.

    Source: Hermans, Beyer, Leibe 2017, arXiv 1703.07737, eq. 5. Deviation: cosines for
    distances. Since ``D^2 = 2 - 2 s``, a margin here is half a margin of squared distances.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      margin: in cosine; the default is FaceNet's 0.2 in squared distance.
    """
    s = promote(similarity)
    farthest = jnp.min(jnp.where(masks.positive, s, jnp.inf), axis=-1)
    nearest = jnp.max(jnp.where(masks.negative, s, -jnp.inf), axis=-1)
    valid = any_column(masks.positive) & any_column(masks.negative)
    return Values(jnp.where(valid, jax.nn.relu(margin + nearest - farthest), 0), valid)


def triplet_semihard_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, margin: float = 0.1
) -> Values:
    """Semi-hard triplet: per positive the most similar negative that is less similar than it.

    The value is the mean of ``[margin + s_n - s_p]+`` over the positives that have such a
    negative. Relation: sample to sample. Mean over the anchors with such a positive.
    Time ``O(n m log m)``, memory ``O(n m)``.
    Use: the safe triplet loss for an untrained network.

    Source: Schroff, Kalenichenko, Philbin 2015 (FaceNet), arXiv 1503.03832, eq. 4. Deviations:
    cosines for squared distances (half the margin); the hardest semi-hard negative is taken,
    which the paper leaves open; a positive without one is left out, where TensorFlow Addons takes
    the farthest negative.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      margin: in cosine; the default is FaceNet's 0.2 in squared distance.
    """
    s = promote(similarity)
    ordered = _ordered_negatives(s, masks.negative)
    below = _count_below(ordered, s, side="left")
    semihard = masks.positive & (below > 0)
    negative = jnp.take_along_axis(ordered, jnp.maximum(below - 1, 0), axis=-1)
    hinge = jax.nn.relu(margin + negative - s)
    return Values(masked_mean(Values(hinge, semihard)), any_column(semihard))


def triplet_all_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, margin: float = 0.1
) -> Values:
    """All triplets: the mean of ``[margin + s_n - s_p]+`` over those triplets where it is not 0.

    Relation: sample to sample. Mean over the anchors with at least one violating triplet, however
    many they have. Sorted negatives and their partial sums replace the triplets: time
    ``O(n m log m)``, memory ``O(n m)``, so a memory of references costs little.
    Use: noisy labels.

    Source: Hermans, Beyer, Leibe 2017, arXiv 1703.07737, eq. 6 ("batch all", non-zero mean).
    Deviations: cosines for distances (a margin is half of one of squared distances); the mean
    runs over the triplets of each anchor, then over anchors.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      margin: in cosine; the default is FaceNet's 0.2 in squared distance.
    """
    s = promote(similarity)
    ordered = _ordered_negatives(s, masks.negative)
    kept = jnp.where(ordered == jnp.inf, 0, ordered)
    sums = jnp.pad(jax.lax.cumsum(kept, axis=1, reverse=True), ((0, 0), (0, 1)))
    start = _count_below(ordered, s - margin, side="right")
    violating = jnp.sum(masks.negative, axis=-1, keepdims=True, dtype=start.dtype) - start
    hinges = jnp.take_along_axis(sums, start, axis=-1) - violating.astype(s.dtype) * (s - margin)
    total = jnp.sum(jnp.where(masks.positive, hinges, 0), axis=-1)
    count = jnp.sum(jnp.where(masks.positive, violating, 0), axis=-1)
    valid = (count > 0) | jnp.isnan(total)
    return Values(total / jnp.maximum(count, 1).astype(s.dtype), valid)


def margin_loss(
    similarity: Float[Array, "n m"],
    masks: PairMasks,
    squared_distance: Float[Array, "n m"] | None = None,
    *,
    margin: float = 0.2,
    beta: float = 1.2,
) -> Values:
    """Margin: the mean of ``[margin + D_p - beta]+`` and ``[margin + beta - D_n]+`` that are not 0.

    Relation: sample to sample. Mean over the anchors with at least one pair that is not 0.
    Use: with distance-weighted mining; without, negatives outnumber positives in the mean.

    Source: Wu et al. 2017, arXiv 1706.07567. Deviations: ``beta`` is fixed; the mean over
    active pairs runs over those of each anchor, then over anchors.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      squared_distance: of the same shape, see :func:`mmljax.losses.blocks.distances_for`.
      margin: half-width of the band around ``beta``, a Euclidean distance; default of the paper.
      beta: the distance that separates positives from negatives; default is the paper's start.
    """
    distance = chord_distance(similarity, squared_distance)
    attraction = jnp.where(masks.positive, jax.nn.relu(margin + distance - beta), 0)
    repulsion = jnp.where(masks.negative, jax.nn.relu(margin + beta - distance), 0)
    hinge = attraction + repulsion
    active = hinge != 0  # a NaN counts as active, so it is not hidden
    return Values(masked_mean(Values(hinge, active)), any_column(active))


def circle_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, margin: float = 0.4, gamma: float = 80.0
) -> Values:
    """Circle: ``log(1 + sum_N e^(g w_n (s - m)) sum_P e^(-g w_p (s - 1 + m)))``.

    The weights ``w_n = [s + m]+`` and ``w_p = [1 + m - s]+`` are constants to the gradient.
    Relation: sample to sample. Mean over the anchors with a positive and a negative.
    Use: like Multi-Similarity, but positives and negatives share one softplus.

    Source: Sun et al. 2020, arXiv 2002.10857: the form with margins, its optima at
    ``1 + m`` and ``-m``.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      margin: relaxation ``m``; default of the paper for fine-grained retrieval.
      gamma: scale ``g``; default of the paper for fine-grained retrieval.
    """
    s = promote(similarity)
    weight_p = jax.lax.stop_gradient(jax.nn.relu(1 + margin - s))
    weight_n = jax.lax.stop_gradient(jax.nn.relu(s + margin))
    attraction = masked_logsumexp(-gamma * weight_p * (s - 1 + margin), masks.positive)
    repulsion = masked_logsumexp(gamma * weight_n * (s - margin), masks.negative)
    valid = any_column(masks.positive) & any_column(masks.negative)
    return Values(jnp.where(valid, jax.nn.softplus(attraction + repulsion), 0), valid)


def supcon_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, temperature: float = 0.1
) -> Values:
    """Supervised contrastive: ``-mean_P log(e^(s / t) / sum_(P and N) e^(s / t))``.

    Relation: sample to sample. Mean over the anchors with a positive. A column in neither mask
    is not in the denominator either.
    Use: large batches with several positives per anchor.

    Source: Khosla et al. 2020, arXiv 2004.11362, eq. 2 (the sum outside the log), with a mean
    over anchors for the sum.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      temperature: ``t``; default of the paper.
    """
    logits = promote(similarity) / temperature
    normalizer = masked_logsumexp(logits, masks.positive | masks.negative)
    valid = any_column(masks.positive)
    mean = masked_mean(Values(logits, masks.positive))
    return Values(jnp.where(valid, normalizer - mean, 0), valid)


def nt_xent_loss(
    similarity: Float[Array, "n m"], masks: PairMasks, *, temperature: float = 0.07
) -> Values:
    """NT-Xent: ``-mean_P log(e^(s_p / t) / (e^(s_p / t) + sum_N e^(s / t)))``.

    Relation: sample to sample. Mean over the anchors with a positive. Other positives are not in
    the denominator, unlike in ``supcon``.
    Use: two views per item.

    Source: Chen et al. 2020 (SimCLR), arXiv 2002.05709, eq. 1. Deviation: several positives per
    anchor are averaged, then anchors.

    Args:
      similarity: anchors by references.
      masks: of the same shape.
      temperature: ``t``; default of pytorch-metric-learning and of MoCo (arXiv 1911.05722).
    """
    logits = promote(similarity) / temperature
    repulsion = masked_logsumexp(logits, masks.negative)[:, None]
    pairs = jnp.where(any_column(masks.negative)[:, None], jax.nn.softplus(repulsion - logits), 0)
    return Values(masked_mean(Values(pairs, masks.positive)), any_column(masks.positive))


def _ordered_negatives(s: Float[Array, "n m"], negative: Bool[Array, "n m"]) -> Float[Array, "n m"]:
    """Each row's negatives in rising order, then infinities."""
    return jnp.sort(jnp.where(negative, s, jnp.inf), axis=-1)


def _count_below(
    ordered: Float[Array, "n m"], threshold: Float[Array, "n m"], *, side: str
) -> Int[Array, "n m"]:
    """Count the ordered values of a row below each threshold (``right``: or equal to it)."""
    count = jax.vmap(functools.partial(jnp.searchsorted, side=side))
    return count(jax.lax.stop_gradient(ordered), jax.lax.stop_gradient(threshold))

"""Miners select the pairs that an objective uses: masks in, masks with fewer pairs out.

``miner(views, masks, *, ...) -> masks``. Shapes are static, so a step is compiled once, whatever
share of the pairs is kept. Masks carry no gradient.

Dual-relation mining. For anchor ``i`` and candidate ``j`` there are two views of their similarity:
``s_ij = x_i . x_j`` and, through the proxy of the anchor's class, ``t_ij = p_{y_i} . x_j`` (of
several proxies per class, the one nearest to the anchor). In a view ``z`` Multi-Similarity mining
(Wang et al. 2019, arXiv 1904.06627, eq. 8 and 9) with margin ``e`` keeps

    negative j  iff  z_ij + e > min over positives k of z_ik,
    positive j  iff  z_ij - e < max over negatives k of z_ik,

the extrema over the unmined sets. Lee and Roh (CVPRW 2020) state that both relations are used, and
give no rule; the rules ``proxy``, ``either``, ``both`` and ``blend`` are this project's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmljax.types import PairMasks, Points, Views


def pair_masks(rows: Points, columns: Points, *, same_kind: bool) -> PairMasks:
    """Positives share the row's label, negatives do not; padding is neither.

    Args:
      rows: ``n`` points.
      columns: ``m`` points.
      same_kind: whether rows and columns are of one kind (samples and samples, proxies and
        proxies), so that an equal position means the point itself, which is then in neither mask.
        Positions decide this, never similarity: an exact duplicate stays a pair.
    """
    both = rows.valid[:, None] & columns.valid[None, :]
    if same_kind:
        both &= rows.positions[:, None] != columns.positions[None, :]
    same = rows.labels[:, None] == columns.labels[None, :]
    return PairMasks(positive=both & same, negative=both & ~same)


def _select(
    similarity: Float[Array, "b r"],
    masks: PairMasks,
    *,
    margin: float,
    anchor: Float[Array, " b"] | None = None,
) -> PairMasks:
    """Multi-Similarity mining in one view; ``anchor`` joins the minimum over positives."""
    lowest_positive = jnp.min(jnp.where(masks.positive, similarity, jnp.inf), axis=1)
    if anchor is not None:
        lowest_positive = jnp.minimum(lowest_positive, anchor)
    highest_negative = jnp.max(jnp.where(masks.negative, similarity, -jnp.inf), axis=1)
    return PairMasks(
        positive=masks.positive & (similarity - margin < highest_negative[:, None]),
        negative=masks.negative & (similarity + margin > lowest_positive[:, None]),
    )


def sample_miner(views: Views, masks: PairMasks, *, margin: float = 0.1) -> PairMasks:
    """Keep the pairs that Multi-Similarity mining keeps in the view of the anchor itself.

    Source: Wang et al. 2019, arXiv 1904.06627, eq. 8 and 9.
    Use: to reproduce Multi-Similarity.

    Args:
      views: the two views; only ``sample`` is used.
      masks: all pairs.
      margin: in cosine; 0.1 in the authors' code.
    """
    return _select(jax.lax.stop_gradient(views.sample), masks, margin=margin)


def proxy_miner(views: Views, masks: PairMasks, *, margin: float = 0.1) -> PairMasks:
    """Keep the pairs that Multi-Similarity mining keeps in the view of the anchor's class proxy.

    The anchor itself counts among the positives when their minimum is taken. Source: this
    project's reading of Lee and Roh (CVPRW 2020), which names the relation and gives no rule.
    Use: noisy anchors; the proxy stands for many of them.

    Args:
      views: the two views; ``proxy`` and ``anchor`` are used.
      masks: all pairs.
      margin: in cosine.
    """
    proxy, anchor = jax.lax.stop_gradient((views.proxy, views.anchor))
    return _select(proxy, masks, margin=margin, anchor=anchor)


def either_miner(views: Views, masks: PairMasks, *, margin: float = 0.1) -> PairMasks:
    """Keep the pairs that at least one of the rules ``sample`` and ``proxy`` keeps.

    Source: this project.
    Use: the default, with a wide margin.

    Args:
      views: the two views.
      masks: all pairs.
      margin: in cosine, of both views.
    """
    a = sample_miner(views, masks, margin=margin)
    b = proxy_miner(views, masks, margin=margin)
    return PairMasks(a.positive | b.positive, a.negative | b.negative)


def both_miner(views: Views, masks: PairMasks, *, margin: float = 0.1) -> PairMasks:
    """Keep the pairs that both rules, ``sample`` and ``proxy``, keep.

    Source: this project.
    Use: few pairs, all of them hard.

    Args:
      views: the two views.
      masks: all pairs.
      margin: in cosine, of both views.
    """
    a = sample_miner(views, masks, margin=margin)
    b = proxy_miner(views, masks, margin=margin)
    return PairMasks(a.positive & b.positive, a.negative & b.negative)


def blend_miner(
    views: Views, masks: PairMasks, *, margin: float = 0.1, blend: float = 0.5
) -> PairMasks:
    """Keep the pairs that Multi-Similarity mining keeps in ``blend * s + (1 - blend) * t``.

    The anchor counts among the positives, with ``s = 1``. Source: this project.

    Args:
      views: the two views.
      masks: all pairs.
      margin: in cosine.
      blend: share of the sample's view: 1 is close to the rule ``sample``, 0 is the rule
        ``proxy``.
    """
    sample, proxy, anchor = jax.lax.stop_gradient((views.sample, views.proxy, views.anchor))
    mixed = blend * sample + (1 - blend) * proxy
    return _select(mixed, masks, margin=margin, anchor=blend + (1 - blend) * anchor)


def hard_miner(views: Views, masks: PairMasks) -> PairMasks:
    """Keep the least similar positive and the most similar negative of each anchor.

    Ties are all kept. Source: batch-hard mining, Hermans et al. 2017, arXiv 1703.07737, eq. 5.

    Args:
      views: the two views; only ``sample`` is used.
      masks: all pairs.
    """
    s = jax.lax.stop_gradient(views.sample)
    lowest = jnp.min(jnp.where(masks.positive, s, jnp.inf), axis=1, keepdims=True)
    highest = jnp.max(jnp.where(masks.negative, s, -jnp.inf), axis=1, keepdims=True)
    return PairMasks(masks.positive & (s <= lowest), masks.negative & (s >= highest))


def semi_hard_miner(views: Views, masks: PairMasks, *, margin: float = 0.1) -> PairMasks:
    """Keep the columns that take part in a semi-hard pair of a positive and a negative.

    The pair (positive ``p``, negative ``n``) is semi-hard when ``s_in < s_ip < s_in + margin``.

    Source: Schroff et al. 2015, arXiv 1503.03832, eq. 4. Deviation: cosines for squared
    distances, so ``margin`` is half of the paper's (its 0.2 is 0.1 here).

    Args:
      views: the two views; only ``sample`` is used.
      masks: all pairs.
      margin: in cosine.
    """
    s = jax.lax.stop_gradient(views.sample)
    above = _nearest_above(s, s, masks.positive)  # of each column: the next positive above
    below = -_nearest_above(-s, -s, masks.negative)  # of each column: the next negative below
    return PairMasks(
        positive=masks.positive & (s - below < margin),
        negative=masks.negative & (above - s < margin),
    )


def _nearest_above(
    values: Float[Array, "b r"], targets: Float[Array, "b r"], mask: Bool[Array, "b r"]
) -> Float[Array, "b r"]:
    """For each value the least masked target strictly above it in its row; inf where none."""
    ordered = jnp.sort(jnp.where(mask, targets, jnp.inf), axis=1)
    place = jax.vmap(lambda row, v: jnp.searchsorted(row, v, side="right"))(ordered, values)
    padded = jnp.pad(ordered, ((0, 0), (0, 1)), constant_values=jnp.inf)
    return jnp.take_along_axis(padded, place, axis=1)


def distance_weighted_miner(
    views: Views, masks: PairMasks, *, dimension: int, nearest: float = 0.5
) -> PairMasks:
    """Keep every positive and draw as many negatives per anchor, evenly over distances.

    A negative at distance ``D`` is drawn with weight ``1 / q(D)``, ``log q(D) = (d - 2) log D +
    (d - 3) / 2 log(1 - D^2 / 4)``, where ``D`` is at least ``nearest``. Draws are without
    replacement (Gumbel top-k), which the paper leaves open, from one key per anchor, so they are
    the same on any number of devices.

    Source: Wu et al. 2017, arXiv 1706.07567, eq. 4.
    Use: with the loss ``margin``.

    Args:
      views: the two views; ``sample`` and ``keys`` are used.
      masks: all pairs.
      dimension: embedding size ``d``.
      nearest: smaller distances count as this one; 0.5 in the authors' code.
    """
    s = jax.lax.stop_gradient(views.sample)
    squared = jnp.clip(2 - 2 * s, nearest**2, 4 - 1e-4)
    log_weight = -((dimension - 2) / 2 * jnp.log(squared)) - (dimension - 3) / 2 * jnp.log(
        1 - squared / 4
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, s.shape[1:], s.dtype))(views.keys)
    score = jnp.where(masks.negative, log_weight + noise, -jnp.inf)
    wanted = jnp.sum(masks.positive, axis=1)
    ordered = jnp.sort(score, axis=1, descending=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(wanted - 1, 0)[:, None], axis=1)
    drawn = masks.negative & (score >= least) & (wanted > 0)[:, None]
    return PairMasks(masks.positive, drawn)


def proxy_masks(kept: PairMasks, own: Bool[Array, "c b"], masks: PairMasks) -> PairMasks:
    """Select the samples of each proxy from the selections of its class's anchors.

    A sample counts against a proxy if some anchor of the proxy's class in the batch keeps it; a
    proxy without an anchor in the batch keeps nothing. The anchor's own column is its proxy's
    positive whenever the anchor keeps any pair at all.

    Args:
      kept: the anchors' selection, ``[b r]``, ``b`` running over the global batch, whose columns
        come first among the ``r``.
      own: whether an anchor is of the proxy's class.
      masks: unmined masks of proxies and samples, ``[c r]``.
    """
    count = own.astype(jnp.float32)
    anchors = own.shape[1]
    positive = count @ kept.positive.astype(jnp.float32) > 0
    negative = count @ kept.negative.astype(jnp.float32) > 0
    active = jnp.any(kept.positive | kept.negative, axis=1)
    itself = jnp.pad(own & active[None, :], ((0, 0), (0, positive.shape[1] - anchors)))
    return PairMasks(masks.positive & (positive | itself), masks.negative & negative)

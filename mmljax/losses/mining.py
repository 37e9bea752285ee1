"""Which pairs an objective sees: masks in, smaller masks out, static shapes throughout.

The dual relation. For anchor ``i`` and candidate ``j`` there are two views of their similarity:
``s_ij = x_i . x_j`` and, through the proxy of the anchor's class, ``t_ij = p_{y_i} . x_j``. In a
view ``z`` the rule of Multi-Similarity mining (Wang et al. 2019, arXiv 1904.06627, eq. 8 and 9)
with margin ``e`` keeps

    negative j  iff  z_ij + e > min over positives k of z_ik,
    positive j  iff  z_ij - e < max over negatives k of z_ik,

the extrema over the unmined sets. The paper of Lee and Roh (CVPRW 2020) says that both relations
are looked at and not how; the rules ``either``, ``both`` and ``blend`` are this project's.

Masks and selections carry no gradient.
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
        Identity is told by position, never by similarity: an exact duplicate stays a pair.
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


def sample_miner(views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
    """The single anchor's view: Multi-Similarity mining as published. ``blend`` is not used."""
    del blend
    return _select(jax.lax.stop_gradient(views.sample), masks, margin=margin)


def proxy_miner(views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
    """The view through the anchor's proxy; the anchor itself counts among the positives."""
    del blend
    proxy, anchor = jax.lax.stop_gradient((views.proxy, views.anchor))
    return _select(proxy, masks, margin=margin, anchor=anchor)


def either_miner(views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
    """Pairs that at least one of the two views keeps."""
    a = sample_miner(views, masks, margin=margin, blend=blend)
    b = proxy_miner(views, masks, margin=margin, blend=blend)
    return PairMasks(a.positive | b.positive, a.negative | b.negative)


def both_miner(views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
    """Pairs that both views keep."""
    a = sample_miner(views, masks, margin=margin, blend=blend)
    b = proxy_miner(views, masks, margin=margin, blend=blend)
    return PairMasks(a.positive & b.positive, a.negative & b.negative)


def blend_miner(views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
    """One relation ``blend * s + (1 - blend) * t``; of the anchor itself, whose ``s`` is 1, too."""
    sample, proxy, anchor = jax.lax.stop_gradient((views.sample, views.proxy, views.anchor))
    mixed = blend * sample + (1 - blend) * proxy
    return _select(mixed, masks, margin=margin, anchor=blend + (1 - blend) * anchor)


def hard_miner(views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
    """The least similar positive and the most similar negative of each anchor, ties all kept.

    Batch-hard mining (Hermans et al. 2017, arXiv 1703.07737, eq. 5) as masks. ``margin`` and
    ``blend`` are not used.
    """
    del margin, blend
    s = jax.lax.stop_gradient(views.sample)
    lowest = jnp.min(jnp.where(masks.positive, s, jnp.inf), axis=1, keepdims=True)
    highest = jnp.max(jnp.where(masks.negative, s, -jnp.inf), axis=1, keepdims=True)
    return PairMasks(masks.positive & (s <= lowest), masks.negative & (s >= highest))


def semi_hard_miner(views: Views, masks: PairMasks, *, margin: float, blend: float) -> PairMasks:
    """Negatives inside the margin of some positive but below it, and those positives.

    A pair (positive ``p``, negative ``n``) is semi-hard when ``s_in < s_ip < s_in + margin``
    (Schroff et al. 2015, arXiv 1503.03832, eq. 4, there in squared distances: on the unit sphere
    ``margin`` in similarity is half of that in squared distance). A column is kept when it is
    part of at least one such pair, so each keeps its own nearest counterpart. ``blend`` is not
    used.
    """
    del blend
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
    views: Views,
    masks: PairMasks,
    *,
    margin: float,
    blend: float,
    dimension: int,
    nearest: float = 0.5,
) -> PairMasks:
    """As many negatives as positives per anchor, drawn so that distances come out uniform.

    Wu et al. 2017 (arXiv 1706.07567, eq. 4): a negative at distance ``D`` is drawn with weight
    ``1 / q(D)``, ``log q(D) = (d - 2) log D + (d - 3) / 2 log(1 - D^2 / 4)``, with ``D`` raised
    to at least ``nearest``. Drawn without replacement (Gumbel top-k), which the paper leaves
    open, from one key per anchor, so the draw is the same on any number of devices. ``margin``
    and ``blend`` are not used.

    Args:
      dimension: embedding size ``d``.
      nearest: distances below it are treated as it.
    """
    del margin, blend
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
    """Carry the anchors' selection over to proxies.

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

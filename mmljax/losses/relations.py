"""One objective on one block: masks, mining, loss, sums over rows.

An objective looks from rows to columns; both are samples or proxies. The functions here turn points
into masks, mine them, apply the loss and sum over the rows, for all rows at once or block by block
so that memory grows with the block and not with the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mmljax.losses.blocks import distances_for
from mmljax.losses.margins import row_margins
from mmljax.losses.mining import pair_masks, proxy_masks
from mmljax.losses.prefixes import prefix_blocks
from mmljax.numerics import masked_sum, similarity_matrix
from mmljax.types import BoundObjective, PairMasks, Points, Values, Views

SAMPLES, PROXIES = "samples", "proxies"

RELATIONS = {  # relation: (rows, columns)
    "sample_to_sample": (SAMPLES, SAMPLES),
    "proxy_to_sample": (PROXIES, SAMPLES),
    "sample_to_proxy": (SAMPLES, PROXIES),
    "proxy_to_proxy": (PROXIES, PROXIES),
}


class Context(NamedTuple):
    """What an objective needs besides rows and columns: constants without a gradient.

    ``partners`` and ``kept`` have an entry for each size of the embeddings' prefixes.
    """

    partners: Sequence[Float[Array, "n _"]]  # of an anchor: its class's nearest proxy
    keys: PRNGKeyArray  # [n]: one per row
    kept: Sequence[PairMasks]  # [B m]: the anchors' selection, for mined proxy objectives
    anchor_labels: Array  # [B]
    margin: Float[Array, "*classes"] | None = None  # in place of the one bound to the loss


class Kept(NamedTuple):
    """Numbers of pairs before and after mining, at each of ``s`` sizes."""

    positive: Float[Array, " s"]
    negative: Float[Array, " s"]
    all_positive: Float[Array, " s"]
    all_negative: Float[Array, " s"]


def nearest_class_proxies(
    vectors: Float[Array, "n d"], own: Float[Array, "n k d"]
) -> Float[Array, "n d"]:
    """The proxy most similar to each sample among the ``k`` of its class."""
    similarity = jnp.einsum("nd,nkd->nk", vectors, own, precision="highest")
    best = jnp.argmax(similarity, axis=1)
    return jnp.take_along_axis(own, best[:, None, None], axis=1)[:, 0]


def mined_masks(
    objective: BoundObjective,
    similarity: Float[Array, "n m"],
    rows: Points,
    columns: Points,
    context: Context,
    *,
    place: int = 0,
) -> tuple[PairMasks, PairMasks]:
    """The masks of an objective's block, unmined and mined.

    Args:
      objective: whose miner selects.
      similarity: of rows and columns.
      rows: at the size of the block.
      columns: the same.
      context: of all sizes.
      place: of the block's size among them.
    """
    row_kind, column_kind = RELATIONS[objective.relation]
    masks = pair_masks(rows, columns, same_kind=row_kind == column_kind)
    if objective.miner is None:
        return masks, masks
    if row_kind == PROXIES:
        own = rows.labels[:, None] == context.anchor_labels[None, :]
        return masks, proxy_masks(context.kept[place], own & rows.valid[:, None], masks)
    partners = context.partners[place]
    views = Views(
        sample=similarity,
        proxy=similarity_matrix(partners, columns.vectors),
        anchor=jnp.sum(partners * rows.vectors, axis=1),
        keys=context.keys,
    )
    size = {}  # in place of the one that is bound
    if "dimension" in inspect.signature(objective.miner).parameters:
        size = {"dimension": rows.vectors.shape[1]}
    return masks, objective.miner(jax.lax.stop_gradient(views), masks, **size)


def objective_sums(
    objective: BoundObjective,
    rows: Points,
    columns: Points,
    context: Context,
    *,
    row_block: int,
    sizes: Sequence[int] = (),
) -> tuple[Float[Array, "s terms"], tuple[Float[Array, "s terms"], Kept]]:
    """Sums of an objective's terms over its rows, with the counts that they are divided by.

    Args:
      objective: what to compute.
      rows: ``n`` points.
      columns: ``m`` points.
      context: for mining, and the margin.
      row_block: rows of similarities held at once, recomputed on the way back; 0 for all.
      sizes: of the vectors' prefixes on which the objective is computed, ascending
        (:mod:`mmljax.losses.prefixes`); the whole vectors if empty.

    Returns:
      ``(sums, (counts, kept))``; the objective's value at a size over all devices is
      ``sum over terms of psum(sums) / psum(counts)``.
    """
    sizes = sizes or (rows.vectors.shape[1],)

    def block(rows: Points, context: Context) -> tuple[Array, tuple[Array, Kept]]:
        margin = {}
        if context.margin is not None:
            margin = {"margin": row_margins(context.margin, rows.labels)}
        found = []
        for place, (own, others, similarity) in enumerate(prefix_blocks(rows, columns, sizes)):
            masks, mined = mined_masks(objective, similarity, own, others, context, place=place)
            distances = distances_for(objective.loss, own.vectors, others.vectors)
            value, valid = objective.loss(similarity, mined, *distances, **margin)
            sums, counts = masked_sum(Values(value, valid & rows.valid))
            kept = Kept(*(_count(m) for m in (*mined, *masks)))
            found.append((sums.reshape(-1), (counts.reshape(-1), kept)))
        return jax.tree.map(lambda *of_sizes: jnp.stack(of_sizes), *found)

    n = rows.labels.shape[0]
    if row_block == 0 or n <= row_block:
        return block(rows, context)
    blocks = -(-n // row_block)

    def split(x: Array) -> Array:
        padding = [(0, blocks * row_block - n)] + [(0, 0)] * (x.ndim - 1)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.concatenate([x, x[: padding[0][1]]]).reshape(blocks, row_block)
        return jnp.pad(x, padding).reshape(blocks, row_block, *x.shape[1:])

    # The context of anchors is split with them; proxies as rows have no such context.
    anchors = RELATIONS[objective.relation][0] == SAMPLES
    split_context: Any = (context.partners, context.keys) if anchors else None
    row_blocks = jax.tree.map(split, (rows, split_context))

    @jax.checkpoint
    def one(xs: tuple[Points, Any]) -> tuple[Array, tuple[Array, Kept]]:
        block_rows, own = xs
        return block(block_rows, context._replace(partners=own[0], keys=own[1]) if own else context)

    # Padding rows are not valid, so they add to no sum and no count.
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(one, row_blocks))


def _count(mask: Bool[Array, "n m"]) -> Float[Array, ""]:
    # Counts per column in 16 bits: a float per entry would fill and read four times the mask.
    narrow = jnp.uint16 if mask.shape[0] < 2**16 else jnp.uint32
    return jnp.sum(jnp.sum(mask, axis=0, dtype=narrow), dtype=jnp.float32)

"""Miners select the pairs that a loss uses.

A miner takes embeddings, labels and, where its rule looks through the class proxies, proxies. It
returns :class:`~mmljax.types.PairMasks`, which every pair loss accepts as ``pairs=``. No gradient
flows through a selection, and shapes are static, so a step is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mmljax.losses import mining
from mmljax.losses.public import (
    CLASS_LABELS,
    EMBEDDINGS,
    EXAMPLE_PROXIES,
    EXAMPLE_SAMPLES,
    LABELS,
    PROXIES,
    REFERENCES,
    class_labelled_points,
    example,
    proxy_points,
    publish,
    sample_block,
)
from mmljax.losses.relations import nearest_class_proxies
from mmljax.numerics import similarity_matrix
from mmljax.types import PairMasks, Points, Views

__all__ = [
    "all_pairs",
    "blend",
    "both",
    "distance_weighted",
    "either",
    "hard",
    "proxy",
    "sample",
    "semi_hard",
]


def _every_pair(views: Views, masks: PairMasks) -> PairMasks:
    """Keep every pair: positives share the anchor's label, negatives do not.

    An anchor makes no pair with itself; an exact duplicate of it does. Source: the pairs that
    the losses use where none are given.
    """
    del views
    return masks


def _mine(
    rule: Callable[..., PairMasks],
    embeddings: Float[Array, "n d"],
    labels: Int[Array, " n"],
    *,
    pairs: PairMasks | None = None,
    reference_embeddings: Float[Array, "m d"] | None = None,
    reference_labels: Int[Array, " m"] | None = None,
    **options: Any,
) -> PairMasks:
    rows, columns, masks = sample_block(
        embeddings, labels, pairs, reference_embeddings, reference_labels
    )
    return rule(_views(rows, columns), masks, **options)


def _mine_through_proxies(
    rule: Callable[..., PairMasks],
    embeddings: Float[Array, "n d"],
    labels: Int[Array, " n"],
    proxies: Float[Array, "p d"],
    *,
    centers: int = 1,
    pairs: PairMasks | None = None,
    reference_embeddings: Float[Array, "m d"] | None = None,
    reference_labels: Int[Array, " m"] | None = None,
    **options: Any,
) -> PairMasks:
    rows, columns, masks = sample_block(
        embeddings, labels, pairs, reference_embeddings, reference_labels
    )
    points = proxy_points(proxies, centers, size=rows.vectors.shape[1])
    by_class = points.vectors.reshape(-1, centers, rows.vectors.shape[1])
    anchors = class_labelled_points(embeddings, labels, classes=len(by_class))
    partners = nearest_class_proxies(rows.vectors, by_class[anchors.labels])
    views = _views(rows, columns)._replace(
        proxy=similarity_matrix(partners, columns.vectors),
        anchor=jnp.sum(partners * rows.vectors, axis=1),
    )
    return rule(views, masks, **options)


def _draw(
    rule: Callable[..., PairMasks],
    embeddings: Float[Array, "n d"],
    labels: Int[Array, " n"],
    *,
    key: PRNGKeyArray,
    pairs: PairMasks | None = None,
    reference_embeddings: Float[Array, "m d"] | None = None,
    reference_labels: Int[Array, " m"] | None = None,
    **options: Any,
) -> PairMasks:
    rows, columns, masks = sample_block(
        embeddings, labels, pairs, reference_embeddings, reference_labels
    )
    count, dimension = rows.vectors.shape
    views = _views(rows, columns)._replace(keys=jax.random.split(key, count))
    return rule(views, masks, dimension=dimension, **options)


def _views(rows: Points, columns: Points) -> Views:
    """The sample's view; the others are placeholders."""
    similarity = similarity_matrix(rows.vectors, columns.vectors)
    return Views(sample=similarity, proxy=similarity, anchor=similarity[:, 0], keys=rows.positions)


_NOTES = """\
``s_ij`` is the cosine of anchor ``i`` and reference ``j``, ``t_ij`` that of the proxy of the
anchor's class (of several, the one nearest to the anchor) and the reference."""
_ARGUMENTS = {
    "embeddings": EMBEDDINGS,
    "pairs": "``PairMasks`` of ``[n m]`` to select from. Default: every pair.",
    **REFERENCES,
}
_RETURNS = "Masks of ``[n m]``: the positives and negatives that are kept of each anchor."


def _example(call: str, kept: tuple[int, int], *lines: str) -> str:
    count = "int(pairs.positive.sum()), int(pairs.negative.sum())"
    code = (*EXAMPLE_SAMPLES, *lines, f"pairs = miners.{call}", count)
    return example("miners", *code, prints=str(kept))


_publish = partial(publish, module="mmljax.miners", notes=_NOTES, returns=_RETURNS)


def _of_samples(
    name: str, rule: Callable[..., PairMasks], kept: tuple[int, int]
) -> Callable[..., PairMasks]:
    return _publish(
        _mine,
        rule,
        name=name,
        arguments={**_ARGUMENTS, "labels": LABELS},
        example=_example(f"{name}(embeddings, labels)", kept),
    )


def _of_proxies(
    name: str, rule: Callable[..., PairMasks], kept: tuple[int, int]
) -> Callable[..., PairMasks]:
    return _publish(
        _mine_through_proxies,
        rule,
        name=name,
        arguments={
            **_ARGUMENTS,
            "labels": CLASS_LABELS,
            "proxies": PROXIES,
            "centers": "proxies per class.",
        },
        example=_example(f"{name}(embeddings, labels, proxies)", kept, EXAMPLE_PROXIES),
    )


all_pairs = _of_samples("all_pairs", _every_pair, (4, 8))
sample = _of_samples("sample", mining.sample_miner, (2, 3))
hard = _of_samples("hard", mining.hard_miner, (4, 4))
semi_hard = _of_samples("semi_hard", mining.semi_hard_miner, (2, 2))
proxy = _of_proxies("proxy", mining.proxy_miner, (1, 4))
either = _of_proxies("either", mining.either_miner, (2, 5))
both = _of_proxies("both", mining.both_miner, (1, 2))
blend = _of_proxies("blend", mining.blend_miner, (1, 2))
distance_weighted = _publish(
    _draw,
    mining.distance_weighted_miner,
    name="distance_weighted",
    arguments={
        **_ARGUMENTS,
        "labels": LABELS,
        "key": "``jax.random`` key; use another one at each step.",
    },
    example=_example(
        "distance_weighted(embeddings, labels, key=jax.random.key(0))", (4, 4), "import jax"
    ),
    hidden=("dimension",),
)

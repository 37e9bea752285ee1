"""Losses on embeddings, labels and proxies: one public function for each block loss.

A public function takes plain arrays, normalises them, forms the block of similarities and its
masks, and returns the mean of the block loss. Its keywords are the hyperparameters of the block
loss, and its docstring is that of the block loss with the public arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmljax.losses import pair, proxy, ranking, separation
from mmljax.losses.blocks import distances_for
from mmljax.losses.mining import pair_masks
from mmljax.losses.public import (
    CLASS_LABELS,
    EMBEDDINGS,
    LABELS,
    PROXIES,
    REFERENCES,
    class_labelled_points,
    proxy_points,
    publish,
    sample_block,
)
from mmljax.numerics import masked_mean, similarity_matrix
from mmljax.types import PairMasks, Points, Values

NOTATION = """\
``s`` is the cosine of {0} and {1}; ``P`` and ``N`` are the positives and negatives of {0};
``[z]+ = max(0, z)``; ``D`` is the Euclidean distance on the unit sphere. Half precision is
computed in float32."""


def _sample_loss(
    block: Callable[..., Values],
    embeddings: Float[Array, "n d"],
    labels: Int[Array, " n"],
    *,
    pairs: PairMasks | None = None,
    reference_embeddings: Float[Array, "m d"] | None = None,
    reference_labels: Int[Array, " m"] | None = None,
    **hyperparameters: Any,
) -> Float[Array, ""]:
    rows, columns, masks = sample_block(
        embeddings, labels, pairs, reference_embeddings, reference_labels
    )
    return _mean(block, rows, columns, masks, hyperparameters)


def _proxy_loss(
    block: Callable[..., Values],
    embeddings: Float[Array, "n d"],
    labels: Int[Array, " n"],
    proxies: Float[Array, "p d"],
    *,
    centers: int = 1,
    **hyperparameters: Any,
) -> Float[Array, ""]:
    classes = proxy_points(proxies, centers, size=jnp.shape(embeddings)[-1])
    count = classes.labels.shape[0] // centers
    samples = class_labelled_points(embeddings, labels, classes=count)
    rows, columns = samples, classes
    if block is proxy.proxy_anchor_loss:
        rows, columns = classes, samples
    if "centers" in inspect.signature(block).parameters:
        hyperparameters["centers"] = centers
    masks = pair_masks(rows, columns, same_kind=False)
    return _mean(block, rows, columns, masks, hyperparameters)


def _separation_loss(
    block: Callable[..., Values],
    proxies: Float[Array, "p d"],
    *,
    centers: int = 1,
    **hyperparameters: Any,
) -> Float[Array, ""]:
    points = proxy_points(proxies, centers)
    masks = pair_masks(points, points, same_kind=True)
    return _mean(block, points, points, masks, hyperparameters)


def _mean(
    block: Callable[..., Values],
    rows: Points,
    columns: Points,
    masks: PairMasks,
    hyperparameters: dict[str, Any],
) -> Float[Array, ""]:
    """The mean of each term over its valid rows, summed over the terms."""
    similarity = similarity_matrix(rows.vectors, columns.vectors)
    distances = distances_for(block, rows.vectors, columns.vectors)
    return jnp.sum(masked_mean(block(similarity, masks, *distances, **hyperparameters)))


def _example(call: str, value: str, *lines: str) -> str:
    return "\n".join(
        [
            ">>> import jax.numpy as jnp",
            ">>> from mmljax import losses",
            *(f">>> {line}" for line in lines),
            f">>> loss = losses.{call}",
            '>>> print(f"{loss:.3f}")',
            value,
        ]
    )


_SAMPLES = (
    "embeddings = jnp.array([[2.0, 0.4], [0.8, 0.5], [-0.3, 1.0], [0.5, 0.9]])",
    "labels = jnp.array([0, 0, 1, 1])",
)
_PROXIES = {
    1: "proxies = jnp.array([[1.0, 0.2], [0.4, 0.7]])",
    2: "proxies = jnp.array([[1.0, 0.2], [0.9, -0.3], [0.4, 0.8], [-0.2, 0.7]])",
}
_publish = partial(publish, module="mmljax.losses", returns="A scalar.")


def on_samples(name: str, block: Callable[..., Values], value: str) -> Callable[..., Array]:
    """Make the public form of a pair loss; ``value`` is what its example prints."""
    return _publish(
        _sample_loss,
        block,
        name=name,
        arguments={
            "embeddings": EMBEDDINGS,
            "labels": LABELS,
            "pairs": "``PairMasks`` of ``[n m]``, from a miner. Default: every pair.",
            **REFERENCES,
        },
        notes=NOTATION.format("an anchor", "a reference"),
        example=_example(f"{name}(embeddings, labels)", value, *_SAMPLES),
    )


def on_proxies(
    name: str, block: Callable[..., Values], value: str, *, centers: int = 1
) -> Callable[..., Array]:
    """Make the public form of a proxy loss; ``value`` is what its example prints."""
    rest = f", centers={centers}" if centers > 1 else ""
    sides = ("a sample", "a proxy")
    return _publish(
        _proxy_loss,
        block,
        name=name,
        arguments={
            "embeddings": EMBEDDINGS,
            "labels": CLASS_LABELS,
            "proxies": PROXIES,
            "centers": "proxies per class.",
        },
        notes=NOTATION.format(*(sides[::-1] if block is proxy.proxy_anchor_loss else sides)),
        example=_example(
            f"{name}(embeddings, labels, proxies{rest})", value, *_SAMPLES, _PROXIES[centers]
        ),
    )


def among_proxies(
    name: str, block: Callable[..., Values], value: str, *, centers: int = 1
) -> Callable[..., Array]:
    """Make the public form of a separation loss; ``value`` is what its example prints."""
    rest = f", centers={centers}" if centers > 1 else ""
    return _publish(
        _separation_loss,
        block,
        name=name,
        arguments={"proxies": PROXIES, "centers": "proxies per class."},
        notes=NOTATION.format("a proxy", "another proxy"),
        example=_example(f"{name}(proxies{rest})", value, _PROXIES[centers]),
    )


multi_similarity = on_samples("multi_similarity", pair.multi_similarity_loss, "0.441")
contrastive = on_samples("contrastive", pair.contrastive_loss, "0.445")
triplet_hard = on_samples("triplet_hard", pair.triplet_hard_loss, "0.079")
triplet_semihard = on_samples("triplet_semihard", pair.triplet_semihard_loss, "0.022")
triplet_all = on_samples("triplet_all", pair.triplet_all_loss, "0.102")
margin = on_samples("margin", pair.margin_loss, "0.505")
circle = on_samples("circle", pair.circle_loss, "21.817")
supcon = on_samples("supcon", pair.supcon_loss, "0.630")
nt_xent = on_samples("nt_xent", pair.nt_xent_loss, "0.754")
smooth_ap = on_samples("smooth_ap", ranking.smooth_ap_loss, "0.126")
proxy_anchor = on_proxies("proxy_anchor", proxy.proxy_anchor_loss, "27.657")
proxy_nca_pp = on_proxies("proxy_nca_pp", proxy.proxy_nca_pp_loss, "0.080")
normalized_softmax = on_proxies("normalized_softmax", proxy.normalized_softmax_loss, "0.073")
cosface = on_proxies("cosface", proxy.cosface_loss, "1.585")
arcface = on_proxies("arcface", proxy.arcface_loss, "0.528")
subcenter_arcface = on_proxies(
    "subcenter_arcface", proxy.subcenter_arcface_loss, "0.347", centers=2
)
soft_triple = on_proxies("soft_triple", proxy.soft_triple_loss, "0.067", centers=2)
soft_triple_regularizer = among_proxies(
    "soft_triple_regularizer", separation.soft_triple_regularizer, "0.310", centers=2
)
nearest_proxy = among_proxies("nearest_proxy", separation.nearest_proxy_separation_loss, "0.557")
soft_orthogonality = among_proxies(
    "soft_orthogonality", separation.soft_orthogonality_loss, "0.431"
)
hyperspherical_energy = among_proxies(
    "hyperspherical_energy", separation.hyperspherical_energy_loss, "1.457"
)

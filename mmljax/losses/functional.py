"""Losses on embeddings, labels and proxies: one public function for each block loss.

A public function takes plain arrays, normalises them, forms the block of similarities and its
masks, and returns the mean of the block loss. Its keywords are the hyperparameters of the block
loss, and its docstring is that of the block loss with the public arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmljax.errors import UserError
from mmljax.losses.blocks import distances_for
from mmljax.losses.margins import row_margins
from mmljax.losses.mining import pair_masks
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
from mmljax.losses.registry import LOSSES, takes
from mmljax.numerics import masked_mean, similarity_matrix
from mmljax.types import PairMasks, Points, Values

_ROWS_ARE_PROXIES = {block for relation, block in LOSSES.values() if relation == "proxy_to_sample"}
_NOTATION = """\
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
    rows, columns = (classes, samples) if block in _ROWS_ARE_PROXIES else (samples, classes)
    if takes(block, "centers"):
        hyperparameters["centers"] = centers
    if jnp.ndim(hyperparameters.get("margin", 0)):
        hyperparameters["margin"] = _margins_of(block, hyperparameters["margin"], samples, count)
    masks = pair_masks(rows, columns, same_kind=False)
    return _mean(block, rows, columns, masks, hyperparameters)


def _margins_of(
    block: Callable[..., Values], margin: Any, samples: Points, classes: int
) -> Float[Array, "n 1"]:
    """The margins of samples as a column, from those of the classes."""
    if block in _ROWS_ARE_PROXIES or jnp.shape(margin) != (classes,):
        wanted = "a number" if block in _ROWS_ARE_PROXIES else f"a number, or {classes} of them"
        raise UserError(f"margin must be {wanted}, found {jnp.shape(margin)}")
    return row_margins(jnp.asarray(margin, samples.vectors.dtype), samples.labels)


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


_PROXIES = {
    1: EXAMPLE_PROXIES,
    2: "proxies = jnp.array([[1.0, 0.2], [0.9, -0.3], [0.4, 0.8], [-0.2, 0.7]])",
}


class _Form(NamedTuple):
    """The public form of the losses of a relation."""

    core: Callable[..., Array]
    given: str  # the arrays in a call
    arguments: dict[str, str]  # the docstring of each
    sides: tuple[str, str]  # row and column of a block


_ON_SAMPLES = {
    "embeddings": EMBEDDINGS,
    "labels": LABELS,
    "pairs": "``PairMasks`` of ``[n m]``, from a miner. Default: every pair.",
    **REFERENCES,
}
_AMONG_PROXIES = {"proxies": PROXIES, "centers": "proxies per class."}
_ON_PROXIES = {"embeddings": EMBEDDINGS, "labels": CLASS_LABELS, **_AMONG_PROXIES}
_ALL = "embeddings, labels, proxies"
_FORMS = {
    "sample_to_sample": _Form(
        _sample_loss, "embeddings, labels", _ON_SAMPLES, ("an anchor", "a reference")
    ),
    "sample_to_proxy": _Form(_proxy_loss, _ALL, _ON_PROXIES, ("a sample", "a proxy")),
    "proxy_to_sample": _Form(_proxy_loss, _ALL, _ON_PROXIES, ("a proxy", "a sample")),
    "proxy_to_proxy": _Form(
        _separation_loss, "proxies", _AMONG_PROXIES, ("a proxy", "another proxy")
    ),
}


def _public(name: str, value: str, *, centers: int = 1) -> Callable[..., Array]:
    """Make the public form of a registered loss.

    Args:
      name: in the registry.
      value: what the example prints.
      centers: proxies per class in the example.
    """
    relation, block = LOSSES[name]
    form = _FORMS[relation]
    lines = [*EXAMPLE_SAMPLES] if "labels" in form.given else []
    lines += [_PROXIES[centers]] if "proxies" in form.given else []
    rest = f", centers={centers}" if centers > 1 else ""
    lines += [f"loss = losses.{name}({form.given}{rest})", 'print(f"{loss:.3f}")']
    return publish(
        form.core,
        block,
        name=name,
        module="mmljax.losses",
        arguments=form.arguments,
        notes=_NOTATION.format(*form.sides),
        returns="A scalar.",
        example=example("losses", *lines, prints=value),
    )


multi_similarity = _public("multi_similarity", "0.441")
contrastive = _public("contrastive", "0.445")
triplet_hard = _public("triplet_hard", "0.079")
triplet_semihard = _public("triplet_semihard", "0.022")
triplet_all = _public("triplet_all", "0.102")
margin = _public("margin", "0.505")
circle = _public("circle", "21.817")
supcon = _public("supcon", "0.630")
nt_xent = _public("nt_xent", "0.754")
smooth_ap = _public("smooth_ap", "0.126")
recall_at_k = _public("recall_at_k", "0.190")
proxy_anchor = _public("proxy_anchor", "27.657")
proxy_nca_pp = _public("proxy_nca_pp", "0.080")
normalized_softmax = _public("normalized_softmax", "0.073")
cosface = _public("cosface", "1.585")
arcface = _public("arcface", "0.528")
subcenter_arcface = _public("subcenter_arcface", "0.347", centers=2)
soft_triple = _public("soft_triple", "0.067", centers=2)
soft_triple_regularizer = _public("soft_triple_regularizer", "0.310", centers=2)
nearest_proxy = _public("nearest_proxy", "0.557")
soft_orthogonality = _public("soft_orthogonality", "0.431")
hyperspherical_energy = _public("hyperspherical_energy", "1.457")

"""Checks of embeddings, searches and evaluations, made before any work.

>>> import numpy as np
>>> check_embeddings(np.array([[0.6, 0.8], [0.0, 2.0]]), name="gallery", unit=True)
Traceback (most recent call last):
  ...
mmljax.errors.UserError: 1 of 2 gallery embeddings are not of unit length: the first is row 1, \
of length 2; embed the images again
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmljax.errors import UserError
from mmljax.mesh import to_host
from mmljax.text import nearest

if TYPE_CHECKING:
    from mmljax.config import Config, RerankConfig
    from mmljax.types import Dataset

AnyArray = np.ndarray | Array

SECOND_STAGES = ("query_expansion", "database_augmentation", "k_reciprocal")
"""What ``config.evaluation.rerank.methods`` may hold."""

_BLOCK = 4096  # rows checked at once
_TOLERANCE = 0.02  # of a squared length: float16 and bfloat16 vectors of unit length pass

UNIT_LENGTH = (1 + _TOLERANCE) ** 0.5
"""The largest length of a vector that counts as one of unit length."""


class Matrix(Protocol):
    """What has the shape of one embedding per row: arrays, and codes of embeddings."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and numbers of a row."""


def check_embeddings(
    vectors: Float[AnyArray, "n d"],
    *,
    name: str,
    unit: bool = False,
    first: int = 0,
    cure: str = "embed the images again",
) -> None:
    """Refuse vectors that a search cannot rank, and name the first one.

    A row with NaN would be the first neighbour of every query. A row is refused if its squared
    length is not a finite float32, or, with ``unit``, not 1 within 0.02.

    Args:
      vectors: arrays of NumPy, mapped from a file or not, are read in blocks; those of JAX are
        checked on their devices.
      name: of the vectors in the error, such as ``query``.
      unit: whether rows must have unit length, as a cosine search needs.
      first: number of the first row in the error.
      cure: end of the error.

    Raises:
      UserError: how many rows are refused, and the number of the first one.
    """
    if isinstance(vectors, jax.Array):
        lengths = to_host(_squared_lengths(vectors))
    else:
        blocks = range(0, len(vectors), _BLOCK)
        lengths = np.concatenate(
            [_host_squared_lengths(vectors[i : i + _BLOCK]) for i in blocks] or [np.zeros(0)]
        )
    _refuse(~np.isfinite(lengths), lengths, "finite", name=name, first=first, cure=cure)
    if unit:
        wrong = np.abs(lengths - 1) > _TOLERANCE
        _refuse(wrong, lengths, "of unit length", name=name, first=first, cure=cure)


def check_concrete(vectors: AnyArray, *, name: str) -> None:
    """:func:`check_embeddings` unless the values are not known yet, inside ``jax.jit``."""
    if not isinstance(vectors, jax.core.Tracer):
        check_embeddings(vectors, name=name)


def check_labels(vectors: AnyArray | None, labels: AnyArray | None, *, name: str) -> None:
    """Refuse labels that are not one per embedding, and one of the two without the other.

    Raises:
      UserError: with the shapes.
    """
    shapes = [None if x is None else x.shape for x in (vectors, labels)]
    if vectors is None and labels is None:
        return
    if vectors is None or labels is None or labels.shape != vectors.shape[:1]:
        raise UserError(
            f"{name} embeddings and labels must be [n d] and [n], found {shapes[0]} and {shapes[1]}"
        )


def check_search(
    queries: Matrix,
    gallery: Matrix,
    *,
    k: int,
    chunk: int,
    self_index: AnyArray | None,
) -> None:
    """Refuse a search whose shapes do not fit, or that asks for more rows than there are.

    Raises:
      UserError: with the sizes.
    """
    if len(queries.shape) != 2 or len(gallery.shape) != 2:
        raise UserError(
            f"queries and gallery must be matrices with one embedding per row, found shapes "
            f"{queries.shape} and {gallery.shape}"
        )
    others = gallery.shape[0] - (self_index is not None)
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries and gallery differ in embedding size: {queries.shape[1]} and "
            f"{gallery.shape[1]}; embed both with the same network"
        )
    if not queries.shape[0]:
        raise UserError("there is no query to search for; check the split")
    if k < 1 or chunk < 1:
        raise UserError(f"k and chunk must be at least 1, found k={k} and chunk={chunk}")
    if k > others:
        excluded = " besides each query itself" if self_index is not None else ""
        raise UserError(
            f"k={k} neighbours asked of a gallery of {others} rows{excluded}; lower k "
            "(--config.evaluation.recall_at) or add to the gallery"
        )


def check_evaluation(dataset: Dataset, config: Config) -> None:
    """Refuse an evaluation that must fail, before the first training step.

    Raises:
      UserError: a K of Recall@K is below 1 or above the gallery, no query has an image of its item
        in the gallery, a second stage is unknown or asks for more images than there are, or
        scikit-learn is asked for and absent.
    """
    from mmljax.retrieval.diagnostics import check_clustering

    query, gallery = dataset.query, dataset.gallery
    relevant = relevant_counts(query.labels, None if gallery is None else gallery.labels)
    candidates = len(query.labels) - 1 if gallery is None else len(gallery.labels)
    check_recall_at(config.evaluation.recall_at, candidates=candidates, relevant=relevant)
    _check_rerank(config.evaluation.rerank, dataset, candidates=candidates)
    if config.evaluation.clustering:
        check_clustering()


def check_recall_at(
    recall_at: tuple[int, ...], *, candidates: int, relevant: Int[np.ndarray, " q"]
) -> None:
    """Refuse a K that is below 1 or above the number of candidates, and queries without a match.

    Args:
      recall_at: the K of Recall@K.
      candidates: gallery rows that a query can find.
      relevant: how many of them are relevant to each query.

    Raises:
      UserError: with the K, or if ``relevant`` is 0 everywhere.
    """
    key = "--config.evaluation.recall_at"
    if not recall_at or min(recall_at) < 1:
        raise UserError(f"{key} must hold numbers of at least 1, found {recall_at}")
    if max(recall_at) > candidates:
        raise UserError(
            f"{key} asks for Recall@{max(recall_at)}, but a query has only {candidates} "
            "candidates; remove what is larger"
        )
    if not np.any(relevant):
        raise UserError("no query has an image of its item in the gallery; check the split file")


def _check_rerank(rerank: RerankConfig, dataset: Dataset, *, candidates: int) -> None:
    """Refuse second stages that are unknown, or ask for more images than there are."""
    key = "--config.evaluation.rerank"
    for name in rerank.methods:
        if name not in SECOND_STAGES:
            raise UserError(f"{key}.methods has {name!r}; {nearest(name, SECOND_STAGES)}")
    if len(set(rerank.methods)) < len(rerank.methods):
        raise UserError(f"{key}.methods={rerank.methods} names one twice; remove it")
    limits = []
    if "query_expansion" in rerank.methods:
        limits.append(("k", rerank.k, candidates))
    if "database_augmentation" in rerank.methods:
        limits.append(("k", rerank.k, len((dataset.gallery or dataset.query).labels) - 1))
    if "k_reciprocal" in rerank.methods:
        parts = [split for split in (dataset.query, dataset.gallery) if split is not None]
        images = sum(len(split.labels) for split in parts)
        limits += [("k1", rerank.k1, images - 1), ("k2", rerank.k2, images)]
    for name, value, most in limits:
        if value > most:
            raise UserError(
                f"{key}.{name}={value}, but an image has only {most} to look at; lower it"
            )


def relevant_counts(query_labels: AnyArray, gallery_labels: AnyArray | None) -> np.ndarray:
    """How many gallery rows have each query's label, ``[q]``; without the query if no gallery."""
    if gallery_labels is None:
        _, place, sizes = np.unique(query_labels, return_inverse=True, return_counts=True)
        return sizes[place] - 1
    labels, sizes = np.unique(gallery_labels, return_counts=True)
    if not len(labels):
        return np.zeros(len(query_labels), np.int64)
    place = np.clip(np.searchsorted(labels, query_labels), 0, len(labels) - 1)
    return np.where(labels[place] == query_labels, sizes[place], 0)


@jax.jit
def _squared_lengths(vectors: Array) -> Float[Array, " n"]:
    x = vectors.astype(jnp.float32)
    return jnp.sum(x * x, axis=1)


def _host_squared_lengths(block: np.ndarray) -> Float[np.ndarray, " n"]:
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.asarray(block, np.float32)
        return np.einsum("ij,ij->i", x, x)


def _refuse(
    wrong: Bool[np.ndarray, " n"],
    lengths: Float[np.ndarray, " n"],
    what: str,
    *,
    name: str,
    first: int,
    cure: str,
) -> None:
    if not wrong.any():
        return
    row = int(np.argmax(wrong))
    length = f", of length {np.sqrt(lengths[row]):.3g}" if np.isfinite(lengths[row]) else ""
    raise UserError(
        f"{int(wrong.sum())} of {len(wrong)} {name} embeddings are not {what}: the first is row "
        f"{first + row}{length}; {cure}"
    )

"""Labels that are probably wrong, by embeddings that did not learn them.

Pure functions of arrays; :mod:`mmljax.inference.inspect_data` reads the images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mmljax.retrieval.search import nearest_neighbors

_NEAREST = 3  # images of an item that are evidence
_DENSITY = 10  # neighbours whose mean similarity is the density around an image
_ROUNDS = 3
_REPLACED = 0.05  # share of the labels that are replaced at once, to see what wrong ones look like
_SAMPLE, _DRAWS = 400, 50  # wanted number of replaced labels, and most draws for it
_LEAST = 0.6  # share of the replaced labels over whose margins that of wrong ones is estimated
_BLOCK = 256  # images whose similarities to all others are held at once


class LabelMargins(NamedTuple):
    """How much more an image looks like another item than like its own."""

    margin: Float[np.ndarray, " n"]  # -inf of an image without evidence, such as one alone
    other: Int[np.ndarray, " n"]  # the nearest image of the other item


class SuspectLabels(NamedTuple):
    """Margins, from which of them on labels are called wrong, and what to expect of it."""

    margins: LabelMargins
    threshold: float  # infinity where no margin reaches the precision
    recall: float  # estimated share of the wrong labels that have at least the threshold
    wrong: float  # estimated share of the labels that are wrong


def label_margins(
    embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> LabelMargins:
    """Similarity to the most similar other item, less that to an image's own item.

    The similarity to an item is the mean of that to its three nearest images. The similarity of two
    images is the cosine of their embeddings less the mean of all, less half the density around
    each: the mean cosine to its 10 nearest images (CSLS; Conneau et al. 2018, arXiv:1710.04087).

    A wrong label misleads about the other images of both items. So margins are computed three
    times; from the second on, an image with a positive margin is no evidence about images with a
    smaller one. Exact; memory holds the similarities of 256 images to all others.

    >>> x = np.array([[1, 0], [0.9, 0.1], [-1, 0.2], [-0.9, 0], [1.1, 0]], np.float32)
    >>> found = label_margins(x, np.array([0, 0, 1, 1, 1]))  # the last belongs to the first two
    >>> int(found.margin.argmax()), int(found.other[4])
    (4, 0)

    Args:
      embeddings: of all images.
      labels: items.
    """
    return _margins(embeddings, [labels])[0]


def suspect_labels(
    embeddings: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    precision: float,
) -> SuspectLabels:
    """The lowest margin from which on about a share ``precision`` of the labels is wrong.

    No label is known to be wrong, so some are made wrong: 5 % are replaced at random, as many times
    as give 400 wrong labels. They tell how many wrong labels have at least a margin m,
    ``P(m | wrong)``. Of all labels ``P(m)`` have it, and at least ``w P(m | wrong)`` if a share w
    is wrong; so w is at most ``P(m) / P(m | wrong)``, at every m. The least of these, over the
    margins that 60 % of the replaced labels have, is the estimate of w. This is the project's own
    rule, after the estimate of the share of true null hypotheses by Storey (2002). Labels that are
    wrong in other ways than by chance, such as those of items that are easily confused, have
    smaller margins than assumed.

    Args:
      embeddings: of all images.
      labels: as they are.
      precision: wanted share of wrong labels among those that are called wrong.
    """
    draws = min(_DRAWS, math.ceil(_SAMPLE / max(1, round(_REPLACED * len(labels)))))
    replaced = [relabelled(labels, share=_REPLACED, seed=seed) for seed in range(draws)]
    margins, *changed = _margins(embeddings, [labels, *(new for new, _ in replaced)])
    drawn = [found.margin[rows] for found, (_, rows) in zip(changed, replaced, strict=True)]
    sample = np.sort(np.concatenate(drawn))
    observed = np.sort(margins.margin)
    given_wrong = 1 - np.searchsorted(sample, observed) / len(sample)
    overall = 1 - np.searchsorted(observed, observed) / len(observed)
    seen = given_wrong >= _LEAST
    wrong = float(np.min(overall[seen] / given_wrong[seen])) if seen.any() else 0.0
    enough = np.isfinite(observed) & (wrong * given_wrong >= precision * overall)
    if not enough.any():
        return SuspectLabels(margins, float("inf"), 0.0, wrong)
    lowest = np.flatnonzero(enough)[0]
    return SuspectLabels(margins, float(observed[lowest]), float(given_wrong[lowest]), wrong)


def relabelled(
    labels: Int[np.ndarray, " n"], *, share: float, seed: int
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Labels of which a share, at least one, is replaced by others that occur; and which ones."""
    random = np.random.default_rng(seed)
    items, numbers = np.unique(labels, return_inverse=True)
    drawn = np.zeros(len(labels), bool)
    count = max(1, round(share * len(labels)))
    drawn[random.choice(len(labels), count, replace=False)] = True
    moved = (numbers + random.integers(1, len(items), len(labels))) % len(items)
    return items[np.where(drawn, moved, numbers)], drawn


class _Items(NamedTuple):
    number: Int[np.ndarray, " n"]  # of each image's item
    order: Int[np.ndarray, " n"]  # of the images, item by item
    counts: Int[np.ndarray, " i"]


def _margins(
    embeddings: Float[np.ndarray, "n d"], labels: list[Int[np.ndarray, " n"]]
) -> list[LabelMargins]:
    """The margins by each of several labellings, which share the similarities."""
    x = embeddings - embeddings.mean(axis=0)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    count = len(x)
    own = np.arange(count, dtype=np.int32)
    near = nearest_neighbors(x, x, k=min(_DENSITY, count - 1), self_index=own)
    density = np.asarray(near.similarity).mean(axis=1) / 2
    items = []
    for given in labels:
        _, number, counts = np.unique(given, return_inverse=True, return_counts=True)
        items.append(_Items(number, np.argsort(number, kind="stable"), counts))
    found = [LabelMargins(np.full(count, -np.inf), np.zeros(count, int)) for _ in labels]
    for _ in range(_ROUNDS):
        doubt = [np.maximum(margins.margin, 0) for margins in found]
        for start in range(0, count, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, count))
            similarity = x[rows] @ x.T - density[rows, None] - density
            similarity[np.arange(len(rows)), rows] = -np.inf
            for margins, one, doubted in zip(found, items, doubt, strict=True):
                trusted = np.where(doubted > doubted[rows, None], -np.inf, similarity)
                margins.margin[rows], margins.other[rows] = _of_block(trusted, one, rows)
    return found


def _of_block(
    similarity: Float[np.ndarray, "b n"], items: _Items, rows: Int[np.ndarray, " b"]
) -> tuple[Float[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    to_items = _means_of_nearest(similarity[:, items.order], items.counts)
    block = np.arange(len(rows))
    own = to_items[block, items.number[rows]]
    to_items[block, items.number[rows]] = -np.inf
    best = to_items.argmax(axis=1)
    judged = np.isfinite(own)
    margin = to_items[block, best] - np.where(judged, own, 0)
    of_best = np.where(items.number == best[:, None], similarity, -np.inf)
    return np.where(judged, margin, -np.inf), of_best.argmax(axis=1)


def _means_of_nearest(
    similarity: Float[np.ndarray, "b n"], counts: Int[np.ndarray, " i"]
) -> Float[np.ndarray, "b i"]:
    """Mean of the largest finite values of each run of columns; equal values count once."""
    starts = np.cumsum(counts) - counts
    total = np.zeros((len(similarity), len(counts)))
    found = np.zeros(total.shape, int)
    for _ in range(_NEAREST):
        largest = np.maximum.reduceat(similarity, starts, axis=1)
        there = np.isfinite(largest)
        total += np.where(there, largest, 0)
        found += there
        spent = similarity == np.repeat(largest, counts, axis=1)
        similarity = np.where(spent, -np.inf, similarity)
    return np.where(found > 0, total / np.maximum(found, 1), -np.inf)

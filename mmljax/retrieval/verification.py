"""Error rates of a similarity threshold: is this pair of images a match, or is it not?

A pair is a query and a gallery image other than itself. It *matches* if both have one class.
At a threshold t a pair is accepted if its similarity is at least t.

- *False-match rate*: the share of pairs of different classes that are accepted.
- *False-non-match rate*: the share of matching pairs that are rejected.
- *False-positive identification rate*: the share of queries with an accepted image of another
  class, so what an open-set query (whose class the gallery lacks) would get as a wrong answer.
- *False-negative identification rate*: the share of queries with a match whose nearest image is
  not of their class, or rejected.

Names as in ISO/IEC 19795-1; identification rates at rank 1 as in Grother, Ngan, Hanaoka, Face
Recognition Vendor Test, Part 2: Identification, NISTIR 8271 (2019). Equal similarities never help:
a tie of the best match with another class counts as an error.

Similarities are computed block by block in float32 and never held together. Their histogram has
thresholds at multiples of ``RESOLUTION``; the counts at these are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from mmljax.errors import UserError
from mmljax.retrieval.bootstrap import Estimate, class_draws, percentile_interval

RESOLUTION = 2.0**-15
"""Distance of the thresholds that can be chosen, 0.00003."""

THRESHOLDS: Float[np.ndarray, " bins"] = np.arange(2**16 + 1) * RESOLUTION - 1
"""Thresholds from -1 to 1; float32 holds each exactly."""

_QUERIES, _GALLERY = 512, 8192  # rows of a block of similarities
_PAIRS = 1 << 15  # pairs of classes whose resampled counts are held at once


class PairHistogram(NamedTuple):
    """Numbers of pairs by similarity, from each of ``THRESHOLDS`` to the next."""

    matching: Int[np.ndarray, " bins"]
    different: Int[np.ndarray, " bins"]


class Decisions(NamedTuple):
    """What a threshold decides, counted by class; and the best similarities of each query."""

    queries: Int[np.ndarray, " c"]  # images
    gallery: Int[np.ndarray, " c"]
    itself: bool  # whether the gallery is the queries, where an image is no pair with itself
    rejected: Int[np.ndarray, " c"]  # matching pairs below the threshold
    accepted_classes: Int[np.ndarray, "n 2"]  # classes of query and gallery image, all different
    accepted: Int[np.ndarray, " n"]  # pairs of these two classes that are accepted
    query_class: Int[np.ndarray, " q"]
    best_match: Float[np.ndarray, " q"]  # highest similarity to the query's class; -inf for none
    best_other: Float[np.ndarray, " q"]  # highest similarity to another class


def pair_histogram(
    queries: Float[np.ndarray, "q d"],
    query_labels: Shaped[np.ndarray, " q"],
    gallery: Float[np.ndarray, "g d"] | None = None,
    gallery_labels: Shaped[np.ndarray, " g"] | None = None,
) -> PairHistogram:
    """Histogram of the similarities of all pairs, matching ones apart.

    >>> x = np.eye(3, dtype=np.float32)
    >>> found = pair_histogram(x, np.array([0, 0, 1]))
    >>> found.matching.sum(), found.different.sum(), found.different[2**15]
    (np.int64(2), np.int64(4), np.int64(4))

    Args:
      queries: unit vectors.
      query_labels: their classes.
      gallery: unit vectors; None: the queries, each without itself.
      gallery_labels: their classes.
    """
    bins = len(THRESHOLDS)
    every, matching = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    for block in _blocks(queries, query_labels, gallery, gallery_labels):
        place = _bins(block.similarity)
        own = np.bincount(place[block.own], minlength=bins)
        every += np.bincount(place.ravel(), minlength=bins) - own
        matching += np.bincount(place[block.matches], minlength=bins) - own
    return PairHistogram(matching, every - matching)


def false_match_rates(histogram: PairHistogram) -> Float[np.ndarray, " bins"]:
    """The false-match rate at each of ``THRESHOLDS``; NaN without pairs of different classes."""
    accepted = np.cumsum(histogram.different[::-1])[::-1]
    return _ratio(accepted, histogram.different.sum())


def false_non_match_rates(histogram: PairHistogram) -> Float[np.ndarray, " bins"]:
    """The false-non-match rate at each of ``THRESHOLDS``; NaN without matching pairs."""
    below = np.cumsum(histogram.matching) - histogram.matching
    return _ratio(below, histogram.matching.sum())


def choose_threshold(histogram: PairHistogram, *, false_match_rate: float) -> float:
    """The lowest of ``THRESHOLDS`` whose false-match rate is at most the one that is wanted.

    >>> x = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    >>> round(choose_threshold(pair_histogram(x, np.arange(3)), false_match_rate=0.4), 4)
    0.8

    Raises:
      UserError: if there are too few pairs to know such a rate, or no threshold reaches it.
    """
    pairs = int(histogram.different.sum())
    flag = f"--false-match-rate={false_match_rate:g}"
    if pairs * false_match_rate < 1:
        least = f"ask for at least {1 / pairs:.2g}, or add" if pairs else "add"
        raise UserError(
            f"{flag} cannot be known from {pairs} pairs of different classes; {least} images of "
            "more classes"
        )
    reached = np.flatnonzero(false_match_rates(histogram) <= false_match_rate)
    if not len(reached):
        least = histogram.different[-1] / pairs
        raise UserError(
            f"{flag} is reached by no threshold: a share of {least:.2g} of the pairs of different "
            "classes has similarity 1; look for copies of images in several classes"
        )
    return float(THRESHOLDS[reached[0]])


def decide(
    queries: Float[np.ndarray, "q d"],
    query_labels: Shaped[np.ndarray, " q"],
    gallery: Float[np.ndarray, "g d"] | None = None,
    gallery_labels: Shaped[np.ndarray, " g"] | None = None,
    *,
    threshold: float,
) -> Decisions:
    """Accept or reject every pair, and count by class.

    Besides a block of similarities, memory holds an entry for each two classes with an accepted
    pair, at most as many as there are false matches.

    Args:
      queries: as in :func:`pair_histogram`, like all that is not named here.
      query_labels: classes of the queries.
      gallery: unit vectors, or None.
      gallery_labels: classes of the gallery.
      threshold: least similarity of an accepted pair.
    """
    labels = [query_labels] if gallery_labels is None else [query_labels, gallery_labels]
    classes, numbers = np.unique(np.concatenate(labels), return_inverse=True)
    query_class, gallery_class = numbers[: len(query_labels)], numbers[-len(labels[-1]) :]
    count = len(classes)
    hits = np.zeros(count, np.int64)
    best = np.full((2, len(query_labels)), -np.inf, np.float32)  # of a match, of another class
    accepted: list[tuple[np.ndarray, np.ndarray]] = []
    for block in _blocks(queries, query_class, gallery, None if gallery is None else gallery_class):
        similarity, matches, rows = block.similarity, block.matches, block.rows
        similarity[block.own] = -np.inf
        takes = similarity >= threshold
        hits += np.bincount(query_class[rows], (takes & matches).sum(axis=1), count).astype(int)
        for side, hidden in enumerate((~matches, matches)):
            highest = np.where(hidden, -np.inf, similarity).max(axis=1)
            best[side, rows] = np.maximum(best[side, rows], highest)
        row, column = np.nonzero(takes & ~matches)
        key = query_class[rows][row] * count + gallery_class[block.columns][column]
        accepted.append(np.unique(key, return_counts=True))
    keys, place = np.unique(np.concatenate([key for key, _ in accepted]), return_inverse=True)
    times = np.bincount(place, np.concatenate([n for _, n in accepted]), len(keys)).astype(int)
    images = np.bincount(query_class, minlength=count), np.bincount(gallery_class, minlength=count)
    itself = gallery is None
    return Decisions(
        *images,
        itself=itself,
        rejected=_matching_pairs(*images, itself=itself) - hits,
        accepted_classes=np.stack(np.divmod(keys, count), axis=1),
        accepted=times,
        query_class=query_class,
        best_match=best[0],
        best_other=best[1],
    )


def estimate_rates(
    decisions: Decisions, *, threshold: float, resamples: int, seed: int
) -> dict[str, Estimate]:
    """The four error rates at a threshold, with 95 % intervals by bootstrap over classes.

    A pair of different classes counts as often as its two classes were drawn together, so that the
    interval covers the choice of both (Owen, The Pigeonhole Bootstrap (2007), arXiv 0712.1111, with
    one draw for both sides; two copies of one class are no pair). For the identification
    rates only the queries' classes are drawn; the gallery stays. Where no error was seen, the
    interval is 0 to 0, although the rate need not be.

    Args:
      decisions: of the threshold.
      threshold: the one that ``decisions`` was made with.
      resamples: number of resamples.
      seed: of the draws.

    Returns:
      ``false_match_rate``, ``false_non_match_rate``, ``false_positive_identification_rate`` and
      ``false_negative_identification_rate``; NaN where there is nothing to count.

    Raises:
      UserError: with fewer than two classes.
    """
    classes = len(decisions.queries)
    if classes < 2:
        raise UserError(f"the images show {classes} class; error rates need at least two")
    rates = [
        _rates(decisions, times, threshold)
        for times in class_draws(classes, resamples=resamples, seed=seed)
    ]
    value = _rates(decisions, np.ones((1, classes), np.int64), threshold)
    return {
        name: Estimate(float(value[name][0]), *map(float, interval))
        for name in value
        for interval in [percentile_interval(np.concatenate([row[name] for row in rates]))]
    }


def _rates(
    decisions: Decisions, times: Int[np.ndarray, "draws c"], threshold: float
) -> dict[str, Float[np.ndarray, " draws"]]:
    """The rates of resamples in which each class counts ``times``."""
    queries, gallery = decisions.queries, decisions.gallery
    matching = _matching_pairs(queries, gallery, itself=decisions.itself)
    different = (times @ queries) * (times @ gallery) - times**2 @ (queries * gallery)
    found, best_other = decisions.best_match, decisions.best_other
    has_match = found > -np.inf
    misses = has_match & ((found < threshold) | (found <= best_other))

    def by_class(query: np.ndarray) -> np.ndarray:
        return np.bincount(decisions.query_class, query, len(queries))

    return {
        "false_match_rate": _ratio(_false_matches(decisions, times), different),
        "false_non_match_rate": _ratio(times @ decisions.rejected, times @ matching),
        "false_positive_identification_rate": _ratio(
            times @ by_class(best_other >= threshold), times @ queries
        ),
        "false_negative_identification_rate": _ratio(
            times @ by_class(misses), times @ by_class(has_match)
        ),
    }


def _false_matches(
    decisions: Decisions, times: Int[np.ndarray, "draws c"]
) -> Float[np.ndarray, " draws"]:
    """Accepted pairs of different classes in each resample."""
    by_class = np.ascontiguousarray(times.T.astype(np.float64))
    total = np.zeros(len(times))
    at_once = max(1, (_PAIRS << 7) // len(times))
    for first in range(0, len(decisions.accepted), at_once):
        part = slice(first, first + at_once)
        query, gallery = decisions.accepted_classes[part].T
        total += decisions.accepted[part] @ (by_class[query] * by_class[gallery])
    return total


def _matching_pairs(queries: np.ndarray, gallery: np.ndarray, *, itself: bool) -> np.ndarray:
    return queries * (gallery - itself)


def _ratio(part: np.ndarray, whole: np.ndarray) -> Float[np.ndarray, " n"]:
    """The quotient in float64; NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


class _Block(NamedTuple):
    rows: slice  # of the queries
    columns: slice  # of the gallery
    similarity: Float[np.ndarray, "b n"]
    matches: np.ndarray  # [b n] bool, also of an image with itself
    own: tuple[np.ndarray, np.ndarray]  # places of images with themselves


def _blocks(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray | None,
    gallery_labels: np.ndarray | None,
) -> Iterator[_Block]:
    """The similarities of all pairs, block by block."""
    itself = gallery is None or gallery_labels is None
    against, labels = (queries, query_labels) if itself else (gallery, gallery_labels)
    assert against is not None
    assert labels is not None
    for first in range(0, len(queries), _QUERIES):
        rows = slice(first, min(first + _QUERIES, len(queries)))
        for start in range(0, len(against), _GALLERY):
            columns = slice(start, min(start + _GALLERY, len(against)))
            similarity = (
                np.asarray(queries[rows], np.float32) @ np.asarray(against[columns], np.float32).T
            )
            common = range(max(rows.start, start), min(rows.stop, columns.stop) if itself else 0)
            own = np.array(common, np.int64)
            matches = query_labels[rows][:, None] == labels[columns]
            yield _Block(rows, columns, similarity, matches, (own - first, own - start))


def _bins(similarity: Float[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """The last of ``THRESHOLDS`` that each similarity reaches; exact, as scaling by 2**15 is."""
    scaled = np.floor(similarity * np.float32(1 / RESOLUTION))
    top = len(THRESHOLDS) - 1
    return np.clip(scaled + np.float32(top // 2), 0, top).astype(np.int64)

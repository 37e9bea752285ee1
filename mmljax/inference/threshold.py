"""Choose the similarity threshold of a run, and measure its error rates on classes not used for it.

The file that :func:`write_report` writes, ``threshold.json``, has ``threshold``, the wanted
``false_match_rate``, where it was ``chosen_on``, the rates on the ``test`` classes with intervals,
``holds`` (whether the wanted rate lies within its interval there), a ``curve`` of other wanted
rates, a ``histogram`` of the test similarities, and ``made_from``, the network. The rates are
defined in :mod:`mmljax.retrieval.verification`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mmljax.errors import UserError
from mmljax.files import write_atomically
from mmljax.inference.embed import embed_images, progress_bar
from mmljax.inference.embedder import TrainedEmbedder
from mmljax.retrieval import verification
from mmljax.retrieval.verification import PairHistogram
from mmljax.runs.writer import plain
from mmljax.text import one_line
from mmljax.types import Dataset, Split

FILE, PLOT = "threshold.json", "threshold.png"
FORMAT = "mmljax threshold 1"
TRAIN, VALIDATION = "train", "validation"

_COARSE = 512  # thresholds per bin of the histogram that is kept
_PER_DECADE = 4  # points of the curve


class Images(NamedTuple):
    """Embeddings and classes of images whose pairs are counted."""

    queries: Float[np.ndarray, "q d"]
    query_labels: Int[np.ndarray, " q"]
    gallery: Float[np.ndarray, "g d"] | None = None  # None: the queries, each without itself
    gallery_labels: Int[np.ndarray, " g"] | None = None

    def of_classes(self, classes: Int[np.ndarray, " c"]) -> Images:
        """The images of some classes."""
        kept = np.isin(self.query_labels, classes)
        queries = self.queries[kept], self.query_labels[kept]
        if self.gallery is None or self.gallery_labels is None:
            return Images(*queries)
        kept = np.isin(self.gallery_labels, classes)
        return Images(*queries, self.gallery[kept], self.gallery_labels[kept])

    def classes(self) -> Int[np.ndarray, " c"]:
        """Their classes."""
        parts = [x for x in (self.query_labels, self.gallery_labels) if x is not None]
        return np.unique(np.concatenate(parts))


def embed_sets(
    trained: TrainedEmbedder,
    dataset: Dataset,
    *,
    chosen_on: str,
    validation_share: float,
    seed: int,
) -> tuple[Images, Images]:
    """The images on which a threshold is chosen, and the test images, which share no class.

    Args:
      trained: the network.
      dataset: that of its run.
      chosen_on: ``train``: the training images, among themselves; ``validation``: a share of the
        test classes, which are then no test classes.
      validation_share: that share.
      seed: of the draw of the validation classes.

    Raises:
      UserError: if an image cannot be read, or there are too few test classes to be divided.
    """
    test = Images(*_embedded(trained, dataset.query))
    if dataset.gallery is not None:
        test = test._replace(
            **dict(zip(Images._fields[2:], _embedded(trained, dataset.gallery), strict=True))
        )
    if chosen_on == TRAIN:
        return Images(*_embedded(trained, dataset.train)), test
    classes = np.random.default_rng(seed).permutation(test.classes())
    count = round(validation_share * len(classes))
    if not 2 <= count <= len(classes) - 2:
        raise UserError(
            f"--validation-share={validation_share:g} of {len(classes)} test items leaves fewer "
            "than two on one side; change it, or use --chosen-on train"
        )
    return test.of_classes(classes[:count]), test.of_classes(classes[count:])


def _embedded(trained: TrainedEmbedder, split: Split) -> tuple[np.ndarray, np.ndarray]:
    with progress_bar(split.labels) as bar:
        vectors = embed_images(trained, split, skip_corrupt=False, advance=bar.update)[1]
    return vectors, split.labels


def threshold_report(
    chosen_on: Images, test: Images, *, false_match_rate: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Choose a threshold on some images, and measure it on others.

    Args:
      chosen_on: decide the threshold.
      test: images of other classes.
      false_match_rate: wanted.
      resamples: of the test classes, for the intervals.
      seed: of these.

    Raises:
      UserError: if there are too few pairs or classes, or no threshold reaches the rate.
    """
    before = verification.pair_histogram(*chosen_on)
    threshold = verification.choose_threshold(before, false_match_rate=false_match_rate)
    after = verification.pair_histogram(*test)
    decisions = verification.decide(*test, threshold=threshold)
    rates = verification.estimate_rates(
        decisions, threshold=threshold, resamples=resamples, seed=seed
    )
    false_match = rates["false_match_rate"]
    return {
        "format": FORMAT,
        "threshold": threshold,
        "resolution": verification.RESOLUTION,
        "false_match_rate": false_match_rate,
        "holds": false_match.low <= false_match_rate <= false_match.high,
        "chosen_on": _facts(chosen_on, before) | _rates_at(before, threshold),
        "test": _facts(test, after) | {name: x._asdict() for name, x in rates.items()},
        "curve": _curve(before, after),
        "histogram": {
            kind: np.add.reduceat(counts[:-1], np.arange(0, len(counts) - 1, _COARSE))
            for kind, counts in after._asdict().items()
        },
        "resamples": resamples,
        "seed": seed,
    }


def _facts(images: Images, histogram: PairHistogram) -> dict[str, Any]:
    return {
        "classes": len(images.classes()),
        "queries": len(images.queries),
        "gallery": None if images.gallery is None else len(images.gallery),
        "matching_pairs": int(histogram.matching.sum()),
        "different_pairs": int(histogram.different.sum()),
    }


def _rates_at(histogram: PairHistogram, threshold: float) -> dict[str, float]:
    place = np.searchsorted(verification.THRESHOLDS, threshold)
    return {
        "false_match_rate": float(verification.false_match_rates(histogram)[place]),
        "false_non_match_rate": float(verification.false_non_match_rates(histogram)[place]),
    }


def _curve(before: PairHistogram, after: PairHistogram) -> list[dict[str, Any]]:
    """Thresholds for wanted rates from 10 % down to one pair, and the rates of both sets there."""
    rows = []
    pairs = before.different.sum()
    for i in range(_PER_DECADE, math.floor(_PER_DECADE * math.log10(max(pairs, 1))) + 1):
        wanted = 10 ** (-i / _PER_DECADE)
        try:
            threshold = verification.choose_threshold(before, false_match_rate=wanted)
        except UserError:  # no threshold reaches it
            break
        row = {"wanted": wanted, "threshold": threshold}
        rows.append(row | {"chosen_on": _rates_at(before, threshold)})
        rows[-1]["test"] = _rates_at(after, threshold)
    return rows


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, atomically."""
    write_atomically(path, json.dumps(plain(report), indent=2, allow_nan=False) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    """The report of a file.

    Raises:
      UserError: if it is not one.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != FORMAT:
            raise ValueError(f"format {report['format']!r}, not {FORMAT!r}")
        if not (-1 <= report["threshold"] <= 1 and isinstance(report["made_from"], dict)):
            raise ValueError(f"threshold {report['threshold']!r}")
        return report
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a file of mmljax threshold ({one_line(error)}); make it by mmljax "
            "threshold RUN, or give a number from -1 to 1"
        ) from error

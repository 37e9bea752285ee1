"""Find what is doubtful in a data set: near copies, leaks, wrong labels, unusable files.

Nothing of the data is changed. The findings are a list that the readers take as
``config.data.exclude``, and a page that shows each beside the image that it is about.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mmljax.config import Config
from mmljax.data import load
from mmljax.data.exclusion import COLUMN
from mmljax.data.thumbnails import thumbnail
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.numerics import l2_normalize
from mmljax.retrieval.evaluate import embed_batches
from mmljax.retrieval.near_copies import PICTURE, near_copies
from mmljax.retrieval.suspects import SuspectLabels, suspect_labels
from mmljax.types import Dataset, Split

if TYPE_CHECKING:
    from PIL.Image import Image

SIMILARITY, CORRELATION = 0.7, 0.97
"""Least similarity of embeddings, and correlation of small pictures, of near copies."""

TINY = 32
"""Images whose longer side has fewer pixels are named."""

ALONE = "alone in its item"
"""The one reason for which an image is not put on the exclusion list."""

SIDES = ("train", "test")


class Images(NamedTuple):
    """All images of a data set as one split, its items numbered across both sides."""

    split: Split
    side: Int[np.ndarray, " n"]  # of SIDES


class Finding(NamedTuple):
    """What is doubtful about an image."""

    name: str
    reason: str
    other: str  # the image that it is about, or ""
    value: float  # similarity, correlation or margin; NaN where there is none
    rows: tuple[int, int]  # of both among the images; -1 for none


class Seen(NamedTuple):
    """The images of a split that can be decoded."""

    rows: Int[np.ndarray, " m"]
    vectors: Float[np.ndarray, "m d"]  # features of unit length
    pictures: Float[np.ndarray, "m p p"]  # small and grey
    findings: list[Finding]  # about the other images, and tiny ones


class Report(NamedTuple):
    """The findings, most certain ones of each reason first, and what was counted."""

    findings: list[Finding]
    images: int
    items: int
    labels: SuspectLabels | None  # None where there is one item


def all_images(dataset: Dataset) -> Images:
    """Train, query and gallery together; test items have numbers of their own.

    Raises:
      UserError: if the data set holds features.
    """
    if load.feature_size(dataset):
        raise UserError("--config.data.source=features has no images to look at; name the images")
    parts = [dataset.train, dataset.query, *([dataset.gallery] if dataset.gallery else [])]
    offset = int(dataset.train.labels.max()) + 1
    labels = [part.labels + (offset if i else 0) for i, part in enumerate(parts)]
    side = [np.full(len(part.labels), min(i, 1)) for i, part in enumerate(parts)]
    split = Split(
        np.concatenate([part.images for part in parts]),
        np.concatenate(labels),
        np.concatenate([part.names for part in parts]),
    )
    return Images(split, np.concatenate(side))


def inspect(
    dataset: Dataset,
    config: Config,
    embed: Callable[[Any], Any],
    *,
    precision: float,
) -> Report:
    """Look at all images of a data set.

    Args:
      dataset: of images.
      config: how they are cropped.
      embed: from crops to embeddings, of a network that did not learn these labels.
      precision: wanted share of wrong labels among those that are called wrong.

    Raises:
      UserError: if the data set holds features, or fewer than two images can be used.
    """
    images = all_images(dataset)
    seen = see(images.split, config, embed)
    if len(seen.rows) < 2:
        raise UserError(
            f"{len(seen.rows)} of {len(images.split.labels)} images can be decoded, and a "
            "comparison needs two; restore the files, the first of which is "
            f"{images.split.names[0]}"
        )
    compared, suspects = compare(images, seen, precision=precision)
    _, rows, counts = np.unique(images.split.labels, return_index=True, return_counts=True)
    alone = [_about(images.split, int(row), ALONE) for row in rows[counts == 1]]
    findings = [*seen.findings, *compared, *alone]
    return Report(findings, len(images.split.labels), len(counts), suspects)


def see(split: Split, config: Config, embed: Callable[[Any], Any]) -> Seen:
    """What the comparison needs of the images that can be decoded: by training and by Pillow."""
    whole = np.ones(len(split.labels), bool)
    if split.images.ndim == 1:
        from mmljax.data.pipeline import decodable  # needs TensorFlow

        whole = decodable(split, config.data)
    rows, pictures, findings = [], [], []
    for row in range(len(whole)):
        small = _small(split, row) if whole[row] else None
        if small is None:
            findings.append(_about(split, row, "unreadable"))
            continue
        if max(small.size) < TINY:
            findings.append(_about(split, row, "tiny"))
        rows.append(row)
        pictures.append(np.asarray(small.convert("L").resize((PICTURE, PICTURE)), np.float32))
    usable = Split(*(field[rows] for field in split))
    vectors = np.zeros((0, 0), np.float32)
    if rows:
        embedded, _ = embed_batches(embed, load.eval_batches(usable, config, make_mesh()))
        vectors = np.asarray(l2_normalize(jnp.asarray(embedded)))
    return Seen(np.array(rows, int), vectors, np.array(pictures), findings)


def compare(
    images: Images, seen: Seen, *, precision: float
) -> tuple[list[Finding], SuspectLabels | None]:
    """Findings about near copies and labels; None where the labels that are judged are one item."""
    rows, vectors = seen.rows, seen.vectors
    split = Split(*(field[rows] for field in images.split))
    pairs = near_copies(vectors, seen.pictures, similarity=SIMILARITY, correlation=CORRELATION)
    findings = _copies(pairs, vectors, split, images.side[rows], rows)
    across = split.labels[pairs[:, 0]] != split.labels[pairs[:, 1]]
    judged = np.setdiff1d(np.arange(len(rows)), pairs[across])  # the others have a finding
    if len(np.unique(split.labels[judged])) < 2:
        return findings, None
    suspects = suspect_labels(vectors[judged], split.labels[judged], precision=precision)
    return [*findings, *_labels(suspects, split, rows, judged)], suspects


def _small(split: Split, row: int) -> Image | None:
    try:
        return thumbnail(split, row, side=2 * PICTURE)
    except UserError:
        return None


def _about(split: Split, row: int, reason: str) -> Finding:
    return Finding(str(split.names[row]), reason, "", np.nan, (row, -1))


def _copies(
    pairs: Int[np.ndarray, "m 2"],
    vectors: Float[np.ndarray, "n d"],
    split: Split,
    side: Int[np.ndarray, " n"],
    rows: Int[np.ndarray, " n"],
) -> list[Finding]:
    """One image of each pair.

    It is the later one of a pair within an item, that of the training of a pair on both sides, and
    of others that which is less similar to the nearest of its own item.
    """
    found = []
    for one, two in pairs.tolist():
        reason, kept, copy = "copy", one, two
        if side[one] != side[two]:
            reason, kept, copy = "copy on the other side", two, one
        elif split.labels[one] != split.labels[two]:
            reason = "copy in another item"
            if _own_similarity(one, vectors, split) < _own_similarity(two, vectors, split):
                kept, copy = two, one
        value = float(vectors[one] @ vectors[two])
        found.append(_finding(split, rows, copy, kept, reason, value))
    return sorted(found, key=lambda finding: (finding.reason, -finding.value))


def _own_similarity(row: int, vectors: Float[np.ndarray, "n d"], split: Split) -> float:
    others = np.setdiff1d(np.flatnonzero(split.labels == split.labels[row]), row)
    return float(np.max(vectors[others] @ vectors[row], initial=-1.0))


def _labels(
    suspects: SuspectLabels,
    split: Split,
    rows: Int[np.ndarray, " n"],
    judged: Int[np.ndarray, " m"],
) -> list[Finding]:
    """The images whose labels are called wrong, largest margins first."""
    margin, other = suspects.margins
    found = []
    for row in np.argsort(-margin, kind="stable"):
        if margin[row] < suspects.threshold:
            break
        pair = int(judged[row]), int(judged[other[row]])
        found.append(_finding(split, rows, *pair, "label", float(margin[row])))
    return found


def _finding(
    split: Split, rows: np.ndarray, row: int, other: int, reason: str, value: float
) -> Finding:
    names = str(split.names[row]), str(split.names[other])
    return Finding(names[0], reason, names[1], value, (int(rows[row]), int(rows[other])))


def exclusion_list(report: Report) -> str:
    """The findings as CSV, without those of ``ALONE``: each image once, with its first reason."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([COLUMN, "reason", "other", "value"])
    seen = set()
    for finding in report.findings:
        if finding.name not in seen and finding.reason != ALONE:
            seen.add(finding.name)
            value = "" if np.isnan(finding.value) else f"{finding.value:.4f}"
            writer.writerow([finding.name, finding.reason, finding.other, value])
    return file.getvalue()

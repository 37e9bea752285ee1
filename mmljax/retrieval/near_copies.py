"""Pairs of images that are near copies: cut, resized, brightened or compressed again."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float, Int

from mmljax.retrieval.search import nearest_neighbors

PICTURE = 32
"""Side of the small grey pictures that are compared."""

_CUTS = (0.0, 0.025, 0.05)  # shares of a side that may be cut off at either end
_CELLS = 12  # a window is compared as this many cells a side
_BLOCK = 1024  # pairs whose windows are held at once


def near_copies(
    embeddings: Float[np.ndarray, "n d"],
    pictures: Float[np.ndarray, "n p p"],
    *,
    similarity: float,
    correlation: float,
    k: int = 5,
) -> Int[np.ndarray, "m 2"]:
    """Pairs of images, lower row first, that are near copies of each other.

    A pair is one where one image is among the ``k`` nearest of the other by embeddings, their
    cosine is at least ``similarity``, and their small pictures correlate by at least
    ``correlation`` (:func:`aligned_correlation`). Embeddings find candidates; pictures tell copies
    from other photographs of one thing.

    Args:
      embeddings: of unit length.
      pictures: grey values of the whole images, squeezed to one size.
      similarity: least cosine of two embeddings.
      correlation: least correlation of two pictures.
      k: neighbours of each image that are looked at.
    """
    count = len(embeddings)
    own = np.arange(count, dtype=np.int32)
    found = nearest_neighbors(embeddings, embeddings, k=min(k, count - 1), self_index=own)
    first, place = np.nonzero(np.asarray(found.similarity) >= similarity)
    pairs = np.sort(np.stack([first, np.asarray(found.indices)[first, place]], axis=1), axis=1)
    pairs = np.unique(pairs, axis=0)
    alike = [
        aligned_correlation(pictures[block[:, 0]], pictures[block[:, 1]])
        for block in np.split(pairs, range(_BLOCK, len(pairs), _BLOCK))
    ]
    return pairs[np.concatenate(alike) >= correlation]


def aligned_correlation(
    one: Float[np.ndarray, "m p p"], other: Float[np.ndarray, "m p p"]
) -> Float[np.ndarray, " m"]:
    """The highest correlation of one whole picture with a window of the other, either way.

    A window leaves out 0, 2.5 or 5 % at each of the four edges. Whole and window are compared as
    means over 12 x 12 cells; the correlation does not see brightness and contrast. A picture of one
    grey value correlates with none.
    """
    ends = itertools.product(_CUTS, _CUTS)
    cells = np.stack([_cells(one.shape[1], *cut) for cut in ends]).astype(np.float32)
    best = np.full(len(one), -1, np.float32)
    for whole, cut in ((one, other), (other, one)):
        target = _standard(cells[0] @ whole @ cells[0].T)
        for rows in cells:
            bands = rows @ cut
            for columns in cells:
                window = _standard(bands @ columns.T)
                best = np.maximum(best, np.einsum("mij,mij->m", target, window))
    return best


def _cells(side: int, before: float, after: float) -> Float[np.ndarray, "c p"]:
    """The matrix that gives means over the cells of a line without its ends."""
    edges = np.linspace(before * side, (1 - after) * side, _CELLS + 1)
    pixels = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.maximum(overlap, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _standard(pictures: Float[np.ndarray, "m c c"]) -> Float[np.ndarray, "m c c"]:
    centred = pictures - pictures.mean(axis=(1, 2), keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=(1, 2), keepdims=True), 1.0)

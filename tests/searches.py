"""Search cases with exact products and many ties, and the answer of a stable argsort in float64."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh


class Case(NamedTuple):
    queries: int
    gallery: int
    size: int
    k: int
    chunk: int
    self_retrieval: bool


SEARCHES = {
    "several_chunks": Case(37, 1000, 6, 5, 256, False),
    "one_grouped_chunk": Case(33, 2085, 3, 3, 4096, True),
    "grouped_chunks_and_query_blocks": Case(523, 2501, 4, 2, 1300, True),
    "all_neighbours": Case(131, 131, 3, 130, 1000, True),
    "fewer_rows_than_devices": Case(9, 5, 2, 5, 1, False),
}
DATA = ("few_values", "fewest_values", "negative", "collapsed")


def make(case: Case, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Small integers: their float32 products are exact and often equal."""
    random = np.random.default_rng(seed)
    span = {"few_values": 3, "fewest_values": 1, "negative": 3, "collapsed": 1}[kind]
    gallery = random.integers(-span, span + 1, (case.gallery, case.size))
    queries = random.integers(-span, span + 1, (case.queries, case.size))
    if kind == "collapsed":
        gallery[:], queries[:] = 1, 1
    own = random.permutation(case.gallery)[: case.queries] if case.self_retrieval else None
    if own is not None:
        queries = gallery[own]
    if kind == "negative":  # padding, of similarity 0, would be ranked first
        queries, gallery = abs(queries) + 1, -abs(gallery) - 1
    return queries.astype(np.float32), gallery.astype(np.float32), own


def real_valued() -> tuple[np.ndarray, np.ndarray]:
    """Queries, which are the first rows of the gallery, and a gallery with ties far apart."""
    random = np.random.default_rng(0)
    gallery = random.normal(size=(1501, 96)).astype(np.float32)
    gallery[700:900] = gallery[:200]
    return gallery[:70], gallery


def stable_argsort(
    queries: np.ndarray, gallery: np.ndarray, own: np.ndarray | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    similarity = queries.astype(np.float64) @ gallery.astype(np.float64).T
    if own is not None:
        similarity[np.arange(len(queries)), own] = -np.inf
    index = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, index, axis=1), index


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))

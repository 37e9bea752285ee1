"""Exact neighbours in a gallery that lies on the host or on disk, larger than a device's memory.

>>> import numpy as np
>>> found = streamed_nearest_neighbors(np.eye(2), np.eye(2)[::-1], k=2, chunk=1)
>>> found.indices.tolist()
[[1, 0], [0, 1]]
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mmljax.retrieval.search import QUERY_BLOCK
from mmljax.retrieval.top_k import (
    WIDTH,
    Neighbors,
    block_rows,
    check_search,
    merge,
    own_rows,
    pad_rows,
    round_up,
    search_chunk,
)


def streamed_nearest_neighbors(
    queries: Float[Array, "q d"],
    gallery: Float[np.ndarray, "g d"],
    *,
    k: int,
    chunk: int,
    self_index: Int[Array, " q"] | None = None,
) -> Neighbors:
    """:func:`mmljax.retrieval.search.nearest_neighbors` in a gallery that stays in host memory or on disk.

    The gallery is read once, chunk after chunk, each of which meets all queries; while the device
    searches one chunk the next is read. So the device holds the queries, their ``k`` best so far,
    two chunks, and the similarities of one chunk to ``QUERY_BLOCK`` queries. The host holds two
    chunks besides the gallery; of a memory-mapped gallery (``numpy.load(path, mmap_mode="r")``) the
    pages that were read are given back, so that its size does not matter.

    The result equals that of ``nearest_neighbors`` in every bit, ties included, on a backend that
    rounds an inner product alike in all blocks whose widths are multiples of 128 (XLA's CPU does).

    Args:
      queries: finite embeddings, few enough to lie on the device.
      gallery: embeddings to search, of any floating type: an array, or one mapped from a file.
      k: neighbours per query.
      chunk: gallery rows on their way at once, rounded up to a multiple of 128 that holds ``k``.
      self_index: each query's own row of the gallery, which it shall not find.

    Raises:
      UserError: the gallery has fewer than ``k`` rows to find, or ``k`` or ``chunk`` is below 1.
    """
    check_search(queries, gallery, k, chunk, self_index)
    gallery = np.asarray(gallery)
    rows, count = len(gallery), len(queries)
    width = round_up(max(min(chunk, rows), k), WIDTH)
    blocks, block = block_rows(count, QUERY_BLOCK)

    def split(x: Array) -> Array:
        return pad_rows(x, blocks * block).reshape(blocks, block, *x.shape[1:])

    own = split(own_rows(self_index, queries))
    queries = split(jnp.asarray(queries, jnp.float32))
    best = Neighbors(
        jnp.full((blocks, block, k), -jnp.inf, jnp.float32),
        jnp.zeros((blocks, block, k), jnp.int32),
    )
    for first, part in _parts(gallery, width):
        on_device = jax.device_put(part)  # while the last part is still being searched
        jax.block_until_ready(best)  # or the host would run ahead, and fill the device with parts
        best = _search_part(best, queries, own, on_device, first, rows, k=k)
    return Neighbors(*(x.reshape(blocks * block, k)[:count] for x in best))


@functools.partial(jax.jit, static_argnames="k")
def _search_part(
    best: Neighbors, queries: Array, own: Array, part: Array, first: Array, rows: Array, *, k: int
) -> Neighbors:
    """The best of what was found before and of one part of the gallery, for all query blocks."""

    def search(items: tuple[Neighbors, Array, Array]) -> Neighbors:
        best, queries, own = items
        new = search_chunk(queries, own, part, first=first, rows=rows, k=k)
        return merge(best, new, k=k)

    return lax.map(search, (best, queries, own))


def _parts(gallery: np.ndarray, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """First row and float32 copy of each part; the last one is padded."""
    for first in range(0, len(gallery), width):
        rows = gallery[first : first + width]
        part = np.zeros((width, gallery.shape[1]), np.float32)
        part[: len(rows)] = rows
        _give_back(rows)
        yield first, part


def _give_back(rows: np.ndarray) -> None:
    """Let go of the pages of a file that reading these rows of a mapped array brought in.

    They stay in the system's cache while it has room; no value is lost, as only maps that write
    to the file itself, or not at all, are touched.
    """
    mapped: Any = rows
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    pages = mapped.base
    if not isinstance(pages, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    if getattr(mapped, "mode", "c") == "c":  # copy on write: its changes are nowhere else
        return
    end = np.lib.array_utils.byte_bounds(rows)[1] - np.frombuffer(pages, np.uint8).ctypes.data
    pages.madvise(mmap.MADV_DONTNEED, 0, end)  # from the start: systems bring in neighbours too

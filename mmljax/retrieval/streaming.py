"""Exact neighbours in a gallery on the host or on disk, which may exceed a device's memory."""

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
from numpy.typing import DTypeLike

from mmljax.retrieval.checks import check_embeddings, check_search
from mmljax.retrieval.quantization import Codes, decode
from mmljax.retrieval.search import CHUNK, QUERY_BLOCK
from mmljax.retrieval.top_k import (
    WIDTH,
    Neighbors,
    block_rows,
    merge,
    own_rows,
    pad_rows,
    round_up,
    search_chunk,
)


def streamed_nearest_neighbors(
    queries: Float[Array, "q d"],
    gallery: Float[np.ndarray, "g d"] | Codes,
    *,
    k: int,
    chunk: int = CHUNK,
    self_index: Int[Array, " q"] | None = None,
    unit: bool = False,
) -> Neighbors:
    """Search as :func:`mmljax.retrieval.search.nearest_neighbors`, with the gallery on the host.

    The gallery is read once, chunk by chunk; each chunk meets all queries, and the next one is read
    while the device searches. So the device holds the queries, their ``k`` best so far, two
    chunks, and the similarities of one chunk to ``QUERY_BLOCK`` queries. The host holds two chunks
    besides the gallery; pages of a memory-mapped gallery (``numpy.load(path, mmap_mode="r")``) are
    released after they are read, so its size does not matter.

    The result equals that of ``nearest_neighbors`` in every bit, ties included, on a backend that
    rounds an inner product alike in all blocks whose widths are multiples of 128 (XLA's CPU does).

    >>> import numpy as np
    >>> found = streamed_nearest_neighbors(np.eye(2), np.eye(2)[::-1], k=2, chunk=1)
    >>> found.indices.tolist()
    [[1, 0], [0, 1]]

    Args:
      queries: finite embeddings, few enough for the device.
      gallery: embeddings to search, of any floating type: an array, or one mapped from a file; or
        their codes, which are decoded on the device.
      k: neighbours per query.
      chunk: gallery rows on the device at once, rounded up to a multiple of 128 that holds ``k``.
      self_index: each query's own row of the gallery, which is excluded from its search.
      unit: refuse query rows, and gallery rows other than codes, that are not of unit length.

    Returns:
      Similarities in falling order and gallery indices, ``[q k]`` each, on the device.

    Raises:
      UserError: the gallery has fewer than ``k`` rows to find, ``k`` or ``chunk`` is below 1, the
        embedding sizes differ, or an embedding is not finite or, with ``unit``, not of unit length.
    """
    if not isinstance(gallery, Codes):
        gallery = np.asarray(gallery)
    check_search(queries, gallery, k=k, chunk=chunk, self_index=self_index)
    check_embeddings(queries, name="query", unit=unit)
    rows, count = gallery.shape[0], len(queries)
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
    for first, part in _parts(gallery, width, unit=unit):
        on_device = jax.device_put(part)  # while the previous part is still being searched
        jax.block_until_ready(best)  # else the host would fill the device with parts
        best = _search_part(best, queries, own, on_device, first, rows, k=k)
    return Neighbors(*(x.reshape(blocks * block, k)[:count] for x in best))


@functools.partial(jax.jit, static_argnames="k")
def _search_part(
    best: Neighbors,
    queries: Array,
    own: Array,
    part: Array | tuple[Array, Array],
    first: Array,
    rows: Array,
    *,
    k: int,
) -> Neighbors:
    """Merge the best so far with those of one part of the gallery, for all query blocks."""
    gallery = decode(*part, size=queries.shape[-1]) if isinstance(part, tuple) else part

    def search(items: tuple[Neighbors, Array, Array]) -> Neighbors:
        best, queries, own = items
        above = best.similarity[:, -1]
        new = search_chunk(queries, own, gallery, first=first, rows=rows, k=k, above=above)
        return merge(best, new, k=k)

    return lax.map(search, (best, queries, own))


def _parts(
    gallery: np.ndarray | Codes, width: int, *, unit: bool
) -> Iterator[tuple[int, np.ndarray | tuple[np.ndarray, np.ndarray]]]:
    """First row of each part, and its float32 rows or its codes; the last part is padded."""
    for first in range(0, gallery.shape[0], width):
        rows = slice(first, first + width)
        if isinstance(gallery, Codes):
            values = _padded(gallery.values[rows], width, gallery.values.dtype)
            yield first, (values, _padded(gallery.scale[rows], width, np.float32))
        else:
            part = _padded(gallery[rows], width, np.float32)
            held = part[: len(gallery) - first]
            check_embeddings(held, name="gallery", unit=unit, first=first)
            yield first, part


def _padded(rows: np.ndarray, width: int, dtype: DTypeLike) -> np.ndarray:
    """A copy with zeros below; the pages that the rows were read from are released."""
    part = np.zeros((width, *rows.shape[1:]), dtype)
    with np.errstate(over="ignore"):  # what is too large for float32 is refused as infinite
        part[: len(rows)] = rows
    release_pages(rows)
    return part


def release_pages(rows: np.ndarray) -> None:
    """Release the pages of a file that were read into memory with these rows of a mapped array.

    They stay in the system's cache while it has room. No value is lost: only maps that are
    read-only, or that write to the file itself, are touched.

    >>> release_pages(np.zeros((2, 3)))  # of no file: nothing is to be done
    """
    mapped: Any = rows
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    pages = mapped.base
    if not isinstance(pages, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    if getattr(mapped, "mode", "c") == "c":  # copy on write: its changes exist only in memory
        return
    end = np.lib.array_utils.byte_bounds(rows)[1] - np.frombuffer(pages, np.uint8).ctypes.data
    pages.madvise(mmap.MADV_DONTNEED, 0, end)  # from the start: systems read ahead

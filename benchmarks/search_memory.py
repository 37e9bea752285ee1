"""Peak memory of exact search in a large gallery on the device, on the host or in a file.

    python -m benchmarks.search_memory --gallery device
    python -m benchmarks.search_memory --gallery host
    python -m benchmarks.search_memory --gallery mapped
    python -m benchmarks.search_memory --gallery mapped --dtype int8 --rescore 200

A million rows of 512 dimensions (1.91 GiB), 10,000 queries, k = 50. Prints the peak of the whole
process, on CPU, and compares some queries with a sort in float64. With ``--dtype`` the codes are on
the host or mapped; what ``--rescore`` reads of the float32 rows is mapped always.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from mmljax.numerics import l2_normalize
from mmljax.retrieval.quantization import Codes, quantize
from mmljax.retrieval.rescoring import rescored_nearest_neighbors
from mmljax.retrieval.search import nearest_neighbors
from mmljax.retrieval.streaming import streamed_nearest_neighbors

GIB = 2**30
BLOCK = 1000  # rows made at once


def block(seed: int, size: int) -> np.ndarray:
    """Random unit vectors."""
    x = np.random.default_rng(seed).standard_normal((BLOCK, size), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


Search = Callable[[], np.ndarray]


def on_device(rows: int, size: int) -> jax.Array:
    """Random unit vectors made on the device, without a second copy."""

    @jax.jit
    def make(keys: jax.Array) -> jax.Array:
        blocks = jax.lax.map(lambda key: l2_normalize(jax.random.normal(key, (BLOCK, size))), keys)
        return blocks.reshape(rows, size)

    return jax.block_until_ready(make(jax.random.split(jax.random.key(0), rows // BLOCK)))


def on_host(rows: int, size: int, file: Path | None) -> np.ndarray:
    """The same in an array, or mapped from a file."""
    if file is None:
        gallery = np.empty((rows, size), np.float32)
        for i in range(rows // BLOCK):
            gallery[i * BLOCK : (i + 1) * BLOCK] = block(i, size)
        return gallery
    with file.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, size)}
        np.lib.format.write_array_header_1_0(stream, header)
        for i in range(rows // BLOCK):
            stream.write(block(i, size).tobytes())
    return np.load(file, mmap_mode="r")


def small_on_host(rows: int, size: int, dtype: str, file: Path | None) -> Codes:
    """The codes of the same in arrays, or their values mapped from a file."""
    empty = quantize(np.zeros((0, size), np.float32), dtype=dtype).values
    shape = rows, empty.shape[1]
    values = np.empty(shape if file is None else (0, 0), empty.dtype)
    scale, error = np.empty(rows, np.float32), np.empty(rows, np.float32)
    with open(file or os.devnull, "wb") as stream:
        for i in range(rows // BLOCK):
            place = slice(i * BLOCK, (i + 1) * BLOCK)
            codes = quantize(block(i, size), dtype=dtype)
            scale[place], error[place] = codes.scale, codes.error
            if file is None:
                values[place] = codes.values
            else:
                stream.write(codes.values.tobytes())
    if file is not None:
        values = np.memmap(file, empty.dtype, mode="r", shape=shape)
    return Codes(values, scale, error, size)


def plain_search(options: argparse.Namespace, queries: np.ndarray, folder: Path) -> Search:
    """The search of float32 rows, which are made here."""
    rows, size, k, chunk = options.rows, options.dimensions, options.k, options.chunk
    if options.gallery == "device":
        gallery = on_device(rows, size)
        return lambda: np.asarray(
            nearest_neighbors(jnp.asarray(queries), gallery, k=k, chunk=chunk).indices
        )
    file = folder / "gallery.npy" if options.gallery == "mapped" else None
    on = on_host(rows, size, file)
    return lambda: np.asarray(streamed_nearest_neighbors(queries, on, k=k, chunk=chunk).indices)


def small_search(options: argparse.Namespace, queries: np.ndarray, folder: Path) -> Search:
    """The search of codes, which are made here."""
    rows, size, k, chunk = options.rows, options.dimensions, options.k, options.chunk
    file = folder / "codes" if options.gallery == "mapped" else None
    codes = small_on_host(rows, size, options.dtype, file)
    if options.rescore is None:
        return lambda: np.asarray(
            streamed_nearest_neighbors(queries, codes, k=k, chunk=chunk).indices
        )
    gallery = on_host(rows, size, folder / "gallery.npy")

    def search() -> np.ndarray:
        found, proved = rescored_nearest_neighbors(
            queries, codes, gallery, k=k, candidates=options.rescore, chunk=chunk
        )
        print(f"{proved.sum()} of {len(queries)} queries proved")
        return np.asarray(found.indices)

    return search


def check(options: argparse.Namespace, queries: np.ndarray, indices: np.ndarray) -> str:
    """Compare some queries with a sort in float64, up to float32 rounding."""
    count, k, size = min(20, len(queries)), options.k, options.dimensions
    gallery = on_device(options.rows, size) if options.gallery == "device" else None

    def rows(i: int) -> np.ndarray:
        return block(i, size) if gallery is None else np.asarray(gallery[i * BLOCK :][:BLOCK])

    blocks = range(options.rows // BLOCK)
    similarity = np.concatenate(
        [queries[:count].astype(np.float64) @ rows(i).T for i in blocks], axis=1
    )
    best = -np.sort(-similarity, axis=1)[:, :k]
    found = np.take_along_axis(similarity, indices[:count], axis=1)
    assert all(len(np.unique(row)) == k for row in indices[:count])
    if options.dtype == "float32":
        np.testing.assert_allclose(found, best, rtol=0, atol=1e-6)
        return f"{count} queries equal a sort in float64"
    recall = np.mean(found >= best[:, -1:] - 1e-6)
    return f"recall of the {k} nearest, against a sort in float64 of {count} queries: {recall:.4f}"


def main() -> None:
    """Make, search once, print, check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gallery", choices=["device", "host", "mapped"], default="device")
    parser.add_argument("--dtype", choices=["float32", "int8", "binary"], default="float32")
    parser.add_argument("--rescore", type=int, help="candidates; default: none")
    parser.add_argument("--rows", type=int, default=1_000_000, help=f"a multiple of {BLOCK}")
    parser.add_argument("--queries", type=int, default=10_000, help=f"a multiple of {BLOCK}")
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--chunk", type=int, default=65_536)
    options = parser.parse_args()
    if options.rows % BLOCK or options.queries % BLOCK:
        parser.error(f"--rows and --queries must be multiples of {BLOCK}")
    small = options.dtype != "float32"
    if small and options.gallery == "device":
        parser.error("codes are on the host or mapped; add --gallery host or mapped")
    size = options.dimensions
    parts = range(options.rows, options.rows + options.queries // BLOCK)
    queries = np.concatenate([block(i, size) for i in parts])
    with tempfile.TemporaryDirectory() as folder:
        search = (small_search if small else plain_search)(options, queries, Path(folder))
        begin = time.perf_counter()
        indices = search()
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = options.rows * size * 4
    print(machine.describe())
    print(
        f"{options.rows} x {size} {options.dtype} on {options.gallery}, {options.queries} queries, "
        f"k {options.k}, chunk {options.chunk}: {seconds:.1f} s with compilation"
    )
    print(
        f"float32 gallery {own / GIB:.2f} GiB; peak of the process {peak / GIB:.2f} GiB, "
        f"{peak / own:.0%} of it, {(peak - own) / GIB:+.2f} GiB beside it"
    )
    print(check(options, queries, indices))


if __name__ == "__main__":
    main()

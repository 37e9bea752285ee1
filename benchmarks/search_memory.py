"""Peak memory of exact search in a large gallery on the device, on the host or in a file.

    python -m benchmarks.search_memory --gallery device
    python -m benchmarks.search_memory --gallery host
    python -m benchmarks.search_memory --gallery mapped

A million rows of 512 dimensions (1.91 GiB), 10,000 queries, k = 50. Prints the peak of the whole
process, on CPU, and compares some queries with a sort in float64.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from mmljax.numerics import l2_normalize
from mmljax.retrieval.search import nearest_neighbors
from mmljax.retrieval.streaming import streamed_nearest_neighbors

GIB = 2**30
BLOCK = 1000  # rows made at once


def block(seed: int, size: int) -> np.ndarray:
    """Random unit vectors."""
    x = np.random.default_rng(seed).standard_normal((BLOCK, size), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


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


def check(queries: np.ndarray, gallery: np.ndarray, indices: np.ndarray) -> int:
    """Compare with float64 up to float32 rounding; returns how many queries were compared."""
    count, k = min(20, len(queries)), indices.shape[1]
    similarity = np.concatenate(
        [
            queries[:count].astype(np.float64) @ np.asarray(gallery[i : i + BLOCK]).T
            for i in range(0, len(gallery), BLOCK)
        ],
        axis=1,
    )
    best = -np.sort(-similarity, axis=1)[:, :k]
    found = np.take_along_axis(similarity, indices[:count], axis=1)
    np.testing.assert_allclose(found, best, rtol=0, atol=1e-6)
    assert all(len(np.unique(row)) == k for row in indices[:count])
    return count


def main() -> None:
    """Make, search once, print, check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gallery", choices=["device", "host", "mapped"], default="device")
    parser.add_argument("--rows", type=int, default=1_000_000, help=f"a multiple of {BLOCK}")
    parser.add_argument("--queries", type=int, default=10_000, help=f"a multiple of {BLOCK}")
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--chunk", type=int, default=65_536)
    options = parser.parse_args()
    if options.rows % BLOCK or options.queries % BLOCK:
        parser.error(f"--rows and --queries must be multiples of {BLOCK}")
    size = options.dimensions
    queries = np.concatenate(
        [block(options.rows + i, size) for i in range(options.queries // BLOCK)]
    )
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        if options.gallery == "device":
            gallery = on_device(options.rows, size)
            begin = time.perf_counter()
            found = nearest_neighbors(
                jnp.asarray(queries), gallery, k=options.k, chunk=options.chunk
            )
        else:
            file = Path(folder) / "gallery.npy" if options.gallery == "mapped" else None
            gallery = on_host(options.rows, size, file)
            begin = time.perf_counter()
            found = streamed_nearest_neighbors(queries, gallery, k=options.k, chunk=options.chunk)
        indices = np.asarray(found.indices)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        own = options.rows * size * 4
        print(machine.describe())
        print(
            f"{options.rows} x {size} on {options.gallery}, {options.queries} queries, "
            f"k {options.k}, chunk {options.chunk}: {seconds:.1f} s with compilation"
        )
        print(
            f"gallery {own / GIB:.2f} GiB; peak of the process {peak / GIB:.2f} GiB, "
            f"{(peak - own) / GIB:+.2f} GiB besides the gallery"
        )
        print(f"{check(queries, gallery, indices)} queries equal a sort in float64")


if __name__ == "__main__":
    main()

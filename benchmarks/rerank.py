"""Time and peak memory of k-reciprocal re-ranking of many embeddings among themselves.

    python -m benchmarks.rerank

100,000 rows of 512 dimensions in clusters of 20; each row is searched among the others and its 100
nearest are re-ranked. Prints the peak of the whole process, on CPU.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from benchmarks import machine
from mmljax.retrieval.k_reciprocal import k_reciprocal_neighbors

GIB = 2**30
CLUSTER = 20  # rows of a cluster
NOISE = 1.5  # its length beside that of a center


def clustered(rows: int, size: int) -> np.ndarray:
    """Unit vectors around random centers."""
    random = np.random.default_rng(0)
    x = np.empty((rows, size), np.float32)
    for first in range(0, rows, CLUSTER):
        part = x[first : first + CLUSTER]
        part[:] = random.standard_normal(size, dtype=np.float32)
        part += NOISE * random.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return x


def main() -> None:
    """Make, re-rank once, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--k1", type=int, default=20)
    parser.add_argument("--k2", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=4096)
    options = parser.parse_args()
    rows, candidates = options.rows, options.candidates
    x = clustered(rows, options.dimensions)
    begin = time.perf_counter()
    found = k_reciprocal_neighbors(
        x,
        x,
        k=10,
        candidates=candidates,
        k1=options.k1,
        k2=options.k2,
        chunk=options.chunk,
        self_index=np.arange(rows),
    )
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    right = np.mean(found.indices[:, 0] // CLUSTER == np.arange(rows) // CLUSTER)
    print(machine.describe())
    print(
        f"{rows} x {options.dimensions}, k1 {options.k1}, k2 {options.k2}, "
        f"{candidates} candidates: {seconds:.0f} s with compilation; Recall@1 {right:.2%}"
    )
    print(
        f"embeddings {x.nbytes / GIB:.2f} GiB; peak of the process {peak / GIB:.2f} GiB, "
        f"{(peak - x.nbytes) / GIB:.2f} GiB beside them"
    )


if __name__ == "__main__":
    main()

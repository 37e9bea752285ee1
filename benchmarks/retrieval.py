"""Time exact retrieval: this project's search and rank counting, faiss, and torch.

    python -m benchmarks.retrieval                      # the size of In-Shop, k = 50
    python -m benchmarks.retrieval --size sop           # Stanford Online Products, k = 100
    python -m benchmarks.retrieval --peers faiss --chunk 8192

All sides search the same random unit vectors, run in turn within one process, and are reported by
their fastest run, because other load on the machine slows every side. The first run of each
(compilation) is not counted. ``ratio`` is a side's time over that of ``nearest_neighbors``. Ours
runs on JAX's default device, torch on CUDA if it has one, faiss on CPU; on CPU all use as many
threads as there are cores. Needs the extra ``peers``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mmljax.mesh import make_mesh
from mmljax.retrieval.search import nearest_neighbors, neighbors_and_ranks, positive_ranks

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Side = Callable[[], Any]


class Task(NamedTuple):
    """The sizes of one benchmark's test split."""

    queries: int
    gallery: int | None  # None: the queries, each without itself
    classes: int
    k: int


TASKS = {
    "inshop": Task(queries=14_218, gallery=12_612, classes=3_985, k=50),
    "sop": Task(queries=60_502, gallery=None, classes=11_316, k=100),
    "million": Task(queries=512, gallery=1_000_000, classes=200_000, k=100),
    "small": Task(queries=1_000, gallery=1_500, classes=300, k=10),
}


class Data(NamedTuple):
    """Unit vectors with labels; ``own`` is each query's gallery row, or None."""

    queries: np.ndarray
    gallery: np.ndarray
    query_labels: np.ndarray
    gallery_labels: np.ndarray
    own: np.ndarray | None


def make_data(task: Task, size: int) -> Data:
    """Noisy class centres on the unit sphere, in random order."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((task.classes, size), dtype=np.float32)

    def embed(rows: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, task.classes, rows).astype(np.int32)
        x = random.standard_normal((rows, size), dtype=np.float32)
        x *= 1.5  # in place, for the memory of a million rows
        x += centers[labels]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x, labels

    queries, query_labels = embed(task.queries)
    if task.gallery is None:
        own = np.arange(task.queries, dtype=np.int32)
        return Data(queries, queries, query_labels, query_labels, own)
    gallery, gallery_labels = embed(task.gallery)
    return Data(queries, gallery, query_labels, gallery_labels, None)


def our_sides(data: Data, k: int, chunk: int) -> dict[str, Side]:
    """The project's searches, on arrays that are already on the device."""
    on = jax.tree.map(jax.device_put, data)
    mesh = make_mesh(jax.devices()[:1])

    def search() -> Any:
        found = nearest_neighbors(on.queries, on.gallery, k=k, chunk=chunk, self_index=on.own)
        return jax.block_until_ready(found)

    def count() -> Any:
        ranks = positive_ranks(*on[:4], chunk=chunk, self_index=on.own)
        return jax.block_until_ready(ranks)

    def both() -> Any:
        results = neighbors_and_ranks(*on[:4], k=k, chunk=chunk, self_index=on.own, mesh=mesh)
        return jax.block_until_ready(results)

    return {
        "mmljax nearest_neighbors": search,
        "mmljax positive_ranks": count,
        "mmljax neighbors_and_ranks": both,
    }


def faiss_side(data: Data, k: int) -> tuple[str, Side]:
    """``IndexFlatIP``; with k + 1 if a query finds itself, because faiss excludes nothing."""
    faiss = import_peer("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(CORES)
    index = faiss.IndexFlatIP(data.gallery.shape[1])
    index.add(data.gallery)
    places = k + (data.own is not None)
    return f"faiss {faiss.__version__} IndexFlatIP", lambda: index.search(data.queries, places)


def torch_side(data: Data, k: int) -> tuple[str, Side]:
    """Matrix product and ``topk`` by blocks of 1024 queries."""
    torch = import_peer("torch", "torch")
    torch.set_num_threads(CORES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    queries, gallery = (torch.tensor(x, device=device) for x in (data.queries, data.gallery))
    places = k + (data.own is not None)

    def search() -> Any:
        found = [torch.topk(block @ gallery.T, places) for block in queries.split(1024)]
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return f"torch {torch.__version__} topk ({device})", search


PEERS = {"faiss": faiss_side, "torch": torch_side}


def import_peer(module: str, package: str) -> Any:
    """The peer's module, or an exit that says how to install it or run without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            f"{package} is not installed ({error}); pip install 'mmljax[peers]', or omit it "
            "with --peers"
        ) from None


def fastest(sides: dict[str, Side], repeats: int) -> dict[str, float]:
    """Seconds of each side's fastest run; the sides take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in seconds.items()}


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=TASKS, default="inshop", help="sizes of the data")
    parser.add_argument("--dimensions", type=int, default=512, help="embedding size")
    parser.add_argument("--chunk", type=int, default=65_536, help="gallery rows per product")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default="faiss,torch", help="of faiss,torch; or none")
    options = parser.parse_args()
    names = [] if options.peers == "none" else options.peers.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"--peers knows {', '.join(PEERS)} and none, not {', '.join(unknown)}")

    task = TASKS[options.size]
    data = make_data(task, options.dimensions)
    peers = dict(PEERS[name](data, task.k) for name in names)
    seconds = fastest(our_sides(data, task.k, options.chunk) | peers, options.repeats)

    device = jax.devices()[0]
    print(
        f"{datetime.date.today()}, {platform.machine()}, {CORES} cores; "
        f"jax {jax.__version__} on {device.platform} ({device.device_kind})"
    )
    print(
        f"{options.size}: {len(data.queries)} queries, {len(data.gallery)} gallery rows, "
        f"{options.dimensions} dimensions, k={task.k}, chunk {options.chunk}; "
        f"fastest of {options.repeats}"
    )
    ours = seconds["mmljax nearest_neighbors"]
    print(f"\n| {'side':34s} | seconds | ratio |\n|{'-' * 36}|---------|-------|")
    for name, value in seconds.items():
        print(f"| {name:34s} | {value:7.3f} | {value / ours:5.2f} |")


if __name__ == "__main__":
    main()

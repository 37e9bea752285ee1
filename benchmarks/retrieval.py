"""Time exact retrieval: this project's search and rank counting, faiss, and torch.

    python -m benchmarks.retrieval                               # the size of In-Shop, k = 50
    python -m benchmarks.retrieval --size sop                    # Stanford Online Products, k = 100
    python -m benchmarks.retrieval --sides nearest faiss --chunk 8192

All sides search the same random unit vectors. Each has a process of its own, so that the threads
and the memory of one do not slow another; the sides take turns, and the process of one that does
not run sleeps. The first run of each (compilation) is not counted. ``ratio`` is a side's time over
that of ``nearest_neighbors``, the median over the rounds. Ours runs on JAX's default device, torch
on CUDA if it has one, faiss on CPU; on CPU all use as many threads as there are cores. Needs the
extra ``peers``.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.machine import describe
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


def our_side(name: str, data: Data, k: int, chunk: int) -> Side:
    """One of the project's searches, on arrays that are already on the device."""
    on = jax.tree.map(jax.device_put, data)
    mesh = make_mesh(jax.devices()[:1])
    own = on.own
    search = {
        "nearest": lambda: nearest_neighbors(*on[:2], k=k, chunk=chunk, self_index=own),
        "ranks": lambda: positive_ranks(*on[:4], chunk=chunk, self_index=own),
        "both": lambda: neighbors_and_ranks(*on[:4], k=k, chunk=chunk, self_index=own, mesh=mesh),
    }[name]
    return lambda: jax.block_until_ready(search())


def faiss_side(data: Data, k: int) -> Side:
    """``IndexFlatIP``; with k + 1 if a query finds itself, because faiss excludes nothing."""
    faiss = import_peer("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(CORES)
    index = faiss.IndexFlatIP(data.gallery.shape[1])
    index.add(data.gallery)
    places = k + (data.own is not None)
    return lambda: index.search(data.queries, places)


def torch_side(data: Data, k: int) -> Side:
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

    return search


SIDES = {
    "nearest": "mmljax nearest_neighbors",
    "ranks": "mmljax positive_ranks",
    "both": "mmljax neighbors_and_ranks",
    "faiss": "faiss IndexFlatIP",
    "torch": "torch topk",
}


def import_peer(module: str, package: str) -> Any:
    """The peer's module, or an exit that says how to install it or run without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            f"{package} is not installed ({error}); pip install 'mmljax[peers]', or leave it "
            "out of --sides"
        ) from None


def serve(connection: Connection, name: str, options: argparse.Namespace) -> None:
    """Run a side once for each message, and answer with its seconds and CPU seconds."""
    task = TASKS[options.size]
    data = make_data(task, options.dimensions)
    peers = {"faiss": faiss_side, "torch": torch_side}
    if name in peers:
        side = peers[name](data, task.k)
    else:
        side = our_side(name, data, task.k, options.chunk)
    side()
    connection.send(None)
    while connection.recv():
        start = time.perf_counter(), time.process_time()
        side()
        connection.send((time.perf_counter() - start[0], time.process_time() - start[1]))


def measure(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Seconds and CPU seconds ``[repeats 2]`` of each side; the sides take turns."""
    spawn = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    for name in options.sides:
        connections[name], end = spawn.Pipe()
        spawn.Process(target=serve, args=(end, name, options), daemon=True).start()
        end.close()
        try:
            connections[name].recv()
        except EOFError:
            raise SystemExit(f"{SIDES[name]} could not start: its error is above") from None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in options.sides}
    for _ in range(options.repeats):
        for name, connection in connections.items():
            connection.send(True)
            times[name].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    return {name: np.array(pairs) for name, pairs in times.items()}


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=TASKS, default="inshop", help="sizes of the data")
    parser.add_argument("--dimensions", type=int, default=512, help="embedding size")
    parser.add_argument("--chunk", type=int, default=65_536, help="gallery rows per product")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    if "nearest" not in options.sides:
        parser.error("--sides lacks nearest, which the ratios refer to")
    seconds = measure(options)

    task = TASKS[options.size]
    print(describe())
    print(
        f"{options.size}: {task.queries} queries, {task.gallery or task.queries} gallery rows, "
        f"{options.dimensions} dimensions, k={task.k}, chunk {options.chunk}; "
        f"medians of {options.repeats}"
    )
    print(f"\n| {'side':26s} | seconds | CPU s | ratio | of the rounds |")
    print(f"|{'-' * 28}|---------|-------|-------|---------------|")
    for name, pairs in seconds.items():
        wall, cpu = np.median(pairs, axis=0)
        ratios = pairs[:, 0] / seconds["nearest"][:, 0]
        print(
            f"| {SIDES[name]:26s} | {wall:7.3f} | {cpu:5.2f} | {np.median(ratios):5.2f} | "
            f"{ratios.min():.2f} to {ratios.max():.2f}  |"
        )


if __name__ == "__main__":
    main()

"""Time an evaluation of In-Shop's size, embeddings given: before and after it stayed on the device.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --chunk 32768 --no-geometry

``before`` is how evaluation worked first: embeddings go to the host, the search for ranks and the
search for neighbours each send them back and multiply queries and gallery, and the metrics run
operation by operation. ``after`` is :func:`mmljax.retrieval.evaluate.retrieval_scores`. The two run
in turn in one process; the first run of each (compilation) is not counted. Both use today's
diagnostics, so what these gained is not in the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.retrieval import TASKS, Data, make_data
from mmljax.mesh import make_mesh
from mmljax.retrieval import metrics
from mmljax.retrieval.diagnostics import embedding_density, spectral_decay
from mmljax.retrieval.evaluate import retrieval_scores
from mmljax.retrieval.search import nearest_neighbors, positive_ranks

RECALL_AT = (1, 10, 20, 30, 40, 50)
Scores = dict[str, float]


class Before:
    """The first way, with the seconds of its parts."""

    def __init__(self, data: Data, relevant: np.ndarray, *, chunk: int, geometry: bool) -> None:
        self.data, self.relevant, self.chunk, self.geometry = data, relevant, chunk, geometry
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, function: Callable[[], object]) -> object:
        """The function's result; its time is added to the part ``name``."""
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def __call__(self) -> Scores:
        """The scores."""
        data, k = self.data, max(*RECALL_AT, int(self.relevant.max()))
        queries, gallery = self.timed("fetch", lambda: tuple(map(np.asarray, data[:2])))
        arrays = queries, gallery, data.query_labels, data.gallery_labels
        ranks = self.timed("ranks", lambda: positive_ranks(*arrays, chunk=self.chunk))
        found = self.timed(
            "neighbours", lambda: nearest_neighbors(queries, gallery, k=k + 1, chunk=self.chunk)
        )
        values = self.timed("metrics", lambda: self.values(ranks, found, k))
        counted = self.relevant > 0
        scores = {key: float(np.asarray(x)[counted].mean()) for key, x in values.items()}
        if self.geometry:
            scores |= self.timed("diagnostics", lambda: self.shape(queries, gallery))
        return scores

    def values(self, ranks: object, found: object, k: int) -> dict[str, jax.Array]:
        """Values per query, operation by operation."""
        data, relevant = self.data, self.relevant
        values = {}
        for at in RECALL_AT:
            values[f"recall@{at}"] = (ranks.above + ranks.tied < at).astype(jnp.float32)
            values[f"recall_optimistic@{at}"] = (ranks.above < at).astype(jnp.float32)
            values[f"recall_expected@{at}"] = 1 - missed(ranks, at)
        values["mrr"] = 1 / (ranks.above + ranks.tied + 1)
        values["tie_rate"] = ranks.tied > 0
        hits = data.gallery_labels[np.asarray(found.indices)] == data.query_labels[:, None]
        hits = metrics.pessimistic_relevance(found.similarity, jnp.asarray(hits), k=k)
        values["r_precision"] = metrics.r_precision(hits, relevant).value
        values["map@r"] = metrics.map_at_r(hits, relevant).value
        most = max(RECALL_AT)
        values[f"map@{most}"] = metrics.map_at_k(hits, relevant, k=most).value
        return values

    def shape(self, queries: np.ndarray, gallery: np.ndarray) -> Scores:
        """The diagnostics."""
        data = self.data
        every = np.concatenate([queries, gallery])
        labels = np.concatenate([data.query_labels, data.gallery_labels])
        density, decay = embedding_density(every, labels), spectral_decay(every)
        return {"embedding_density": density, "spectral_decay": decay}


def missed(ranks: object, k: int) -> jax.Array:
    """As the first way had it: a loop that every call compiles again."""

    def fill(place: jax.Array, miss: jax.Array) -> jax.Array:
        left = jnp.maximum(ranks.tied - place, 0)
        share = left / jnp.maximum(left + ranks.tied_relevant, 1)
        return jnp.where(place < k - ranks.above, miss * share, miss)

    return jax.lax.fori_loop(0, k, fill, jnp.ones(ranks.above.shape))


def main() -> None:
    """Parse, time in turn, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["inshop", "small"], default="inshop")
    parser.add_argument("--dimensions", type=int, default=512, help="embedding size")
    parser.add_argument("--chunk", type=int, default=4096, help="default 4096, as of a run")
    parser.add_argument("--geometry", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    data = make_data(TASKS[options.size], options.dimensions)
    data = data._replace(queries=jnp.asarray(data.queries), gallery=jnp.asarray(data.gallery))
    mesh = make_mesh(jax.devices()[:1])
    relevant = np.bincount(data.gallery_labels, minlength=TASKS[options.size].classes)
    relevant = relevant[data.query_labels]
    before = Before(data, relevant, chunk=options.chunk, geometry=options.geometry)

    def after() -> Scores:
        return retrieval_scores(
            data.queries,
            data.query_labels,
            data.gallery,
            data.gallery_labels,
            recall_at=RECALL_AT,
            chunk=options.chunk,
            mesh=mesh,
            geometry=options.geometry,
        ).scores

    sides: dict[str, Callable[[], Scores]] = {"before": before, "after": after}
    scores = {name: side() for name, side in sides.items()}
    for name, value in scores["after"].items():
        np.testing.assert_allclose(value, scores["before"][name], rtol=1e-5, err_msg=name)
    before.seconds = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    print(machine.describe())
    print(
        f"{options.size}: {len(data.queries)} queries, {len(data.gallery)} gallery rows, "
        f"{options.dimensions} dimensions, chunk {options.chunk}, geometry {options.geometry}; "
        f"median of {options.repeats}; the {len(scores['after'])} scores are equal"
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    parts = {name: statistics.median(times) for name, times in before.seconds.items()}
    for name, value in median.items():
        print(f"{name:6}  {value:6.2f} s")
    print("of before: " + ", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    print(f"ratio   {median['before'] / median['after']:6.2f}")


if __name__ == "__main__":
    main()

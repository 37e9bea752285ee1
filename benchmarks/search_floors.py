"""Time the parts of exact retrieval, and ways to make it faster that the search does not use.

    python -m benchmarks.search_floors                  # the size of In-Shop, k = 50
    python -m benchmarks.search_floors --size million --sides product --repeats 3

The matrix products alone are what no search by products of that kind can go below. ``selection``
is the top-k of similarities that are there already. ``nearest_neighbors`` is timed as it is, and
with other blocks, chunks and groups; ``screened`` is a search by bfloat16 products whose candidates
are scored again in float32 (:func:`screened_search`). The sides take turns within one process. Of
each are printed the medians of seconds and of CPU seconds, and the medians over the rounds of its
times divided by those of ``nearest_neighbors``. On a machine with other work CPU seconds say more.
``benchmarks.retrieval`` compares with other libraries.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from benchmarks.machine import describe
from benchmarks.retrieval import TASKS, Data, Side, make_data
from mmljax.numerics import similarity_matrix
from mmljax.retrieval import search, top_k
from mmljax.retrieval.top_k import TOGETHER, WIDTH, Neighbors, in_blocks, pad_rows, round_up

_UNIT = 127 / 0.3  # int8 of coordinates up to 0.3: only the time of the product matters


def product_sides(data: Data) -> dict[str, Side]:
    """Products of all queries with the gallery, by blocks, the result of each block dropped."""
    queries, gallery = jnp.asarray(data.queries), _padded(data.gallery)
    small = {
        "float32": lambda x: x,
        "bfloat16": lambda x: x.astype(jnp.bfloat16),
        "int8": lambda x: jnp.clip(jnp.round(x * _UNIT), -127, 127).astype(jnp.int8),
    }

    @functools.partial(jax.jit, static_argnames="transposed")
    def product(queries: Array, gallery: Array, *, transposed: bool) -> tuple[Array]:
        total = jnp.int32 if queries.dtype == jnp.int8 else jnp.float32

        def block(queries: Array) -> tuple[Array]:
            columns = gallery if transposed else gallery.T
            result = jnp.matmul(queries, columns, precision="highest", preferred_element_type=total)
            return (lax.optimization_barrier(result)[:, :1],)

        return in_blocks(block, (queries,), block=search.QUERY_BLOCK)

    sides: dict[str, Side] = {}
    for name, convert in small.items():
        rows, columns = convert(queries), convert(gallery)
        sides[f"product {name}"] = functools.partial(product, rows, columns, transposed=False)
        turned = jax.jit(jnp.transpose)(columns)
        name = f"product {name}, gallery [d g]"
        sides[name] = functools.partial(product, rows, turned, transposed=True)
    sides["product float32 numpy"] = functools.partial(_numpy_product, data)
    return sides


def _numpy_product(data: Data) -> None:
    for first in range(0, len(data.queries), search.QUERY_BLOCK):
        np.matmul(data.queries[first : first + search.QUERY_BLOCK], data.gallery.T)


def selection_side(data: Data, k: int) -> Side:
    """The top-k of as many similarities as a search has; those of 2,048 queries, several times."""
    sample = jnp.asarray(data.queries[:2048])
    similarity = jax.jit(similarity_matrix)(sample, _padded(data.gallery))
    own, rows = jnp.full(len(sample), -1, jnp.int32), len(data.gallery)

    @jax.jit
    def select(similarity: Array, own: Array) -> Neighbors:
        select = functools.partial(top_k.grouped_top_k, rows=rows, k=k)
        return in_blocks(select, (similarity, own), block=search.QUERY_BLOCK)

    def all_queries() -> Any:
        return [select(similarity, own) for _ in range(-(-len(data.queries) // len(sample)))]

    return all_queries


def nearest_side(
    data: Data, k: int, *, chunk: int, block: int = search.QUERY_BLOCK, group: int | None = None
) -> Side:
    """``nearest_neighbors`` with other sizes of its parts."""
    queries, gallery = jnp.asarray(data.queries), jnp.asarray(data.gallery)
    own = None if data.own is None else jnp.asarray(data.own)

    @jax.jit
    def run(queries: Array, gallery: Array) -> Neighbors:
        sizes = top_k._group_size if group is None else lambda width, k: group
        with (
            mock.patch.object(search, "QUERY_BLOCK", block),
            mock.patch.object(top_k, "_group_size", sizes),
        ):
            return search._nearest.__wrapped__(queries, gallery, own, k=k, chunk=chunk)

    return functools.partial(run, queries, gallery)


@functools.partial(jax.jit, static_argnames=("k", "candidates"))
def screened_search(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"],
    half: Float[Array, "d w"],
    own: Array,
    *,
    k: int,
    candidates: int,
) -> tuple[Neighbors, Array]:
    """The best of each query's candidates by a bfloat16 product, and for which it is proved.

    ``|q x - q' x'| <= |q - q'| |x'| + |q| |x - x'|`` for the rounded ``q'`` and ``x'``, and each
    float32 summation adds at most ``(d + 2) 2^-24 |q| |x|`` (Higham 2002, section 3.1). A query is
    proved if its k-th best float32 similarity is above its last candidate's bfloat16 similarity by
    more. There is no second search of the queries that are not.

    Args:
      queries: of unit length.
      gallery: of unit length.
      half: the gallery in bfloat16, transposed and padded.
      own: each query's own row of the gallery, -1 for none.
      k: neighbours per query.
      candidates: per query.
    """
    longest = 1.01 * jnp.max(_rounding(gallery))

    def block(queries: Array, own: Array) -> tuple[Neighbors, Array]:
        product = jnp.matmul(queries.astype(jnp.bfloat16), half, preferred_element_type=jnp.float32)
        found = top_k.grouped_top_k(product, own, len(gallery), k=candidates)
        split = [
            x.reshape(-1, TOGETHER, x.shape[1]) for x in (queries, jnp.sort(found.indices, axis=1))
        ]
        best = lax.map(lambda items: again(*items), tuple(split))
        best = Neighbors(*(x.reshape(-1, k) for x in best))
        bound = 1.01 * _rounding(queries) + longest + 8 * (queries.shape[1] + 2) * 2.0**-24
        return best, best.similarity[:, -1] > found.similarity[:, -1] + bound

    def again(queries: Array, found: Array) -> Neighbors:
        rows = gallery.at[found.reshape(-1)].get(mode="promise_in_bounds")
        return top_k.best_candidates(queries, rows, found, k=k)

    return in_blocks(block, (queries, own), block=search.QUERY_BLOCK)


def _rounding(x: Array) -> Array:
    # Conversion to bfloat16 and back may be left out by the compiler; this may not.
    return jnp.linalg.norm(x - lax.reduce_precision(x, 8, 7), axis=1)


def screened_side(data: Data, k: int, candidates: int) -> Side:
    """:func:`screened_search`, the gallery's conversion included."""
    queries, gallery = jnp.asarray(data.queries), jnp.asarray(data.gallery)
    own = top_k.own_rows(data.own, queries)
    convert = jax.jit(lambda x: _padded(x).astype(jnp.bfloat16).T)

    def run() -> Any:
        half = convert(gallery)
        return screened_search(queries, gallery, half, own, k=k, candidates=candidates)

    return run


def _padded(gallery: Any) -> Array:
    return pad_rows(jnp.asarray(gallery), round_up(len(gallery), WIDTH))


def make_sides(data: Data, k: int, chunk: int, candidates: int) -> dict[str, Callable[[], Side]]:
    """What makes each group of sides, by its first word."""
    nearest = functools.partial(nearest_side, data, k)
    sides: dict[str, Callable[[], Any]] = {
        "product": lambda: product_sides(data),
        "selection": lambda: selection_side(data, k),
        "nearest": lambda: {"nearest_neighbors": nearest(chunk=chunk)},
        "blocks": lambda: {
            f"{block:,} queries a product": nearest(chunk=chunk, block=block)
            for block in (128, 512, 2048)
        },
        "tiled": lambda: {
            "tiled, chunks of 6,400": nearest(chunk=6400),
            "tiled, chunks of 3,200": nearest(chunk=3200),
        },
        "groups": lambda: {
            f"groups of {group} columns": nearest(chunk=chunk, group=group) for group in (8, 32, 64)
        },
        "screened": lambda: screened_side(data, k, candidates),
    }
    return sides


def measure(sides: dict[str, Side], repeats: int) -> dict[str, np.ndarray]:
    """Seconds and CPU seconds ``[repeats 2]`` of each side; the sides take turns."""
    for side in sides.values():
        jax.block_until_ready(side())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(side())
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.array(pairs) for name, pairs in times.items()}


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    groups = ("product", "selection", "nearest", "blocks", "tiled", "groups", "screened")
    parser.add_argument("--size", choices=TASKS, default="inshop", help="sizes of the data")
    parser.add_argument("--sides", nargs="+", choices=groups, default=groups)
    parser.add_argument("--dimensions", type=int, default=512, help="embedding size")
    parser.add_argument("--queries", type=int, help="only the first of them")
    parser.add_argument("--chunk", type=int, default=65_536, help="gallery rows per product")
    parser.add_argument("--candidates", type=int, default=96, help="of the screened search")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    task = TASKS[options.size]
    data = make_data(task, options.dimensions)
    if options.queries:
        few, own = slice(options.queries), data.own
        data = data._replace(queries=data.queries[few], own=None if own is None else own[few])

    makers = make_sides(data, task.k, options.chunk, options.candidates)
    sides: dict[str, Any] = makers["nearest"]()
    for name in options.sides:
        made: Any = makers[name]()
        sides |= made if isinstance(made, dict) else {name: made}
    seconds = measure(sides, options.repeats)

    print(describe())
    print(
        f"{options.size}: {len(data.queries)} queries, {len(data.gallery)} gallery rows, "
        f"{options.dimensions} dimensions, k={task.k}; medians of {options.repeats}"
    )
    if "screened" in sides:
        _, proved = sides["screened"]()
        print(f"screened: {100 * float(jnp.mean(proved)):.2f} % of the queries proved")
    print(f"\n| {'side':34s} | seconds | CPU s | ratio | of CPU s |")
    print(f"|{'-' * 36}|---------|-------|-------|----------|")
    ours = seconds["nearest_neighbors"]
    for name, pairs in seconds.items():
        (wall, cpu), ratio = np.median(pairs, 0), np.median(pairs / ours, 0)
        print(f"| {name:34s} | {wall:7.3f} | {cpu:5.2f} | {ratio[0]:5.2f} | {ratio[1]:8.2f} |")


if __name__ == "__main__":
    main()

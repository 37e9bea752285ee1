"""Peak memory of the objectives of a large batch, forward and backward, in blocks of rows.

    python -m benchmarks.memory                        # B 16,384, d 512
    python -m benchmarks.memory --batch-size 65536     # on an accelerator
    python -m benchmarks.memory --row-block 0          # dense, for comparison

Multi-Similarity with its mining and Proxy-Anchor over In-Shop's 3,997 proxies. Prints what the
compiled program says that it needs, and on CPU the peak of the whole process.
"""

from __future__ import annotations

import argparse
import resource
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks.objectives import CLASSES, SIZE
from mmljax.losses.mining import sample_miner
from mmljax.losses.pair import multi_similarity_loss
from mmljax.losses.proxy import proxy_anchor_loss
from mmljax.losses.relations import Context, objective_sums
from mmljax.numerics import l2_normalize
from mmljax.types import BoundObjective, PairMasks, Points

GIB = 2**30


def loss(embeddings: Any, proxies: Any, labels: Any, keys: Any, *, row_block: int) -> Any:
    """The sum of the two objectives."""
    x, p = l2_normalize(embeddings), l2_normalize(proxies)
    samples = Points(x, labels, jnp.arange(len(x)), jnp.ones(len(x), bool))
    names = jnp.arange(len(p))
    classes = Points(p, names, names, jnp.ones(len(p), bool))
    nothing = jnp.zeros((0, 0), bool)
    context = Context((jnp.zeros_like(x),), keys, (PairMasks(nothing, nothing),), labels)
    pair = partial(multi_similarity_loss, alpha=2.0, beta=40.0, base=0.5)
    proxy = partial(proxy_anchor_loss, alpha=32.0, margin=0.1)
    miner = partial(sample_miner, margin=0.1)
    total = 0.0
    for objective, rows in (
        (BoundObjective("pair", "sample_to_sample", pair, miner, False), samples),
        (BoundObjective("proxy", "proxy_to_sample", proxy, None, False), classes),
    ):
        sums, (counts, _) = objective_sums(objective, rows, samples, context, row_block=row_block)
        total += jnp.sum(sums / jnp.maximum(counts, 1))
    return total


def main() -> None:
    """Compile, run once, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--row-block", type=int, default=512)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    embeddings = jnp.asarray(random.normal(size=(options.batch_size, SIZE)), jnp.float32)
    proxies = jnp.asarray(random.normal(size=(CLASSES, SIZE)), jnp.float32)
    labels = jnp.asarray(random.integers(0, CLASSES, options.batch_size), jnp.int32)
    keys = jax.random.split(jax.random.key(0), options.batch_size)
    function = jax.jit(
        jax.value_and_grad(partial(loss, row_block=options.row_block), argnums=(0, 1))
    )
    compiled = function.lower(embeddings, proxies, labels, keys).compile()
    needs = compiled.memory_analysis()
    begin = time.perf_counter()
    value, _ = jax.block_until_ready(compiled(embeddings, proxies, labels, keys))
    seconds = time.perf_counter() - begin
    print(machine.describe())
    print(
        f"B {options.batch_size}, d {SIZE}, row block {options.row_block}: loss {value:.4f}, "
        f"{seconds:.1f} s; arguments {needs.argument_size_in_bytes / GIB:.2f} GiB, results "
        f"{needs.output_size_in_bytes / GIB:.2f} GiB, work {needs.temp_size_in_bytes / GIB:.2f} GiB"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak of the process {peak / GIB:.2f} GiB")


if __name__ == "__main__":
    main()

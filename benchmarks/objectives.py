"""Mining, Multi-Similarity and Proxy-Anchor, forward and backward, beside pytorch-metric-learning.

    python -m benchmarks.objectives --batch-sizes 256 1024 4096

Both sides start from the same embeddings and proxies (float32, ``d`` 512, ``C`` 3,997 as in
In-Shop), normalise, mine with margin 0.1, and end with the gradients of embeddings and proxies.
mmljax's side is :class:`mmljax.MultiObjective` with its ledger. The bound is six matrix products:
two blocks of similarities, and of each the gradients of rows and columns.
One process that keeps freed memory, as the command ``mmljax`` does (with ``--default-allocator``
it does not), compares the values and gradients, then times the peer, then mmljax and the products
in turn: the peer's threads spin for a while after a call, which would slow the call that follows.
The best time of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from mmljax import MultiObjective, Objective
from mmljax.allocator import keep_freed_memory
from mmljax.numerics import similarity_matrix

CLASSES, SIZE = 3997, 512


def make_inputs(batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of four images per class that already resemble each other, labels, proxies."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES)[: batch_size // 4], 4)
    centers = random.normal(size=(CLASSES, SIZE))
    embeddings = centers[labels] + 1.5 * random.normal(size=(batch_size, SIZE))
    proxies = centers + 2 * random.normal(size=(CLASSES, SIZE))
    return embeddings.astype(np.float32), labels.astype(np.int32), proxies.astype(np.float32)


def our_side(inputs: Any) -> Callable[[], Any]:
    """A call that computes value, gradients and ledger, as a training step does."""
    objective = MultiObjective(
        {
            "pair": Objective(
                "multi_similarity",
                params={"alpha": 2.0, "beta": 50.0, "base": 0.5},
                mining="sample",
                mining_params={"margin": 0.1},
            ),
            "proxy": Objective("proxy_anchor", params={"alpha": 32.0, "margin": 0.1}),
        },
        classes=CLASSES,
        dimension=SIZE,
        combination="fixed",
    )
    params, state = objective.init(jax.random.key(0))
    embeddings, labels, proxies = (jnp.asarray(x) for x in inputs)

    @jax.jit
    def step(embeddings: Any, params: Any, state: Any, labels: Any) -> Any:
        def loss(embeddings: Any, params: Any) -> Any:
            return objective(params, state, embeddings, labels)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(embeddings, params)

    def run() -> Any:
        (value, (_, ledger)), (at_embeddings, at_params) = jax.block_until_ready(
            step(embeddings, params | {"proxies": proxies}, state, labels)
        )
        return value, (at_embeddings, at_params["proxies"]), ledger

    return run


def products(inputs: Any) -> Callable[[], Any]:
    """The matrix products of both losses and their gradients alone, at the same precision."""
    embeddings, _, proxies = (jnp.asarray(x) for x in inputs)

    @jax.jit
    def run(x: Any, p: Any) -> Any:
        pair, proxy = similarity_matrix(x, x), similarity_matrix(p, x)
        gradients = (pair, x), (pair.T, x), (proxy, x), (proxy.T, p)
        return [jnp.matmul(*operands, precision="highest") for operands in gradients]

    return lambda: jax.block_until_ready(run(embeddings, proxies))


def peer_side(inputs: Any) -> Callable[[], Any]:
    """The same for pytorch-metric-learning."""
    import torch
    from pytorch_metric_learning import losses, miners

    device = "cuda" if torch.cuda.is_available() else "cpu"
    embeddings, labels, proxies = inputs
    x = torch.from_numpy(embeddings).to(device).requires_grad_()
    y = torch.from_numpy(labels).long().to(device)
    miner = miners.MultiSimilarityMiner(epsilon=0.1)
    pair = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    proxy = losses.ProxyAnchorLoss(CLASSES, SIZE, margin=0.1, alpha=32).to(device)
    with torch.no_grad():
        proxy.proxies.copy_(torch.from_numpy(proxies))

    def run() -> Any:
        x.grad = proxy.proxies.grad = None
        value = pair(x, y, miner(x, y)) + proxy(x, y)
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.item(), (x.grad, proxy.proxies.grad)

    return run


def best_times(*calls: Callable[[], Any], repeats: int) -> list[float]:
    """The least seconds of each call, in turn, after one call of each that is not counted."""
    best = [float("inf")] * len(calls)
    for repeat in range(repeats + 1):
        for k, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            if repeat:
                best[k] = min(best[k], time.perf_counter() - begin)
    return best


def main() -> None:
    """Compare, time in turn, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--default-allocator", action="store_true", help="malloc's defaults")
    options = parser.parse_args()
    kept = not options.default_allocator and keep_freed_memory()
    print(f"{machine.describe()}, {'freed memory is kept' if kept else 'default allocator'}")
    for batch_size in options.batch_sizes:
        inputs = make_inputs(batch_size)
        run, peer, alone = our_side(inputs), peer_side(inputs), products(inputs)
        (value, gradients, _), (peer_value, peer_gradients) = run(), peer()
        np.testing.assert_allclose(value, peer_value, rtol=1e-4)
        for a, b in zip(gradients, peer_gradients, strict=True):
            b = b.cpu().numpy()
            assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)
        (theirs,) = best_times(peer, repeats=options.repeats)
        ours, bound = best_times(run, alone, repeats=options.repeats)
        print(
            f"B {batch_size:>5}: mmljax {1e3 * ours:8.1f} ms   peer {1e3 * theirs:8.1f} ms   "
            f"ratio {theirs / ours:.1f}   "
            f"matrix products alone {1e3 * bound:.1f} ms, mmljax / products {ours / bound:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

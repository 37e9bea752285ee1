"""Mining, Multi-Similarity and Proxy-Anchor, forward and backward, beside pytorch-metric-learning.

    python -m benchmarks.objectives --batch-sizes 256 1024 4096

Both sides start from the same embeddings and proxies (float32, ``d`` 512, ``C`` 3,997 as in
In-Shop), normalise, mine with margin 0.1, and end with the gradients of embeddings and proxies.
Runs alternate in one process; the best of each side counts. The values are compared first.
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
from mmljax.losses.mining import pair_masks, sample_miner
from mmljax.losses.pair import multi_similarity_loss
from mmljax.losses.proxy import proxy_anchor_loss
from mmljax.numerics import l2_normalize, masked_mean, similarity_matrix
from mmljax.types import Points, Views

CLASSES, SIZE = 3997, 512


def make_inputs(batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings of four images per class that already resemble each other, labels, proxies."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES)[: batch_size // 4], 4)
    centers = random.normal(size=(CLASSES, SIZE))
    embeddings = centers[labels] + 1.5 * random.normal(size=(batch_size, SIZE))
    proxies = centers + 2 * random.normal(size=(CLASSES, SIZE))
    return embeddings.astype(np.float32), labels.astype(np.int32), proxies.astype(np.float32)


def loss(embeddings: Any, labels: Any, proxies: Any) -> Any:
    """The sum of the two objectives."""
    x, p = l2_normalize(embeddings), l2_normalize(proxies)
    count = len(labels)
    samples = Points(x, labels, jnp.arange(count), jnp.ones(count, bool))
    names = jnp.arange(CLASSES) + 0 * labels[0]  # no constant, which XLA would fold for seconds
    classes = Points(p, names, names, jnp.ones(CLASSES, bool))
    similarity = similarity_matrix(x, x)
    masks = pair_masks(samples, samples, same_kind=True)
    views = Views(similarity, similarity, jnp.diag(similarity), None)
    mined = sample_miner(views, masks, margin=0.1)
    pair = multi_similarity_loss(similarity, mined, alpha=2.0, beta=50.0, base=0.5)
    own = pair_masks(classes, samples, same_kind=False)
    proxy = proxy_anchor_loss(similarity_matrix(p, x), own, alpha=32.0, margin=0.1)
    return masked_mean(pair) + masked_mean(proxy).sum()


def our_side(inputs: Any) -> Callable[[], Any]:
    """A call that computes value and gradients."""
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    placed = [jnp.asarray(x) for x in inputs]
    return lambda: jax.block_until_ready(step(*placed))


def products(inputs: Any) -> Callable[[], Any]:
    """The matrix products of both losses and their gradients alone, which both sides need."""
    embeddings, _, proxies = (jnp.asarray(x) for x in inputs)

    @jax.jit
    def run(x: Any, p: Any) -> Any:
        pair, proxy = similarity_matrix(x, x), similarity_matrix(p, x)
        return pair @ x, pair.T @ x, proxy @ x, proxy.T @ p

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


def main() -> None:
    """Compare, time in turn, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(machine.describe())
    for batch_size in options.batch_sizes:
        inputs = make_inputs(batch_size)
        sides = {"mmljax": our_side(inputs), "pytorch-metric-learning": peer_side(inputs)}
        (ours, gradients), (theirs, peer_gradients) = (run() for run in sides.values())
        sides["products"] = products(inputs)
        sides["products"]()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
        for a, b in zip(gradients, peer_gradients, strict=True):
            b = b.cpu().numpy()
            assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(options.repeats):
            for name, run in sides.items():
                begin = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - begin)
        ours, theirs, bound = best.values()
        print(
            f"B {batch_size:>5}: mmljax {1e3 * ours:8.1f} ms   peer {1e3 * theirs:8.1f} ms   "
            f"ratio {theirs / ours:.1f}   matrix products alone {1e3 * bound:.1f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()

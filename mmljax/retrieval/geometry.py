"""How embeddings lie in their space, whatever a search makes of them; NumPy in float64.

Roth et al., Revisiting Training Strategies and Generalization Performance in Deep Metric Learning
(2020), arXiv 2002.08473, found both to go with how well an objective generalises.

>>> import numpy as np
>>> embedding_density(np.array([[0, 0], [0, 2], [8, 0], [8, 2]]), np.array([5, 5, 7, 7]))
0.25
>>> spectral_decay(np.eye(3))
0.0
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

_BLOCK = 2048  # rows of distances held at once
_FLOOR = 2.0**-23  # of a singular value in units of the largest: what float32 can tell from 0


def embedding_density(embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
    """Mean distance within classes over mean distance between them: large is spread out.

    Within: Euclidean, over all pairs of embeddings of one class. Between: over all pairs of class
    means. So the paper's equation; its authors' code has one minus the cosine for a distance, and
    averages within each class first.

    Args:
      embeddings: of unit length, where cosine similarity is meant.
      labels: their classes.

    Returns:
      The ratio; NaN with fewer than two classes, no class of two embeddings, or means that
      float32 cannot tell apart.
    """
    x = np.asarray(embeddings, np.float64)
    x = x[np.argsort(labels, kind="stable")]
    _, first, sizes = np.unique(np.sort(labels), return_index=True, return_counts=True)
    within = sum(_total_distance(x[i : i + n]) for i, n in zip(first, sizes, strict=True) if n > 1)
    pairs = np.sum(sizes * (sizes - 1))
    means = np.add.reduceat(x, first) / sizes[:, None]
    between = _total_distance(means) / max(len(means) * (len(means) - 1), 1)
    told_apart = between > np.finfo(np.float32).eps * np.max(np.linalg.norm(means, axis=1))
    return float(within / pairs / between) if pairs and told_apart else float("nan")


def spectral_decay(embeddings: Float[np.ndarray, "n d"]) -> float:
    """Divergence KL(uniform || spectrum) of the singular values, scaled to sum 1, in nats.

    0 where all directions are used alike; the larger, the fewer carry the embeddings. As in the
    authors' code they are not centred. Singular values below 2**-23 of the largest, which float32
    cannot tell from 0, count as that, so the value is below 23 log 2. NaN if all embeddings are 0.
    """
    x = np.asarray(embeddings, np.float64)
    gram = x.T @ x if len(x) >= x.shape[1] else x @ x.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    if not values.max() > 0:
        return float("nan")
    values = np.maximum(values, _FLOOR * values.max())
    share = values / values.sum()
    return max(0.0, -float(np.mean(np.log(len(share) * share))))


def _total_distance(x: Float[np.ndarray, "n d"]) -> float:
    """Euclidean distances of all ordered pairs of rows, added up."""
    x = x - x[0]  # near points are told apart by what they differ in, not by what they share
    squared = np.sum(x * x, axis=1)
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        block = slice(start, start + _BLOCK)
        apart = squared[block, None] + squared - 2 * (x[block] @ x.T)
        np.fill_diagonal(apart[:, start:], 0)  # each row's distance to itself, but for rounding
        total += float(np.sum(np.sqrt(np.maximum(apart, 0))))
    return total

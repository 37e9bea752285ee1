"""Embedding-space diagnostics: density, spectral decay, NMI and AMI; NumPy in float64.

Roth et al., Revisiting Training Strategies and Generalization Performance in Deep Metric Learning
(2020), arXiv 2002.08473, found density and spectral decay to be related to how well an objective
generalises.

>>> import numpy as np
>>> embedding_density(np.array([[0, 0], [0, 2], [8, 0], [8, 2]]), np.array([5, 5, 7, 7]))
0.25
>>> spectral_decay(np.eye(3))
0.0
"""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float, Int

from mmljax.errors import require

_BLOCK = 512  # rows of distances held at once
_FLOOR = 2.0**-23  # of a singular value in units of the largest: what float32 can tell from 0


def check_clustering() -> None:
    """Raise ``UserError`` if scikit-learn, which :func:`clustering_scores` needs, is absent."""
    require("sklearn", extra="cluster", purpose="--config.evaluation.clustering=True")


def embedding_density(embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
    """Mean distance within classes over mean distance between classes; large means spread out.

    Within: Euclidean, over all pairs of embeddings of one class. Between: over all pairs of class
    means. This is the paper's equation; its authors' code has one minus the cosine for a distance,
    and averages within each class first.

    Args:
      embeddings: of unit length where cosine similarity is meant.
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
    distinct = between > np.finfo(np.float32).eps * np.max(np.linalg.norm(means, axis=1))
    return float(within / pairs / between) if pairs and distinct else float("nan")


def spectral_decay(embeddings: Float[np.ndarray, "n d"]) -> float:
    """Divergence KL(uniform || spectrum) of the singular values, scaled to sum 1, in nats.

    0 if all directions are used equally; the larger, the fewer directions the embeddings use. The
    embeddings are not centred, as in the authors' code. Singular values below 2**-23 of the
    largest, which float32 cannot tell from 0, count as that, so the value is below 23 log 2.

    Args:
      embeddings: any vectors.

    Returns:
      The divergence; NaN if all embeddings are 0.
    """
    x = np.asarray(embeddings, np.float64)
    gram = x.T @ x if len(x) >= x.shape[1] else x @ x.T
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    if not values.max() > 0:
        return float("nan")
    values = np.maximum(values, _FLOOR * values.max())
    share = values / values.sum()
    return max(0.0, -float(np.mean(np.log(len(share) * share))))


def clustering_scores(
    embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, seed: int
) -> dict[str, float]:
    """Normalised and adjusted mutual information of the classes and as many k-means clusters.

    Both divide by the mean of the two entropies. NMI grows with the number of clusters alone (a
    random embedding of small classes has a high NMI); AMI is corrected for that, and is 0 for
    chance.

    Args:
      embeddings: of unit length where cosine similarity is meant.
      labels: their classes.
      seed: of the one k-means++ start, on which the scores depend.

    Returns:
      ``nmi`` and ``ami``.

    Raises:
      UserError: if scikit-learn is not installed.
    """
    check_clustering()
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    classes = len(np.unique(labels))
    means = KMeans(n_clusters=classes, n_init=1, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer points than classes: see AMI
        clusters = means.fit_predict(np.asarray(embeddings, np.float32))
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
    }


def _total_distance(x: Float[np.ndarray, "n d"]) -> float:
    """The sum of the Euclidean distances of all ordered pairs of rows."""
    x = x - x[0]  # distances of near points then keep their precision
    squared = np.sum(x * x, axis=1)
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distance = squared[rows, None] + squared[start:] - 2 * (x[rows] @ x[start:].T)
        np.fill_diagonal(distance, 0)  # each row's distance to itself, without rounding
        distance = np.sqrt(np.maximum(distance, 0, out=distance), out=distance)
        block = len(distance)  # pairs within the block are both there, other pairs once
        total += float(np.sum(distance[:, :block]) + 2 * np.sum(distance[:, block:]))
    return total

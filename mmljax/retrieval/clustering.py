"""How well clusters of the embeddings are the classes: k-means, then NMI and AMI (scikit-learn)."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
from jaxtyping import Float, Int

from mmljax.errors import UserError

KEY = "config.evaluation.clustering"


def check_available() -> None:
    """Raise ``UserError`` where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(
            f"--{KEY}=True needs scikit-learn, which is not installed; pip install "
            "'mmljax[cluster]', or leave it out"
        )


def clustering_scores(
    embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, seed: int
) -> dict[str, float]:
    """Normalised and adjusted mutual information of classes and as many k-means clusters.

    Both divide by the mean of the two entropies. NMI grows with the number of clusters alone (a
    random embedding of small classes has a high one); AMI has that taken off, and is 0 for chance.

    Args:
      embeddings: of unit length, where cosine similarity is meant.
      labels: their classes.
      seed: of the one k-means++ start, which the scores depend on.

    Returns:
      ``nmi`` and ``ami``.

    Raises:
      UserError: where scikit-learn is not installed.
    """
    check_available()
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

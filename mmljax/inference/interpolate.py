"""Networks between the pretrained and the fine-tuned weights of a run (WiSE-FT).

Wortsman et al. (2021, arXiv 2109.01903) average the weights of a network before and after its
fine-tune: ``(1 - alpha) * pretrained + alpha * fine-tuned``. Here this is done to the backbone, its
BatchNorm statistics included. The head has no pretrained counterpart and stays the fine-tuned one
at every alpha, so alpha 0 is the pretrained backbone below the fine-tuned head. (The paper has a
zero-shot head to interpolate with.) The features of the pretrained backbone are scored as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmljax.config import to_dict
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.files import write_atomically
from mmljax.inference.embedder import TrainedEmbedder, Weights
from mmljax.mesh import replicated, spread
from mmljax.retrieval.evaluate import Embed, evaluate, make_embed, make_embed_pooled
from mmljax.runs.reader import CONFIG
from mmljax.text import one_line
from mmljax.training.checkpoints import Checkpoints
from mmljax.training.state import make_model
from mmljax.types import Dataset

ORIGIN = "interpolation.json"


def pretrained_weights(trained: TrainedEmbedder, *, source: str = "") -> Weights:
    """The pretrained backbone of a run below its fine-tuned head.

    Args:
      trained: the fine-tuned network.
      source: of the pretrained weights, if it is not what the run's config names.

    Raises:
      UserError: if the run started from random weights, or the pretrained ones cannot be used.
    """
    model = trained.config.model
    if not model.pretrained:
        raise UserError(
            f"run {trained.identity['run']} started from random weights "
            "(--config.model.pretrained=''); name a run that fine-tuned pretrained ones"
        )
    model = dataclasses.replace(model, pretrained=source or model.pretrained)
    _, *start = make_model(
        model, seed=trained.config.seed, channels=trained.channels, pretrained=True
    )
    own = (trained.network, trained.model_state)
    return Weights(
        *(
            {name: other[name] if name == "backbone" else part for name, part in tree.items()}
            for tree, other in zip(own, start, strict=True)
        )
    )


def interpolate(pretrained: Weights, fine_tuned: Weights, *, alpha: float) -> Weights:
    """``(1 - alpha) * pretrained + alpha * fine_tuned``, in NumPy; the ends are exact.

    Arrays of other than real numbers are the fine-tuned ones.
    """

    def mix(first: jax.Array, last: jax.Array) -> np.ndarray:
        a, b = np.asarray(first), np.asarray(last)
        if alpha == 0 or alpha == 1 or not jnp.issubdtype(b.dtype, jnp.floating):
            return a if alpha == 0 else b
        a, wide = a.astype(np.float64), b.astype(np.float64)
        return (a + alpha * (wide - a)).astype(b.dtype)

    return jax.tree.map(mix, pretrained, fine_tuned)


def make_score(
    trained: TrainedEmbedder, dataset: Dataset
) -> Callable[[Embed, Weights], dict[str, float]]:
    """A function from a form of embedding and weights to the scores on queries and gallery."""
    config, mesh = trained.config, trained.mesh

    def score(embed: Embed, weights: Weights) -> dict[str, float]:
        placed = spread(weights, jax.tree.map(lambda _: replicated(mesh), weights))
        result = evaluate(
            partial(embed, *placed),
            load.eval_batches(dataset.query, config, mesh),
            dataset.gallery and load.eval_batches(dataset.gallery, config, mesh),
            recall_at=config.evaluation.recall_at,
            chunk=config.evaluation.gallery_chunk,
            mesh=mesh,
        )
        return result.summary()

    return score


def curve(
    trained: TrainedEmbedder, pretrained: Weights, dataset: Dataset, alphas: Iterable[float]
) -> tuple[dict[float, dict[str, float]], dict[str, float]]:
    """The scores of each alpha in rising order, with both ends, and those of pretrained features.

    The latter are the pooled features of the pretrained backbone, of unit length, without a head.
    """
    score, embed = make_score(trained, dataset), make_embed(trained.graphdef)
    fine_tuned = Weights(trained.network, trained.model_state)
    scores = {
        alpha: score(embed, interpolate(pretrained, fine_tuned, alpha=alpha))
        for alpha in sorted({0.0, 1.0, *alphas})
    }
    return scores, score(make_embed_pooled(trained.graphdef), pretrained)


def best_alpha(scores: Mapping[float, Mapping[str, float]], key: str) -> float:
    """The alpha of the highest score, of equal ones the highest alpha."""
    return max(scores, key=lambda alpha: (scores[alpha][key], alpha))


def save(
    trained: TrainedEmbedder, pretrained: Weights, *, alpha: float, source: str, folder: Path
) -> None:
    """Write a run's directory with the network of one alpha, for ``embed``, ``search``, ``export``.

    It has a checkpoint of the network alone, which cannot be trained further, the run's config, and
    ``interpolation.json``. The config is written last: a folder without it is no run.

    Raises:
      UserError: if the folder holds anything, or cannot be written.
    """
    weights = interpolate(pretrained, Weights(trained.network, trained.model_state), alpha=alpha)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output={folder} exists already; name a new directory")
        folder.mkdir(parents=True, exist_ok=True)
        saved = Checkpoints(folder / "checkpoints", keep_last=1, keep_best=0)
        try:
            network = {"params": {"network": weights.network}, "model_state": weights.model_state}
            saved.save(network, step=trained.identity["step"], metrics=None)
        finally:
            saved.close()
        origin = {**trained.identity, "pretrained": source, "alpha": alpha}
        write_atomically(folder / ORIGIN, json.dumps(origin, indent=2))
        write_atomically(folder / CONFIG, json.dumps(to_dict(trained.config), indent=2))
    except OSError as error:
        raise UserError(f"--output={folder} cannot be written: {one_line(error)}") from error

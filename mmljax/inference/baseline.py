"""The scores of a pretrained backbone before any training: what fine-tuning must beat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from mmljax.config import Config, to_dict
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.mesh import make_mesh, replicated, spread
from mmljax.retrieval import records
from mmljax.retrieval.checks import check_evaluation
from mmljax.retrieval.evaluate import make_embed_pooled
from mmljax.training.loop import score_dataset
from mmljax.training.state import make_model
from mmljax.types import Dataset


def score_pretrained(config: Config, *, dataset: Dataset | None = None) -> dict[str, Any]:
    """Scores of the pooled features of a config's backbone, without a head, on its test images.

    Args:
      config: of a run that would fine-tune the backbone, or train a head on its features.
      dataset: images in memory, in place of ``config.data.source``.

    Returns:
      ``scores``, ``config`` and ``protocol``, as ``results.json`` of a run has them.

    Raises:
      UserError: if the config names no pretrained weights, or they or the data cannot be used.
    """
    check_pretrained(config)
    mesh = make_mesh()
    dataset = load.with_distractors(dataset or load.load_dataset(config), config)
    check_evaluation(dataset, config)
    embed = make_pretrained_embed(config, dataset, mesh)
    result = score_dataset(embed, dataset, config, mesh)
    protocol = records.evaluation_protocol(dataset, config)
    return {"scores": result.summary(), "config": to_dict(config), "protocol": protocol}


def check_pretrained(config: Config) -> None:
    """Check that a config names pretrained weights.

    Raises:
      UserError: if it names none.
    """
    if not config.model.pretrained:
        raise UserError(
            "--config.model.pretrained='' starts from random weights, whose features say nothing; "
            "name pretrained ones"
        )


def make_pretrained_embed(config: Config, dataset: Dataset, mesh: Mesh) -> Callable[[Any], Any]:
    """From crops to the pooled features of a config's pretrained backbone, on all devices."""
    graphdef, *weights = make_model(
        config.model,
        seed=config.seed,
        channels=load.image_channels(dataset),
        pretrained=True,
        features=load.feature_size(dataset),
    )
    weights = spread(weights, jax.tree.map(lambda _: replicated(mesh), weights))
    return partial(make_embed_pooled(graphdef), *weights)

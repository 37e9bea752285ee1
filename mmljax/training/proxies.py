"""Class proxies before the first step: random directions, or means of the classes' embeddings."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mmljax.config import Config
from mmljax.data import load
from mmljax.mesh import spread, to_host
from mmljax.retrieval.evaluate import embed_batches, make_embed
from mmljax.training.trainer import Trainer
from mmljax.types import Dataset, Split, TrainState

_log = logging.getLogger(__name__)


def init_proxies(
    state: TrainState, config: Config, dataset: Dataset, trainer: Trainer, mesh: Mesh
) -> TrainState:
    """The state before the first step, with the proxies that ``config.proxies_init`` asks for.

    For ``class_means`` the training images are embedded once, as an evaluation embeds them, by the
    network at its start. Where ``config.data.corrupt`` is ``skip``, those that cannot be decoded
    are left out. Every process holds all of these embeddings.

    Raises:
      UserError: if an image cannot be read, or cannot be decoded and is not to be skipped.
    """
    if config.proxies_init == "random":
        return state
    if not config.model.pretrained:
        _log.warning(
            "--config.proxies_init=class_means: the network starts from random weights, so the "
            "means of its embeddings know little of the classes; set --config.model.pretrained"
        )
    kept = readable(dataset.train, config)
    batches = load.eval_batches(Split(*(field[kept] for field in dataset.train)), config, mesh)
    embed = partial(make_embed(trainer.graphdef), *state.evaluated)
    start = state.params["proxies"]
    proxies = class_means(
        *embed_batches(embed, batches), centers=config.centers, start=to_host(start)
    )
    placed = spread(proxies, start.sharding)
    _log.info("proxies start as class means of %d training images", len(dataset.train.labels))
    return state._replace(params=state.params | {"proxies": placed})


def class_means(
    embeddings: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    centers: int,
    start: Float[np.ndarray, "p d"],
) -> Float[np.ndarray, "p d"]:
    """Proxies that point to the mean embeddings of their classes.

    They have length 1, as random proxies have in the root of the mean square. The images of a class
    are dealt to its centers in turn, in the order of the data set, so each center is the mean of a
    part of its own.

    Args:
      embeddings: of unit length.
      labels: their classes.
      centers: proxies per class.
      start: proxies that stay where there is no mean: rows of padding, centers beyond the number
        of a class's images, and embeddings that cancel out.

    Returns:
      In the dtype of ``start``; the means are computed in float64.
    """
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)  # in its class
    rows = sorted_labels.astype(np.int64) * centers + place % centers
    sums, counts = np.zeros(start.shape, np.float64), np.zeros((len(start), 1))
    np.add.at(sums, rows, embeddings[order].astype(np.float64))
    np.add.at(counts, rows, 1)
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    known = length > 1e-6 * counts
    return np.where(known, sums / np.where(known, length, 1), start).astype(start.dtype)


def readable(split: Split, config: Config) -> Int[np.ndarray, " m"]:
    """Which images of a split to embed: all, or those that can be decoded where others are skipped.

    Raises:
      UserError: if an image cannot be read.
    """
    if config.data.corrupt != "skip" or split.images.ndim > 1:
        return np.arange(len(split.labels))
    from mmljax.data.pipeline import decodable

    return np.flatnonzero(decodable(split, config.data))

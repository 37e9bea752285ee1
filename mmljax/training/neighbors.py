"""The relations that composed batches follow: which classes are near, which images are confused.

They are refreshed every few steps from the proxies and the embeddings of the training split, and
are part of the train state in between, so that a run which resumes makes the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmljax.config import Config
from mmljax.data import load
from mmljax.data.composition import RULES, Neighbors
from mmljax.errors import UserError
from mmljax.mesh import replicated, spread, to_host
from mmljax.retrieval.evaluate import embed_on_devices, make_embed
from mmljax.retrieval.search import sharded_nearest_neighbors
from mmljax.training.proxies import readable
from mmljax.training.trainer import Trainer
from mmljax.types import Dataset, Split, TrainState

_RESULTS = 2**24  # most neighbours that a search returns at once: 128 MiB


def refresh_every(config: Config, trainer: Trainer) -> int:
    """Steps between two refreshes; 0 if no batch is composed.

    Raises:
      UserError: if the duration is less than a step.
    """
    composition = config.data.composition
    if composition.rule == "none":
        return 0
    every = trainer.in_steps(composition.every, key="config.data.composition.every")
    if every < 1:
        raise UserError(
            f"--config.data.composition.every={composition.every!r} is no step; ask for at least 1"
        )
    return int(every)


def make_refresh(
    config: Config, dataset: Dataset, trainer: Trainer, mesh: Mesh
) -> Callable[[TrainState], dict[str, np.ndarray]]:
    """A function from a state to the tables of :class:`mmljax.data.composition.Neighbors`.

    For the images the training split is embedded as an evaluation embeds it. Every device holds all
    of these embeddings.
    """
    tables = RULES[config.data.composition.rule]
    embed = make_embed(trainer.graphdef)
    if "images" in tables:
        kept = readable(dataset.train, config)
        split = Split(*(field[kept] for field in dataset.train))

    def refresh(state: TrainState) -> dict[str, np.ndarray]:
        found = {}
        if "classes" in tables:
            proxies = to_host(state.params["proxies"])
            found["classes"] = nearest_classes(
                proxies[: dataset.classes * config.centers],
                centers=config.centers,
                count=state.neighbors["classes"].shape[1],
                mesh=mesh,
            )
        if "images" in tables:
            batches = load.eval_batches(split, config, mesh)
            vectors, labels = embed_on_devices(partial(embed, *state.evaluated), batches)
            images = np.full(len(dataset.train.labels), -1, np.int32)
            images[kept] = kept[nearest_wrong_images(vectors, labels, mesh=mesh)]
            found["images"] = images
        return spread(found, dict.fromkeys(found, replicated(mesh)))

    return refresh


def on_host(tables: Any) -> Neighbors | None:
    """The relations of a state's ``neighbors``; None if no batch is composed."""
    return Neighbors(**{name: to_host(table) for name, table in tables.items()}) if tables else None


def nearest_classes(
    proxies: Float[np.ndarray, "p d"], *, centers: int, count: int, mesh: Mesh
) -> Int[np.ndarray, "c count"]:
    """The nearest classes of each class by the cosines of their proxies, nearest first.

    Args:
      proxies: of any length, the centers of a class side by side; a class with several is their
        mean direction.
      centers: proxies per class.
      count: classes per class, below the number of classes.
      mesh: over which the search is split.
    """
    proxies = proxies.astype(np.promote_types(proxies.dtype, np.float32))
    directions = _unit(_unit(proxies).reshape(-1, centers, proxies.shape[-1]).mean(axis=1))
    rows = spread(directions.astype(np.float32), replicated(mesh))
    own = np.arange(len(directions), dtype=np.int32)
    return to_host(
        sharded_nearest_neighbors(rows, rows, k=count, mesh=mesh, self_index=own).indices
    )


def nearest_wrong_images(
    embeddings: Float[Array, "n d"], labels: Int[np.ndarray, " n"], *, mesh: Mesh
) -> Int[np.ndarray, " n"]:
    """The nearest image of another class of each image, by exact search.

    Args:
      embeddings: of unit length.
      labels: at least two classes.
      mesh: over which the search is split.
    """
    _, counts = np.unique(labels, return_counts=True)
    k = int(counts.max())  # so many cannot all be of the image's own class
    own = np.arange(len(labels), dtype=np.int32)
    found = []
    for rows in np.array_split(own, -(-len(own) * k // _RESULTS)):
        nearest = to_host(
            sharded_nearest_neighbors(
                embeddings[rows], embeddings, k=k, mesh=mesh, self_index=rows
            ).indices
        )
        wrong = labels[nearest] != labels[rows, None]
        found.append(np.take_along_axis(nearest, wrong.argmax(axis=1)[:, None], axis=1)[:, 0])
    return np.concatenate(found)


def _unit(rows: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

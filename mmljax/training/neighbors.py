"""The relations that composed batches follow: which classes are near, which images are confused.

They are refreshed every few steps from the proxies and the embeddings of the training split, and
are part of the train state in between, so that a run which resumes makes the same batches.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mmljax.config import Config
from mmljax.data import load
from mmljax.data.composition import RULES, Neighbors, embedded_images
from mmljax.errors import UserError
from mmljax.mesh import replicated, spread, to_host
from mmljax.retrieval.evaluate import embed_batches, embed_on_devices, make_embed
from mmljax.retrieval.search import CHUNK, sharded_nearest_neighbors
from mmljax.retrieval.streaming import streamed_nearest_neighbors
from mmljax.text import one_line
from mmljax.training.proxies import readable
from mmljax.training.trainer import Trainer
from mmljax.types import Batch, Dataset, Split, TrainState

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

    It depends on the state and the config alone. Training images are embedded as an evaluation
    embeds them: all for ``sample`` and ``either``, and then every device holds all embeddings; some
    of each class for ``class``, whose embeddings lie in a temporary file.
    """
    rule, labels = config.data.composition.rule, dataset.train.labels
    embed = make_embed(trainer.graphdef)
    embeds = rule in ("class", "sample", "either")
    kept = readable(dataset.train, config) if embeds else np.zeros(0, np.int64)

    def batches(images: Int[np.ndarray, " m"]) -> Iterator[Batch]:
        split = Split(*(field[images] for field in dataset.train))
        return load.eval_batches(split, config, mesh)

    def near(state: TrainState) -> np.ndarray:
        count = state.neighbors["classes"].shape[1]
        if rule == "class":
            data, step = config.data, int(to_host(state.step))
            images = data.composition.images
            chosen = kept[embedded_images(labels[kept], seed=config.seed, step=step, count=images)]
            size = max(1, CHUNK // data.eval_batch_size) * data.eval_batch_size
            parts = (chosen[first : first + size] for first in range(0, len(chosen), size))
            of_state = partial(embed, *state.evaluated)
            with in_file(embed_batches(of_state, batches(part))[0] for part in parts) as rows:
                return nearest_wrong_classes(
                    rows, labels[chosen], classes=dataset.classes, count=count
                )
        proxies = to_host(state.params["proxies"])[: dataset.classes * config.centers]
        return nearest_classes(proxies, centers=config.centers, count=count, mesh=mesh)

    def confused(state: TrainState) -> np.ndarray:
        vectors, known = embed_on_devices(partial(embed, *state.evaluated), batches(kept))
        images = np.full(len(labels), -1, np.int32)
        images[kept] = kept[nearest_wrong_images(vectors, known, mesh=mesh)]
        return images

    def refresh(state: TrainState) -> dict[str, np.ndarray]:
        makers = {"classes": near, "images": confused}
        found = {table: makers[table](state) for table in RULES[rule]}
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


def nearest_wrong_classes(
    embeddings: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    classes: int,
    count: int,
) -> Int[np.ndarray, "c count"]:
    """The nearest other classes of each class, nearest first; -1 where there are too few.

    Classes are as similar as their most similar images. The search is exact: of one more neighbour
    than ``count`` times the images of the largest class, some are of ``count`` other classes, or
    all images are neighbours. Equally similar classes are in the order of their numbers.

    The device holds ``CHUNK`` queries at most, two chunks of as many rows, and the similarities of
    a chunk to a block of queries.

    Args:
      embeddings: of unit length; they may be mapped from a file.
      labels: rising.
      classes: all classes, of which some may have no image here.
      count: classes per class.
    """
    largest = int(np.unique(labels, return_counts=True)[1].max())
    k = min(largest * count + 1, len(labels))
    rows = max(1, min(CHUNK, _RESULTS // k))
    parts = []
    for first in range(0, len(labels), rows):
        part = slice(first, first + rows)
        found = streamed_nearest_neighbors(jnp.asarray(embeddings[part]), embeddings, k=k)
        pairs = np.repeat(labels[part], k), labels[to_host(found.indices)].ravel()
        parts.append(_most_similar(*pairs, to_host(found.similarity).ravel(), count=count))
    own, other, similarity = (np.concatenate(x) for x in zip(*parts, strict=True))
    own, other, _ = _most_similar(own, other, similarity, count=count)
    table = np.full((classes, count), -1, np.int32)
    table[own, np.arange(len(own)) - np.searchsorted(own, own)] = other
    return table


def _most_similar(
    own: Int[np.ndarray, " p"],
    other: Int[np.ndarray, " p"],
    similarity: Float[np.ndarray, " p"],
    *,
    count: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of pairs of classes, the ``count`` most similar of each first class, each pair once."""
    wrong = np.flatnonzero(own != other)
    order = wrong[np.lexsort((other[wrong], -similarity[wrong], own[wrong]))]
    pairs = own[order].astype(np.int64) * (1 + int(other.max())) + other[order]
    order = order[np.sort(np.unique(pairs, return_index=True)[1])]
    place = np.arange(len(order)) - np.searchsorted(own[order], own[order])
    order = order[place < count]
    return own[order], other[order], similarity[order]


@contextlib.contextmanager
def in_file(parts: Iterable[Float[np.ndarray, "m d"]]) -> Iterator[Float[np.ndarray, "n d"]]:
    """Rows in a temporary file, mapped, float32; the file is removed at the end of the block.

    Raises:
      UserError: if the file cannot be written.
    """
    with tempfile.TemporaryFile() as file:
        rows = size = 0
        for part in parts:
            rows, size = rows + len(part), part.shape[1]
            try:
                file.write(part.astype(np.float32).tobytes())
                file.flush()
            except OSError as error:
                raise UserError(
                    f"the embeddings that composition.rule=class needs cannot be written to "
                    f"{tempfile.gettempdir()} ({one_line(error)}); set TMPDIR to a folder with "
                    "room, or lower --config.data.composition.images"
                ) from error
        yield np.memmap(file, np.float32, mode="r", shape=(rows, size))


def _unit(rows: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

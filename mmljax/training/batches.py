"""The training batches of a run: which relations compose them, and how large their crops are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mmljax.config import Config
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.retrieval.evaluate import make_embed
from mmljax.training.neighbors import make_refresh, on_host, refresh_every
from mmljax.training.trainer import Trainer
from mmljax.types import Batch, Dataset, TrainState


class BatchSource(NamedTuple):
    """The batches of a run, in parts within which nothing about them changes."""

    small_crops: int
    """Steps whose crops have ``data.start_image_size`` pixels a side; 0 for none."""
    begins: Callable[[int], bool]
    """Whether a part begins after so many steps."""
    part: Callable[[TrainState, int], tuple[TrainState, Iterator[Batch]]]
    """``(state, step) -> (state, batches)`` after ``step`` steps: the batches to the next part.

    The relations of the state are refreshed where they are due. It is to be called before the first
    step of a process, and where a part begins.
    """
    skipped: dict[int, int]
    """By the steps before a batch, how many of its images this process replaced (``skip``)."""


def make_batches(config: Config, dataset: Dataset, trainer: Trainer, mesh: Mesh) -> BatchSource:
    """The batches of a run.

    Raises:
      UserError: if a refresh is due every 0 steps, or ``data.start_image_size`` is above
        ``data.image_size`` or not a size that the network takes.
    """
    every = refresh_every(config, trainer)
    refresh = make_refresh(config, dataset, trainer, mesh)
    small = _small_crops(config, dataset, trainer)
    skipped: dict[int, int] = {}
    first = dataclasses.replace(
        config, data=dataclasses.replace(config.data, image_size=config.data.start_image_size)
    )

    def part(state: TrainState, step: int) -> tuple[TrainState, Iterator[Batch]]:
        if every and step % every == 0:
            state = state._replace(neighbors=refresh(state))
        end = min(trainer.total_steps, step - step % every + every if every else 2**62)
        if step < small:
            end = min(end, small)
        batches = load.train_batches(
            dataset,
            first if step < small else config,
            mesh,
            range(step, end),
            neighbors=on_host(state.neighbors),
            skipped=skipped,
        )
        return state, batches

    def begins(step: int) -> bool:
        return step == small > 0 or (every > 0 and step % every == 0)

    return BatchSource(small, begins, part, skipped)


def _small_crops(config: Config, dataset: Dataset, trainer: Trainer) -> int:
    """``BatchSource.small_crops``, once the size is checked."""
    data = config.data
    side, until = data.start_image_size, data.start_until
    if not side:
        return 0
    flag = f"--config.data.start_image_size={side}"
    if side > data.image_size:
        raise UserError(
            f"{flag} is above --config.data.image_size={data.image_size}, at which the run ends; "
            "lower it, or set it to 0"
        )
    if load.feature_size(dataset):
        raise UserError(f"{flag}: --config.data.source={data.source} has no images; set it to 0")
    count = trainer.in_steps(until, key="config.data.start_until")
    image = jax.ShapeDtypeStruct((1, side, side, load.image_channels(dataset)), np.uint8)
    try:
        jax.eval_shape(make_embed(trainer.graphdef), *trainer.state.evaluated, image)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    return min(count, trainer.total_steps)

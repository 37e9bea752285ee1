"""From a config to the state before the first step and the compiled step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mmljax.config import Config, choose
from mmljax.data.composition import table_shapes
from mmljax.durations import RunSize, steps
from mmljax.errors import UserError
from mmljax.losses.multi_objective import MultiObjective
from mmljax.training import optim
from mmljax.training.freezing import Trains, choose_trained
from mmljax.training.state import make_model, make_state
from mmljax.training.step import TrainStep, make_train_step
from mmljax.types import TrainState

PROXY_INITS = ("random", "class_means")


class Trainer(NamedTuple):
    """A run that is ready to start."""

    graphdef: nnx.GraphDef  # of the embedder
    objective: MultiObjective
    state: TrainState  # before the first step
    step: TrainStep
    schedules: Mapping[str, optax.Schedule]  # learning rate of each optimiser group
    total_steps: int
    in_steps: Callable[..., int]  # (duration, key=config key) -> steps of this run
    trains: Trains  # the network's parameters that are trained


def make_objective(
    config: Config,
    *,
    classes: int,
    size: RunSize,
    class_sizes: np.ndarray | None = None,
    devices: int = 1,
) -> MultiObjective:
    """The objectives of a config; classes and memory slots are padded for that many devices.

    Args:
      config: the run.
      classes: of the training split.
      size: what the durations of the objectives are measured in.
      class_sizes: training images of each class, for a margin that depends on them.
      devices: over which proxies and memory are split.

    Raises:
      UserError: on an unknown loss, rule or hyperparameter, or a combination that cannot be.
    """
    rows = {}
    for name, row in config.objectives.items():
        key = f"config.objectives.{name}.margin_rise"
        rise = steps(row.margin_rise, size, key=key)
        if rise > (size.total_steps or rise):
            raise UserError(
                f"--{key}={row.margin_rise!r} is {rise} steps, beyond the run's "
                f"{size.total_steps}; shorten it, or lengthen --config.duration"
            )
        rows[name] = dataclasses.replace(row, margin_rise=f"{rise} steps")
    return MultiObjective(
        rows,
        classes=classes,
        dimension=config.model.embedding_size,
        centers=config.centers,
        combination=config.combination.name,
        combination_params=config.combination.params,
        surgery=config.combination.surgery,
        memory_size=config.memory.size,
        memory_start=steps(config.memory.start, size, key="config.memory.start"),
        row_block=config.row_block,
        multiple_of=devices,
        class_sizes=class_sizes,
        matryoshka=config.model.matryoshka,
        matryoshka_weights=config.model.matryoshka_weights,
        seed=config.seed,
    )


def make_trainer(
    config: Config,
    *,
    classes: int,
    channels: int,
    train_examples: int,
    mesh: Mesh,
    class_sizes: np.ndarray | None = None,
    pretrained: bool = True,
    features: int = 0,
) -> Trainer:
    """Build everything that the config names; a mistake in it shows here.

    Args:
      config: the run.
      classes: of the training split.
      channels: of the images.
      train_examples: images of the training split, the length of an epoch.
      mesh: over which batch and proxies are split.
      class_sizes: training images of each class, for a margin that depends on them.
      pretrained: whether to load the weights that the config names, if any.
      features: channels of the features that take the place of images; 0 for images.

    Raises:
      UserError: on a config that cannot be used.
    """
    size = _run_size(config, train_examples)
    in_steps = partial(steps, size=size)
    choose(dict.fromkeys(PROXY_INITS), config.proxies_init, key="config.proxies_init")
    objective = make_objective(
        config, classes=classes, size=size, class_sizes=class_sizes, devices=mesh.size
    )
    schedules = optim.make_schedules(config.optimizer, size)
    total = int(size.total_steps or 0)
    frozen = in_steps(config.optimizer.freeze_backbone, key="config.optimizer.freeze_backbone")
    trains = choose_trained(config, frozen_steps=frozen, total_steps=total)
    graphdef, network, statistics = make_model(
        config.model,
        seed=config.seed,
        channels=channels,
        pretrained=pretrained,
        features=features,
    )
    backbone = getattr(nnx.merge(graphdef, network, statistics), "backbone", None)
    layers = () if backbone is None else backbone.layers()  # a head on features has none
    optimizer = optim.make_optimizer(config.optimizer, schedules, layers=layers)
    state = make_state(
        network,
        statistics,
        objective=objective,
        optimizer=optimizer,
        seed=config.seed,
        mesh=mesh,
        averaged=config.optimizer.ema_decay > 0,
        neighbors=table_shapes(config.data, classes=classes, images=train_examples),
        proxies_dtype=config.optimizer.proxies_dtype,
        trains=trains,
    )
    check_micro_batches(config, statistics, devices=mesh.size)
    step = make_train_step(
        graphdef=graphdef,
        objective=objective,
        optimizer=optimizer,
        mesh=mesh,
        ema_decay=config.optimizer.ema_decay,
        micro_batches=config.data.micro_batches,
        trains=trains,
    )
    return Trainer(graphdef, objective, state, step, schedules, total, in_steps, trains)


def _run_size(config: Config, train_examples: int) -> RunSize:
    """What durations are measured in, with the run's own number of steps."""
    size = RunSize(config.data.batch_size, train_examples)
    total = steps(config.duration, size, key="config.duration")
    if total < 1:
        raise UserError(f"--config.duration={config.duration!r} is no step; ask for at least one")
    size = size._replace(total_steps=total)
    warmup = steps(config.optimizer.warmup, size, key="config.optimizer.warmup")
    if warmup > total:
        raise UserError(
            f"--config.optimizer.warmup={config.optimizer.warmup!r} is {warmup} steps, beyond the "
            f"run's {total}; shorten it, or lengthen --config.duration"
        )
    return size


def check_micro_batches(config: Config, statistics: Mapping[str, Any], *, devices: int) -> None:
    """Refuse micro batches that would change the step, or that do not divide the batch.

    Args:
      config: the run.
      statistics: of BatchNorm, by ``backbone`` and ``head``; a network without has none.
      devices: over which the batch is split.

    Raises:
      UserError: with the cure.
    """
    count, size = config.data.micro_batches, config.data.batch_size
    if count == 1:
        return
    found = f"--config.data.micro_batches={count}"
    cures = []
    if statistics.get("backbone") and config.model.batch_norm == "global":
        cures.append("--config.model.batch_norm=frozen")
    if statistics.get("head"):
        cures.append("--config.model.head_norm=layer")
    if cures:
        raise UserError(
            f"{found} would give BatchNorm the statistics of a part of the batch; set "
            f"{' and '.join(cures)}, or --config.data.micro_batches=1"
        )
    if size % (count * devices):
        raise UserError(
            f"{found} does not divide --config.data.batch_size={size} on {devices} devices; use a "
            f"batch size that is a multiple of {count * devices}"
        )

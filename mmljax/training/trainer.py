"""From a config to what a loop needs: the state before the first step, and the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import optax
from flax import nnx
from jax.sharding import Mesh

from mmljax.config import Config, RunSize, choose, steps
from mmljax.errors import UserError
from mmljax.losses.ledger import Scalars
from mmljax.training import optim, registry
from mmljax.training.step import make_train_step
from mmljax.types import Batch, TrainState


class Trainer(NamedTuple):
    """A run that is ready to go."""

    graphdef: nnx.GraphDef  # of the embedder
    state: TrainState  # before the first step
    step: Callable[[TrainState, Batch], tuple[TrainState, Scalars]]  # donates its state
    schedules: Mapping[str, optax.Schedule]  # learning rate of each optimiser group
    total_steps: int
    in_steps: Callable[..., int]  # (duration, key=config key) -> steps of this run


def assemble(
    config: Config,
    *,
    classes: int,
    channels: int,
    train_examples: int,
    mesh: Mesh,
    pretrained: bool = True,
) -> Trainer:
    """Put together everything that the config names; a mistake in it shows here.

    Args:
      config: the run.
      classes: of the training split.
      channels: of the images.
      train_examples: images of the training split, the length of an epoch.
      mesh: over which batch and proxies divide.
      pretrained: whether to load the weights that the config names, if any.

    Raises:
      UserError: on a config that cannot be used.
    """
    objectives = registry.make_objectives(config)
    proxies = classes * config.centers
    for objective in objectives:
        if objective.sampled_proxies > proxies:
            raise UserError(
                f"--config.objectives.{objective.name}.sampled_proxies="
                f"{objective.sampled_proxies} is more than there are proxies, {proxies}: "
                "set it lower, or to 0 for all of them"
            )
    combination = registry.make_combination(config)
    size = RunSize(config.data.batch_size, train_examples)
    total = steps(config.duration, size, key="config.duration")
    if total < 1:
        raise UserError(f"--config.duration={config.duration!r} is no step; ask for at least one")
    size = size._replace(total_steps=total)
    in_steps = partial(steps, size=size)
    surgery = choose(
        {"none": False, "pcgrad": True},
        config.combination.surgery,
        key="config.combination.surgery",
    )
    schedules = optim.make_schedules(config.optimizer, size)
    optimizer = optim.make_optimizer(config.optimizer, schedules)
    graphdef, state = registry.make_state(
        config,
        classes=classes,
        channels=channels,
        objectives=len(objectives),
        combination=combination,
        optimizer=optimizer,
        mesh=mesh,
        pretrained=pretrained,
    )
    step = make_train_step(
        graphdef=graphdef,
        objectives=objectives,
        combination=combination,
        optimizer=optimizer,
        mesh=mesh,
        classes=classes,
        centers=config.centers,
        surgery=surgery,
        row_block=config.row_block,
        memory_start=in_steps(config.memory.start, key="config.memory.start"),
    )
    return Trainer(graphdef, state, step, schedules, total, in_steps)

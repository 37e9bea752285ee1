"""The optax optimiser of a run: groups with their own rates and decays, schedules, clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmljax.config import GroupConfig, OptimizerConfig, choose
from mmljax.durations import RunSize, steps
from mmljax.training.freezing import Trains, all_train, split_network

GROUPS = ("backbone", "head", "proxies", "weights")


def label_groups(params: Mapping[str, Any]) -> Any:
    """The group of each leaf: ``backbone`` or ``head`` in the network, else its own key."""

    def label(path: Any, leaf: Any) -> str:
        del leaf
        return path[1].key if path[0].key == "network" else path[0].key

    return jax.tree_util.tree_map_with_path(label, params)


def make_schedules(config: OptimizerConfig, size: RunSize) -> dict[str, optax.Schedule]:
    """Learning rate of each group as a function of the step.

    A linear warm-up multiplies the rates of backbone, head and proxies; the backbone's warm-up
    starts after the steps in which it is frozen. The decay spans the whole run. The contribution
    weights learn at a constant rate, since they must reach their balance early.

    Raises:
      UserError: on an unknown schedule or an ill-formed duration.
    """

    def duration(key: str) -> int:
        return steps(getattr(config, key), size, key=f"config.optimizer.{key}")

    warmup, frozen, every = (duration(k) for k in ("warmup", "freeze_backbone", "step_every"))
    decay = choose(
        {
            "constant": lambda step: 1.0,
            "cosine": optax.cosine_decay_schedule(1.0, max(size.total_steps or 0, 1)),
            "step": optax.exponential_decay(1.0, max(every, 1), config.step_factor, staircase=True),
        },
        config.schedule,
        key="config.optimizer.schedule",
    )

    def rise(step: Any, start: int) -> Any:
        return jnp.clip((step - start + 1) / max(warmup, 1), 0, 1)

    def schedule(group: str) -> optax.Schedule:
        rate = getattr(config, group).learning_rate
        if group == "weights":
            return lambda step: rate
        start = frozen if group == "backbone" else 0
        return lambda step: rate * decay(step) * rise(step, start) * (step >= start)

    return {group: schedule(group) for group in GROUPS}


def make_optimizer(
    config: OptimizerConfig,
    schedules: Mapping[str, optax.Schedule],
    *,
    layers: Sequence[Sequence[str]] = (),
) -> optax.GradientTransformation:
    """One optimiser per group.

    Each group's gradient is clipped by the group's own norm. Weight decay skips vectors (biases,
    scales). The contribution weights are trained by plain gradient descent, whose step on
    log-weights is the multiplicative update that ``combination.share`` and ``uncertainty`` expect.

    Layer-wise decay multiplies the whole update of the backbone's layer ``i`` of ``0 .. n`` by
    ``layer_decay ** (n - i)``, weight decay included (Clark et al. 2020, arXiv 2003.10555; Bao et
    al. 2022, arXiv 2106.08254). As in the latter, the stem is layer 0, and what follows the blocks
    is layer n. An adapter is of its block's layer. The head has a rate of its own.

    Args:
      config: of the optimiser.
      schedules: learning rate of each group.
      layers: names of the modules of each layer of the backbone, from the stem on; needed for a
        layer decay below 1.

    Raises:
      UserError: on an unknown optimiser.
    """
    scale_by = choose(
        {
            "adamw": lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
            "sgd": lambda: optax.trace(decay=config.b1),
        },
        config.name,
        key="config.optimizer.name",
    )

    def chain(group: str) -> optax.GradientTransformation:
        if group == "weights":
            return optax.scale_by_learning_rate(schedules[group])
        settings: GroupConfig = getattr(config, group)
        layered = group == "backbone" and config.layer_decay < 1
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm or math.inf),
            scale_by(),
            optax.add_decayed_weights(settings.weight_decay, mask=_is_matrix),
            optax.scale_by_learning_rate(schedules[group]),
            *([_scale_layers(layers, config.layer_decay)] if layered else []),
        )

    return optax.partition({group: chain(group) for group in GROUPS}, label_groups)


def _scale_layers(
    layers: Sequence[Sequence[str]], decay: float
) -> optax.GradientTransformationExtraArgs:
    """Multiply the update of each layer of the backbone by its factor."""
    factors = {name: decay ** (len(layers) - 1 - i) for i, own in enumerate(layers) for name in own}

    def scale(path: Any, update: Any) -> Any:
        name = ".".join(str(entry.key) for entry in path[2:])  # after network and backbone
        (module,) = (module for module in factors if f"{name}.".startswith(f"{module}."))
        return update * factors[module]

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda x: getattr(x, "ndim", 0) > 1, params)


def describe_groups(
    params: Mapping[str, Any], config: OptimizerConfig, *, trains: Trains = all_train
) -> str:
    """A table of the groups: arrays, parameters, learning rate, weight decay.

    Below them, in a row of their own, the network's parameters that are not trained, if any.
    """
    trained, frozen = split_network(params["network"], trains)
    params = {**params, "network": trained}
    labels = jax.tree.leaves(label_groups(params))
    leaves = jax.tree.leaves(params)
    lines = [f"{'group':<10}{'arrays':>8}{'parameters':>14}{'rate':>10}{'decay':>10}"]
    for group in GROUPS:
        own = [x for x, label in zip(leaves, labels, strict=True) if label == group]
        settings: GroupConfig = getattr(config, group)
        lines.append(
            f"{_counts(group, own)}{settings.learning_rate:>10.2g}{settings.weight_decay:>10.2g}"
        )
    if constants := jax.tree.leaves(frozen):
        lines.append(_counts("frozen", constants))
    if config.layer_decay < 1:
        lines.append(
            f"each layer of the backbone has {config.layer_decay:g} of the next one's rate"
        )
    return "\n".join(lines)


def _counts(name: str, arrays: Sequence[Any]) -> str:
    return f"{name:<10}{len(arrays):>8}{sum(x.size for x in arrays):>14,}"

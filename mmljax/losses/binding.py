"""From rows of a config to objectives and their combination, with hyperparameters bound."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmljax.config import Objective, choose
from mmljax.durations import RunSize, steps
from mmljax.errors import UserError
from mmljax.losses import registry
from mmljax.losses.margins import SCHEDULES, dynamic_margins
from mmljax.losses.relations import PROXIES, RELATIONS
from mmljax.types import BoundObjective, Combination, Margin


class Sizes(NamedTuple):
    """What the rows of a config are checked against."""

    classes: int
    dimension: int
    centers: int
    memory: int
    class_sizes: np.ndarray | None  # [classes]: training images of each class; None where not known


def bind_objective(name: str, row: Objective, sizes: Sizes) -> BoundObjective:
    """An objective with its hyperparameters bound.

    Raises:
      UserError: naming the key of the config.
    """
    key = f"config.objectives.{name}"
    relation, loss = choose(registry.LOSSES, row.loss, key=f"{key}.loss")
    bound = registry.bind(
        loss, row.params, key=f"{key}.params", supplied={"centers": sizes.centers}
    )
    miner = choose(registry.MINERS, row.mining, key=f"{key}.mining")
    if miner is not None:
        supplied = {"dimension": sizes.dimension}
        miner = registry.bind(
            miner, row.mining_params, key=f"{key}.mining_params", supplied=supplied
        )
    elif row.mining_params:
        raise UserError(
            f"--{key}.mining_params={dict(row.mining_params)} has no rule: clear them by "
            f"--{key}.mining_params='{{}}', or set --{key}.mining"
        )
    _check_columns(row, relation, miner is not None, key, sizes)
    margin = _bind_margin(row, relation, bound, key, sizes)
    return BoundObjective(name, relation, bound, miner, row.memory, row.sampled_proxies, margin)


def _check_columns(row: Objective, relation: str, mined: bool, key: str, sizes: Sizes) -> None:
    proxies_as_columns = RELATIONS[relation][1] == PROXIES
    if proxies_as_columns and (mined or row.memory):
        raise UserError(
            f"--{key} has proxies as columns, which are neither mined nor remembered: set "
            f"{key}.mining='none' and {key}.memory=False"
        )
    if row.memory and not sizes.memory:
        raise UserError(f"--{key}.memory=True needs --config.memory.size above 0, found 0")
    sampled = f"--{key}.sampled_proxies={row.sampled_proxies}"
    if row.sampled_proxies and not proxies_as_columns:
        raise UserError(
            f"{sampled} is for losses with proxies as columns, not for {row.loss}: set it to 0"
        )
    if row.sampled_proxies > sizes.classes * sizes.centers:
        raise UserError(
            f"{sampled} is above the number of proxies, {sizes.classes * sizes.centers}: set it "
            "lower, or to 0 for all of them"
        )
    if relation == "sample_to_proxy" and row.sampled_proxies % sizes.centers:
        raise UserError(
            f"{sampled} must hold whole classes of {sizes.centers} proxies: set it to a multiple "
            f"of --config.centers={sizes.centers}"
        )


def _bind_margin(
    row: Objective, relation: str, bound: Any, key: str, sizes: Sizes
) -> Margin | None:
    """The margin where it differs between classes or rises, else None."""
    choose(SCHEDULES, row.margin_schedule, key=f"{key}.margin_schedule")
    rise = _rise_steps(row, key)
    if not rise and row.least_margin is None:
        return None
    if relation != "sample_to_proxy" or not registry.takes(bound.func, "margin"):
        raise UserError(
            f"--{key}.margin_rise and least_margin are for softmax losses with a margin, which "
            f"{row.loss} is not: leave them out"
        )
    default = inspect.signature(bound.func).parameters["margin"].default
    margin = bound.keywords.get("margin", default)
    if row.least_margin is None:
        return Margin(margin, rise, row.margin_schedule)
    least = f"--{key}.least_margin={row.least_margin:g}"
    if row.least_margin > margin:
        raise UserError(
            f"{least} is above the margin of the smallest class, {margin:g}: lower it, or raise "
            f"--{key}.params.margin"
        )
    if sizes.class_sizes is None or len(sizes.class_sizes) != sizes.classes:
        raise UserError(
            f"{least} needs class_sizes, the training images of each of the {sizes.classes} "
            f"classes, found {sizes.class_sizes!r}"
        )
    by_class = dynamic_margins(sizes.class_sizes, least=row.least_margin, most=margin)
    return Margin(by_class, rise, row.margin_schedule)


def _rise_steps(row: Objective, key: str) -> int:
    if not row.margin_rise.strip().endswith(("step", "steps")):
        raise UserError(
            f"--{key}.margin_rise={row.margin_rise!r} must be in steps outside a run, such as "
            "'600 steps'"
        )
    return steps(row.margin_rise, RunSize(1, 1), key=f"{key}.margin_rise")


def bind_combination(
    rows: Mapping[str, Objective], name: str, params: Mapping[str, Any], *, seed: int
) -> Combination:
    """The combination, its weights and targets in the order of the objectives.

    Raises:
      UserError: on an unknown name or hyperparameter, or a weight that cannot be learned.
    """
    make = choose(registry.COMBINATIONS, name, key="config.combination.name")
    for objective, row in rows.items():
        if not row.weight > 0 and name not in ("fixed", "random"):
            raise UserError(
                f"--config.objectives.{objective}.weight must be above 0 where combination "
                f"{name!r} learns it, found {row.weight:g}"
            )
    supplied = {
        "weights": [row.weight for row in rows.values()],
        "targets": [
            _normalized([row.embedding_share for row in rows.values()]),
            _normalized([row.proxy_share for row in rows.values()]),
        ],
        "seed": seed,
    }
    return registry.bind(make, params, key="config.combination.params", supplied=supplied)()


def _normalized(shares: Sequence[float]) -> list[float]:
    total = sum(shares)
    return [share / total if total else 0.0 for share in shares]

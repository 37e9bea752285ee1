"""Durations of a config, such as ``60 epochs``, as numbers of steps."""

from __future__ import annotations

import re
from typing import NamedTuple

from mmljax.errors import UserError

_MOST_STEPS = 2e9  # the step is a 32-bit integer
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|examples?|%)\s*")


class RunSize(NamedTuple):
    """What durations are measured in."""

    batch_size: int  # global
    train_examples: int  # an epoch
    total_steps: int | None = None  # what a percentage is of; None where none can be


def steps(duration: str, size: RunSize, *, key: str) -> int:
    """Turn ``"600 steps"``, ``"60 epochs"``, ``"5000 examples"`` or ``"10%"`` into steps.

    Args:
      duration: a number and a unit.
      size: of the run.
      key: the config key, for the error.

    Raises:
      UserError: if the text is not such a duration.
    """
    match = _DURATION.fullmatch(duration)
    if not match or (match[2] == "%" and size.total_steps is None):
        raise UserError(
            f"--{key}={duration!r} is no duration: write a number and a unit, "
            "such as '600 steps', '60 epochs', '5000 examples'"
            + ("" if size.total_steps is None else " or '10%'")
        )
    number = float(match[1])
    if number >= _MOST_STEPS:
        raise UserError(f"--{key} is {number:g} {match[2]}, beyond {_MOST_STEPS:g}; lower it")
    unit = match[2].rstrip("s")
    if unit == "epoch":
        return round(number * size.train_examples / size.batch_size)
    if unit == "example":
        return round(number / size.batch_size)
    if unit == "%":
        return round(number / 100 * (size.total_steps or 0))
    return round(number)

"""A JAX profiler trace of some training steps, which XProf and TensorBoard open."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mmljax.errors import UserError

_STEPS = re.compile(r"\s*steps\s+(\d+)\s*:\s*(\d+)\s*")
_log = logging.getLogger(__name__)


def profiled_steps(text: str, *, total: int) -> range:
    """The steps of ``"steps 20:25"``, both ends included; none of ``""``.

    Args:
      text: ``config.log.profile``.
      total: steps of the run.

    Raises:
      UserError: if the text has another form, or names steps that the run does not have.
    """
    if not text:
        return range(0)
    match = _STEPS.fullmatch(text)
    found = range(int(match[1]), int(match[2]) + 1) if match else range(0)
    if not found or found[0] < 1 or found[-1] > total:
        raise UserError(
            f"--config.log.profile={text!r} must be 'steps FIRST:LAST', from 1 to the run's {total}"
        )
    return found


class Profiler:
    """Traces the steps that are asked for, in a session that comes to them.

    Every process writes the trace of its own devices, into ``plugins/profile`` of the folder:
    ``xprof --logdir FOLDER`` shows them.
    """

    def __init__(self, folder: Path, steps: range) -> None:
        self._folder, self._steps, self._active = folder, steps, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surround the making of a batch and the dispatch of its step."""
        if number not in self._steps:
            yield
            return
        if not self._active:
            jax.profiler.start_trace(self._folder)
            self._active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def stop_after(self, number: int, result: Any) -> None:
        """End the trace after the last of its steps, when the devices have finished it."""
        if self._active and number == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that is under way."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
            _log.info("profile: xprof --logdir %s", self._folder)

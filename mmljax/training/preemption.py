"""SIGTERM and SIGINT handling: all processes save and stop at the same step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from mmljax.errors import Preempted

SIGNALS = {signal.SIGTERM: Preempted.EXIT_CODE, signal.SIGINT: 128 + signal.SIGINT}
"""The signals that stop a run, and the exit code after each."""


class Preemption:
    """Listens for SIGTERM and SIGINT while it is entered; a second signal ends the process at once.

    With several processes, JAX's own service listens for SIGTERM: it passes the signal that any
    process was sent to all of them, and names a step that none has begun. SIGINT is passed on as
    SIGTERM there.
    """

    def __init__(self) -> None:
        self.exit_code = Preempted.EXIT_CODE
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Preemption:
        # Only the main thread may set handlers; a run in another thread is ended by its owner.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS if self._alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        for handled in self._before:
            signal.signal(handled, signal.SIG_DFL)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.exit_code = SIGNALS[signal.Signals(number)]
        self._requested = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: equal in all processes; to be called at every step."""
        if self._alone:
            return self._requested
        return bool(multihost_utils.reached_preemption_sync_point(step))

"""The notice to make room (SIGTERM), heard between two steps by all processes alike."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Listens for SIGTERM while it is entered; a second one ends the process at once.

    With several processes JAX's own service listens: it passes the notice that any of them was sent
    to all, and names a step that none of them has begun yet.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._before: Any = None
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Preemption:
        # Only the main thread may listen; a run in another one is ended by whoever started it.
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._noticed = True
        signal.signal(number, signal.SIG_DFL)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: the same answer in all processes; ask at every step."""
        if self._alone:
            return self._noticed
        return bool(multihost_utils.reached_preemption_sync_point(step))

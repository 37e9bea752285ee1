"""Throughput and input-wait measurement: idle time of the devices, and compilations."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of jax.monitoring

_Batch = TypeVar("_Batch")


class InputWait:
    """Measures the seconds in which the devices were idle because the next batch was not ready.

    The devices run a step while the host prepares the next batch; host work during a step costs
    nothing. So the wait starts when the batch is requested or when the results of the last step are
    ready, whichever is later. A thread waits for these results to record the time. Work of the
    devices for a batch (augmentation of arrays) is not waiting. Nothing is counted before the first
    step: that is start-up time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # total so far
        self._started = 0  # steps dispatched to the devices
        self._ready = (0, 0.0)  # steps that finished, and the time of the last one
        self._steps: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()
        # A daemon thread: a step that never ends must not keep the process from exiting.
        self._thread = threading.Thread(target=self._watch, name="steps", daemon=True)
        self._thread.start()

    def next(self, batches: Iterator[_Batch]) -> _Batch:
        """Return the next batch and add the idle time of the devices to ``seconds``."""
        begin = time.perf_counter()
        batch = next(batches)
        end = time.perf_counter()
        finished, ready = self._ready
        if self._started and finished == self._started:
            self.seconds += idle_seconds(begin, end, ready=ready)
        return batch

    def step(self, result: jax.Array) -> None:
        """Note that a step was dispatched to the devices; ``result`` is one of its outputs."""
        self._started += 1
        self._steps.put(result)

    def close(self) -> None:
        """Let the thread end after the steps in flight."""
        self._steps.put(None)

    def _watch(self) -> None:
        finished = 0
        while (result := self._steps.get()) is not None:
            try:
                result.block_until_ready()
            except RuntimeError:  # the step failed; fetching its results raises this too
                return
            finished += 1
            self._ready = finished, time.perf_counter()


def idle_seconds(begin: float, end: float, *, ready: float) -> float:
    """The part of a wait from ``begin`` to ``end`` that lies after ``ready``."""
    return max(0.0, end - max(begin, ready))


class Compilations:
    """Counts the programs that this process compiles, from construction to ``close``.

    A program from JAX's persistent cache counts too: it was traced and requested again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last = ""  # name of the last function
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs
        if event == COMPILED:
            self.count += 1
            self.last = str(kwargs.get("fun_name", "unnamed"))

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

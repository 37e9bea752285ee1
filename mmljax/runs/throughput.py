"""How the time of a training loop goes: waiting for input, and compilations."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event that jax.monitoring tells

_Batch = TypeVar("_Batch")


class InputWait:
    """Seconds in which the devices had nothing to do, because the next batch was not there yet.

    A step is handed to the devices and runs while the host sees to the next batch, and what the
    host does in that time costs nothing. So the clock does not run from when a batch is asked for,
    but from when the last step's results are ready, if that is later; a thread waits for them, to
    know when that was. What the devices themselves do for a batch (augmentation of arrays, behind
    the running step) is work, not waiting. Before the first step nothing is counted: that is the
    start of the run, not its speed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0  # since the beginning; never falls
        self._started = 0  # steps handed to the devices
        self._ready = (0, 0.0)  # steps that are through, and when the last one was
        self._steps: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()
        # A daemon: a step that never ends must not keep the process from ending.
        threading.Thread(target=self._watch, name="steps", daemon=True).start()

    def next(self, batches: Iterator[_Batch]) -> _Batch:
        """The next batch; what the devices wait for it is added to ``seconds``."""
        begin = time.perf_counter()
        batch = next(batches)
        end = time.perf_counter()
        through, ready = self._ready
        if self._started and through == self._started:
            self.seconds += idle_seconds(begin, end, ready=ready)
        return batch

    def step(self, result: jax.Array) -> None:
        """A step has been handed to the devices; ``result`` is one of its outputs."""
        self._started += 1
        self._steps.put(result)

    def close(self) -> None:
        """Let the thread end when the steps under way are through."""
        self._steps.put(None)

    def _watch(self) -> None:
        through = 0
        while (result := self._steps.get()) is not None:
            try:
                result.block_until_ready()
            except RuntimeError:  # a step that failed; who fetches its results is told
                return
            through += 1
            self._ready = through, time.perf_counter()


def idle_seconds(begin: float, end: float, *, ready: float) -> float:
    """The part of a wait from ``begin`` to ``end`` that lies after ``ready``."""
    return max(0.0, end - max(begin, ready))


class Compilations:
    """Counts the programs that this process compiles, from when this is made until it is closed.

    A program that comes from JAX's persistent cache counts too: it was traced and asked for anew.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last = ""  # name of the function
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs
        if event == COMPILED:
            self.count += 1
            self.last = str(kwargs.get("fun_name", "unnamed"))

    def close(self) -> None:
        """Stop listening."""
        jax.monitoring.unregister_event_duration_listener(self._hear)

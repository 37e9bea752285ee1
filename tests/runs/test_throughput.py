"""Waiting is idle time of the devices, not of the host; every compilation is counted."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.runs import throughput
from mmljax.runs.throughput import Compilations, InputWait, idle_seconds


class Result:
    """An output of a step that finishes when the test says so."""

    def __init__(self, *, fails: bool = False) -> None:
        self.done = threading.Event()
        self.fails = fails

    def block_until_ready(self) -> None:
        self.done.wait(10)
        if self.fails:
            raise RuntimeError("the step failed")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    now = types.SimpleNamespace(seconds=100.0)
    fake = types.SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr(throughput, "time", fake)
    return now


@pytest.fixture
def wait(clock: types.SimpleNamespace) -> Iterator[InputWait]:
    measured = InputWait()
    yield measured
    measured.close()


def finish(wait: InputWait, result: Result, *, steps: int) -> None:
    """End a step, and wait until the thread has seen that ``steps`` steps are finished."""
    result.done.set()
    deadline = time.monotonic() + 10
    while wait._ready[0] < steps:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("ready", "expected"),
    [(1.0, 3.0), (2.0, 3.0), (4.0, 1.0), (5.0, 0.0), (9.0, 0.0)],
)
def test_only_what_lies_after_the_last_step_is_idle(ready: float, expected: float) -> None:
    assert idle_seconds(2.0, 5.0, ready=ready) == expected


def batch(clock: types.SimpleNamespace, seconds: float) -> Iterator[int]:
    clock.seconds += seconds
    yield 7


def test_the_whole_wait_counts_where_the_last_step_is_finished(
    wait: InputWait, clock: types.SimpleNamespace
) -> None:
    result = Result()
    wait.step(result)
    finish(wait, result, steps=1)
    assert wait.next(batch(clock, 3.0)) == 7
    assert wait.seconds == 3.0


def test_nothing_counts_while_the_last_step_runs(
    wait: InputWait, clock: types.SimpleNamespace
) -> None:
    first, second = Result(), Result()
    for result in (first, second):
        wait.step(result)
    finish(wait, first, steps=1)  # the one before is finished, which does not matter
    wait.next(batch(clock, 3.0))
    assert wait.seconds == 0
    second.done.set()


def test_the_rest_of_a_wait_counts_where_the_step_ends_within_it(
    wait: InputWait, clock: types.SimpleNamespace
) -> None:
    result = Result()
    wait.step(result)

    def batches() -> Iterator[int]:
        clock.seconds += 2.0
        finish(wait, result, steps=1)
        clock.seconds += 0.5
        yield 1

    wait.next(batches())
    assert wait.seconds == 0.5


def test_the_start_of_a_run_does_not_count(wait: InputWait, clock: types.SimpleNamespace) -> None:
    wait.next(batch(clock, 3.0))
    assert wait.seconds == 0


def test_a_step_that_fails_ends_the_watch_quietly(
    wait: InputWait, clock: types.SimpleNamespace
) -> None:
    result = Result(fails=True)
    wait.step(result)
    result.done.set()
    wait._thread.join(10)
    assert not wait._thread.is_alive()
    wait.next(batch(clock, 3.0))
    assert wait.seconds == 0


def test_the_results_of_real_steps_are_watched(
    wait: InputWait, clock: types.SimpleNamespace
) -> None:
    wait.step(jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
    finish(wait, Result(), steps=1)
    wait.next(batch(clock, 3.0))
    assert wait.seconds == 3.0


def test_each_compilation_is_counted_once_and_named() -> None:
    def some_step(x: jax.Array) -> jax.Array:
        return jnp.sin(x) * 3

    step = jax.jit(some_step)
    inputs = [np.ones(size, np.float32) for size in (3, 4)]
    compilations = Compilations()
    counts = []
    for x in (inputs[0], inputs[0], inputs[1], inputs[1]):
        step(x)
        counts.append(compilations.count)
    assert counts == [1, 1, 2, 2]
    assert "some_step" in compilations.last
    compilations.close()
    step(np.ones(5, np.float32))
    assert compilations.count == 2

"""Waiting is what the devices wait, not what the host spends; every compilation is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.runs.throughput import Compilations, InputWait, idle_seconds


class Result:
    """An output of a step that is through when the test says so."""

    def __init__(self, *, fails: bool = False) -> None:
        self.done = threading.Event()
        self.fails = fails

    def block_until_ready(self) -> None:
        self.done.wait(10)
        if self.fails:
            raise RuntimeError("the step failed")


@pytest.fixture
def wait() -> Iterator[InputWait]:
    clock = InputWait()
    yield clock
    clock.close()


def finish(result: Result) -> None:
    """End a step, and give the thread that watches it the time to see it."""
    result.done.set()
    time.sleep(0.02)


@pytest.mark.parametrize(
    ("ready", "expected"),
    [(1.0, 3.0), (2.0, 3.0), (4.0, 1.0), (5.0, 0.0), (9.0, 0.0)],
)
def test_only_what_lies_after_the_last_step_is_idle(ready: float, expected: float) -> None:
    assert idle_seconds(2.0, 5.0, ready=ready) == expected


def test_the_whole_wait_counts_where_the_last_step_is_through(wait: InputWait) -> None:
    result = Result()
    wait.step(result)
    finish(result)
    begin = time.perf_counter()
    assert wait.next(time.sleep(0.03) or x for x in [7]) == 7
    assert 0.03 <= wait.seconds <= time.perf_counter() - begin


def test_nothing_counts_while_the_last_step_runs(wait: InputWait) -> None:
    first, second = Result(), Result()
    for result in (first, second):
        wait.step(result)
    finish(first)  # the one before is through, which does not matter
    wait.next(time.sleep(0.03) or x for x in [1])
    assert wait.seconds == 0
    second.done.set()


def test_the_rest_of_a_wait_counts_where_the_step_ends_within_it(wait: InputWait) -> None:
    result = Result()
    wait.step(result)

    def batches() -> Iterator[int]:
        time.sleep(0.2)
        result.done.set()
        time.sleep(0.05)
        yield 1

    wait.next(batches())
    assert 0.01 < wait.seconds < 0.15


def test_the_start_of_a_run_does_not_count(wait: InputWait) -> None:
    wait.next(time.sleep(0.02) or x for x in [1])
    assert wait.seconds == 0


def test_a_step_that_fails_ends_the_watch_quietly(wait: InputWait) -> None:
    result = Result(fails=True)
    wait.step(result)
    finish(result)
    wait.next(iter([1]))
    assert wait.seconds == 0


def test_the_results_of_real_steps_are_watched(wait: InputWait) -> None:
    x = jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))
    wait.step(x)
    x.block_until_ready()
    time.sleep(0.02)
    wait.next(time.sleep(0.03) or x for x in [1])
    assert wait.seconds >= 0.03


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

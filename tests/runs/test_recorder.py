"""Rows and throughput of the loop, and one warning when the input becomes slow."""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.runs import recorder as recorder_module
from mmljax.runs.recorder import Recorder


class Reporter:
    """Keeps what it receives."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.rates: list[dict[str, float]] = []

    def train(self, step: int, row: dict[str, float]) -> None:
        self.rows.append((step, row))

    def progress(self, **rates: float) -> None:
        self.rates.append(rates)


@pytest.fixture
def reporter() -> Reporter:
    return Reporter()


class Clock:
    """Time and the idle time of the devices, as the test sets them; in place of ``InputWait``."""

    def __init__(self) -> None:
        self.now = 100.0
        self.seconds = 0.0  # idle so far
        self.started = False

    def next(self, batches: Iterator[Any]) -> Any:
        before = self.now
        batch = next(batches)
        self.seconds += (self.now - before) * self.started
        self.started = True
        return batch

    def step(self, result: jax.Array) -> None:
        self.now += 0.01

    def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recorder_module, "InputWait", lambda: clock)
    fake = types.SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(recorder_module, "time", fake)
    return clock


@pytest.fixture
def recorder(reporter: Reporter, clock: Clock) -> Iterator[Recorder]:
    recorder = Recorder(reporter, {"head": lambda step: 0.5 * step}, input_wait_warning=0.2)
    yield recorder
    recorder.close()


@jax.jit
def run_step(x: jax.Array) -> jax.Array:
    return jnp.sum(x * 2)


@pytest.fixture
def loop(recorder: Recorder, clock: Clock) -> Callable[..., None]:
    """Runs steps of 0.01 s, fed by a slow or a fast input, and flushes once."""

    def run(steps: range, *, input_takes: float = 0.0, size: int = 3) -> None:
        def batches() -> Iterator[np.ndarray]:
            for _ in steps:
                clock.now += input_takes
                yield np.ones(size, np.float32)

        source = batches()
        for step in steps:
            recorder.add(step, {"loss": run_step(recorder.next_batch(source))})
        recorder.flush()

    return run


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_rows_have_the_scalars_and_the_rates_of_their_step(
    recorder: Recorder, reporter: Reporter
) -> None:
    for step in (1, 2, 3):
        recorder.add(step, {"loss": jnp.float32(step)})
    assert reporter.rows == []  # nothing is fetched before the flush
    recorder.flush()
    recorder.flush()
    assert reporter.rows == [
        (step, {"loss": float(step), "learning_rate/head": 0.5 * (step - 1)}) for step in (1, 2, 3)
    ]
    assert [rates["steps"] for rates in reporter.rates] == [3, 0]


def test_what_is_not_finite_ends_the_run_after_its_row(
    recorder: Recorder, reporter: Reporter
) -> None:
    recorder.add(1, {"loss": jnp.float32(1)})
    recorder.add(2, {"loss": jnp.float32(np.nan)})
    with pytest.raises(UserError, match="loss not finite at step 2"):
        recorder.flush()
    assert [step for step, _ in reporter.rows] == [1, 2]


def test_a_slow_input_is_warned_of_once(
    loop: Callable[..., None],
    reporter: Reporter,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder_module, "WINDOW", 0.02)
    loop(range(1, 4))
    assert warnings(caplog) == []
    loop(range(4, 7), input_takes=0.05)
    loop(range(7, 10), input_takes=0.05)
    (warning,) = warnings(caplog)
    assert "--config.data.threads" in warning
    shares = [rates["waited"] / rates["seconds"] for rates in reporter.rates]
    assert shares == pytest.approx([0, 5 / 6, 5 / 6])
    loop(range(10, 13))
    loop(range(13, 16), input_takes=0.05)
    assert len(warnings(caplog)) == 2  # it was fast in between


def test_the_input_is_judged_over_a_whole_window(
    loop: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "WINDOW", 0.3)
    loop(range(1, 3), input_takes=0.05)  # 0.07 s: the first batch does not count
    loop(range(3, 5), input_takes=0.05)  # 0.12 s
    assert warnings(caplog) == []
    loop(range(5, 7), input_takes=0.05)
    assert len(warnings(caplog)) == 1


def test_the_first_batch_and_excluded_time_do_not_lower_the_throughput(
    recorder: Recorder, loop: Callable[..., None], reporter: Reporter, clock: Clock
) -> None:
    clock.now += 7
    loop(range(1, 2), input_takes=5.0)
    clock.now += 3
    recorder.restart_clock()
    loop(range(2, 3))
    assert [rates["seconds"] for rates in reporter.rates] == pytest.approx([0.01, 0.01])
    assert [rates["waited"] for rates in reporter.rates] == [0, 0]


def test_compilations_are_expected_at_first_and_warned_of_later(
    recorder: Recorder,
    loop: Callable[..., None],
    reporter: Reporter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop(range(1, 4), size=101)
    jax.jit(lambda x: x - 1)(jnp.ones(2))  # as an evaluation does
    recorder.restart_clock()
    loop(range(4, 7), size=101)
    assert warnings(caplog) == []
    before = reporter.rates[-1]["compilations"]
    loop(range(7, 10), size=102)
    (warning,) = warnings(caplog)
    assert "run_step" in warning
    assert reporter.rates[-1]["compilations"] == before + 1


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            {"loss/proxy": np.nan, "loss": np.nan},
            r"objective proxy not finite \(loss nan, weight 2,",
        ),
        ({"gradient_proxies/separation": np.inf}, "objective separation not finite"),
        ({"gradient_norm/network": np.inf}, "gradient_norm/network not finite"),
        ({"loss/pair": np.nan, "gradient_proxies/proxy": np.nan}, "objective pair not finite"),
    ],
)
def test_the_objective_that_went_first_is_named(broken: dict[str, float], said: str) -> None:
    names = ("pair", "proxy", "separation")
    row = {"loss": 1.0, "gradient_norm/network": 1.0}
    for name in names:
        row |= {f"loss/{name}": 1.0, f"weight/{name}": 2.0, f"gradient_proxies/{name}": 3.0}
    found = recorder_module.describe_broken(row | broken)
    assert re.match(said, found)


def test_rows_count_the_replaced_images_of_their_step(reporter: Reporter, clock: Clock) -> None:
    skipped = {0: 2, 2: 1}  # by the steps before the batch
    recorder = Recorder(reporter, {}, input_wait_warning=0.2, skipped=skipped)
    for step in (1, 2, 3):
        recorder.add(step, {"loss": jnp.float32(step)})
    skipped[3] = 5  # of a batch that is made ahead
    recorder.flush()
    assert [row["skipped_images"] for _, row in reporter.rows] == [2, 0, 1]
    assert skipped == {3: 5}
    recorder.close()

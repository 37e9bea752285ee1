"""The loop's rows and rates, and that it warns once when they sink."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.runs import recorder as recorder_module
from mmljax.runs.recorder import Recorder


class Reporter:
    """Keeps what it is told."""

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


@pytest.fixture
def recorder(reporter: Reporter) -> Iterator[Recorder]:
    recorder = Recorder(reporter, {"head": lambda step: 0.5 * step}, input_wait_warning=0.2)
    yield recorder
    recorder.close()


@jax.jit
def run_step(x: jax.Array) -> jax.Array:
    return jnp.sum(x * 2)


def loop(recorder: Recorder, steps: range, *, input_takes: float = 0.0, size: int = 3) -> None:
    """Steps of no length, fed by a slow or a fast input, in one interval."""
    batches: Any = (time.sleep(input_takes) or np.ones(size, np.float32) for _ in steps)
    for step in steps:
        x = recorder.next_batch(batches)
        scalars = {"loss": run_step(x)}
        recorder.add(step, scalars)
        scalars["loss"].block_until_ready()
        time.sleep(0.01)
    recorder.flush()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_rows_have_the_scalars_and_the_rates_of_their_step(
    recorder: Recorder, reporter: Reporter
) -> None:
    for step in (1, 2, 3):
        recorder.add(step, {"loss": jnp.float32(step)})
    assert reporter.rows == []  # nothing is fetched before it is asked for
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


def test_a_starving_input_is_warned_of_once(
    recorder: Recorder,
    reporter: Reporter,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder_module, "WINDOW", 0.02)
    loop(recorder, range(1, 4))
    assert warnings(caplog) == []
    loop(recorder, range(4, 7), input_takes=0.05)
    loop(recorder, range(7, 10), input_takes=0.05)
    (warning,) = warnings(caplog)
    assert "--config.data.threads" in warning
    shares = [rates["waited"] / rates["seconds"] for rates in reporter.rates]
    assert shares[0] < 0.2 < 0.5 < min(shares[1:])
    loop(recorder, range(10, 13))
    loop(recorder, range(13, 16), input_takes=0.05)
    assert len(warnings(caplog)) == 2  # it was well in between


def test_the_input_is_judged_over_long_enough_to_tell(
    recorder: Recorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "WINDOW", 0.3)
    loop(recorder, range(1, 3), input_takes=0.05)
    assert warnings(caplog) == []
    for first in range(3, 15, 2):
        loop(recorder, range(first, first + 2), input_takes=0.05)
    assert len(warnings(caplog)) == 1


def test_the_first_batch_and_what_is_left_out_cost_no_speed(
    recorder: Recorder, reporter: Reporter
) -> None:
    time.sleep(0.1)
    loop(recorder, range(1, 2), input_takes=0.1)
    time.sleep(0.3)
    recorder.restart_clock()
    loop(recorder, range(2, 3))
    assert reporter.rates[0]["waited"] == 0
    assert max(rates["seconds"] for rates in reporter.rates[1:]) < 0.3


def test_compilations_are_expected_at_first_and_warned_of_later(
    recorder: Recorder, reporter: Reporter, caplog: pytest.LogCaptureFixture
) -> None:
    loop(recorder, range(1, 4), size=101)
    jax.jit(lambda x: x - 1)(jnp.ones(2))  # an evaluation, say
    recorder.restart_clock()
    loop(recorder, range(4, 7), size=101)
    assert warnings(caplog) == []
    before = reporter.rates[-1]["compilations"]
    loop(recorder, range(7, 10), size=102)
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

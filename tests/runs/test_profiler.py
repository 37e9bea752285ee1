"""Profiles: which steps are traced, and the files of a trace."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from mmljax.errors import UserError
from mmljax.runs.profiler import Profiler, profiled_steps


def test_steps_are_read_with_both_ends() -> None:
    assert list(profiled_steps("steps 2:4", total=4)) == [2, 3, 4]
    assert list(profiled_steps(" steps  3 : 3 ", total=4)) == [3]
    assert not profiled_steps("", total=4)


@pytest.mark.parametrize("text", ["2:4", "steps 4:2", "steps 0:3", "steps 2:5", "steps 2", "all"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(UserError) as error:
        profiled_steps(text, total=4)
    assert f"profile={text!r} must be 'steps FIRST:LAST', from 1 to the run's 4" in str(error.value)


@pytest.mark.parametrize("first", [1, 3])
def test_a_trace_has_the_steps_that_are_asked_for(first: int, tmp_path: Path) -> None:
    """Also in a session that starts within them; the trace ends with the last one."""
    profiler = Profiler(tmp_path, range(2, 5))
    square = jax.jit(lambda x: x @ x)
    for step in range(first, 7):
        with profiler.step(step):
            result = square(jnp.ones((8, 8)) * step)
        profiler.stop_after(step, result)
    profiler.close()
    assert traced(tmp_path) == [*range(max(first, 2), 5)]


def traced(folder: Path) -> list[int]:
    """The steps of the one trace in a folder."""
    (trace,) = folder.rglob("plugins/profile/*/*.xplane.pb")
    return sorted(
        dict(event.stats)["step_num"]
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    )


def test_a_run_that_breaks_off_leaves_its_trace(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, range(1, 100))
    with profiler.step(1):
        pass
    profiler.close()
    profiler.close()
    assert traced(tmp_path) == [1]


def test_without_steps_nothing_is_written(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path / "profile", range(0))
    with profiler.step(1):
        pass
    profiler.stop_after(1, ())
    profiler.close()
    assert not (tmp_path / "profile").exists()

"""A finished run that is started again trains nothing and keeps its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small_runs
from mmljax.config import Config, load_config
from mmljax.training.loop import train


def make_config(folder: Path, **changes: Any) -> Config:
    images = small_runs.write_images(folder / "images.npz")
    path = small_runs.write_config(folder / "small.py", images, duration="4 steps", **changes)
    return load_config(str(path))


@pytest.mark.slow
def test_a_rerun_keeps_sessions_and_results(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, run = make_config(tmp_path, log__plot=True), tmp_path / "run"
    first = train(config, run)
    (session,) = first["sessions"]
    assert (session["start_step"], session["last_step"]) == (0, 4)
    assert first["seconds"] == session["seconds"] > 0
    before = {name: (run / name).read_bytes() for name in ("results.json", "sessions.json")}

    assert train(config, run) == first
    # The metrics are moved away: no results change, and the report is missing with a warning.
    (run / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    caplog.clear()
    assert train(config, run) == first
    assert {name: (run / name).read_bytes() for name in before} == before
    assert "no page.html" in caplog.text

    # The results are gone too: the run is evaluated again, by the same process that trained it.
    (run / "results.json").unlink()
    (run / "metrics.jsonl").unlink()
    again = train(config, run)
    assert again["scores"] == first["scores"]
    assert again["sessions"] == first["sessions"]
    assert again["seconds"] == first["seconds"]
    assert json.loads((run / "results.json").read_text()) == again

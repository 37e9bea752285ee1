"""Crops that are small at first: which steps have them, and what a stop between changes."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_neighbors import built

import small_runs
from mmljax.config import load_config
from mmljax.data import load
from mmljax.errors import Preempted, UserError
from mmljax.training import preemption
from mmljax.training.batches import make_batches
from mmljax.training.loop import train

SMALL = {"data__start_image_size": 8, "data__start_until": "30%"}


def test_the_first_steps_have_small_crops_of_the_same_images(tmp_path: Path) -> None:
    config, dataset, trainer, mesh = built(tmp_path, **SMALL)
    source = make_batches(config, dataset, trainer, mesh)
    assert source.small_crops == 6
    assert [step for step in range(1, 20) if source.begins(step)] == [6]
    whole = list(load.train_batches(dataset, config, mesh, range(20)))
    parts = [list(source.part(trainer.state, step)[1]) for step in (0, 4, 6, 9)]
    assert [len(part) for part in parts] == [6, 2, 14, 11]
    for step, batch in enumerate([*parts[0], *parts[2]]):
        side = 8 if step < 6 else 12
        assert batch.images.shape == (16, side, side, 1)
        np.testing.assert_array_equal(batch.labels, whole[step].labels)
        if step >= 6:
            np.testing.assert_array_equal(batch.images, whole[step].images)
    for again, step in ((parts[1][0], 4), (parts[3][0], 9)):  # a run that resumes
        np.testing.assert_array_equal(again.images, [*parts[0], *parts[2]][step].images)


def _stops_at(self: preemption.Preemption, last: int, step: int) -> bool:
    return step == last


@pytest.mark.slow
def test_a_run_that_is_stopped_at_the_change_is_the_same(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    images = small_runs.write_images(tmp_path / "images.npz")
    config = load_config(str(small_runs.write_config(tmp_path / "c.py", images, **SMALL)))
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "whole")
    assert "compiled after" not in caplog.text
    for step in (5, 6, 7):
        stops = functools.partialmethod(_stops_at, step)
        monkeypatch.setattr(preemption.Preemption, "requested", stops)
        with pytest.raises(Preempted):
            train(config, tmp_path / "parts")
    monkeypatch.undo()
    train(config, tmp_path / "parts")
    small_runs.assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__start_image_size": 13},
            "start_image_size=13 is above --config.data.image",
        ),
        (
            {
                "data__start_image_size": 8,
                "data__image_size": 16,
                "data__resize_size": 16,
                "model__backbone": "vit_s16",
                "model__pooling": "token",
            },
            "start_image_size=8: .*multiples of 16 pixels",
        ),
        (
            {"data__start_image_size": 8, "data__start_until": "soon"},
            "--config.data.start_until='soon'",
        ),
    ],
)
def test_a_beginning_that_cannot_be_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config, dataset, trainer, mesh = built(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        make_batches(config, dataset, trainer, mesh)

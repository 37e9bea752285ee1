"""Groups, schedules, decay and clipping, against hand-computed updates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from mmljax.config import RunSize
from mmljax.errors import UserError
from mmljax.training import optim

SIZE = RunSize(batch_size=10, train_examples=100, total_steps=100)


def schedules(**changes: Any) -> Any:
    return optim.make_schedules(dataclasses.replace(tiny.OPTIMIZER, **changes), SIZE)


def test_warmup_freezing_and_cosine() -> None:
    rates = schedules(warmup="4 steps", freeze_backbone="10 steps", schedule="cosine")
    backbone, head, weights = (rates[g] for g in ("backbone", "head", "weights"))
    for step in (0, 1, 3, 4, 9, 10, 12, 50, 99):
        decay = (1 + math.cos(math.pi * step / 100)) / 2
        rise = min((step + 1) / 4, 1)
        assert float(head(step)) == pytest.approx(2e-2 * decay * rise, rel=1e-4)
        late = 0 if step < 10 else min((step - 10 + 1) / 4, 1)
        assert float(backbone(step)) == pytest.approx(1e-2 * decay * late, rel=1e-4)
        assert weights(step) == 5e-2


def test_step_schedule_falls_by_its_factor() -> None:
    rates = schedules(warmup="0 steps", schedule="step", step_every="3 epochs", step_factor=0.25)
    got = [float(rates["head"](step)) for step in (0, 29, 30, 59, 60)]
    np.testing.assert_allclose(got, [2e-2, 2e-2, 5e-3, 5e-3, 1.25e-3], rtol=1e-6)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"--config.optimizer.schedule='cosin'.*'cosine'"):
        schedules(schedule="cosin")
    with pytest.raises(UserError, match=r"--config.optimizer.name='adam'.*'adamw'"):
        optim.make_optimizer(dataclasses.replace(tiny.OPTIMIZER, name="adam"), schedules())


def params() -> dict[str, Any]:
    return {
        "network": {
            "backbone": {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3)},
            "head": {"kernel": jnp.full((3, 2), 2.0)},
        },
        "proxies": jnp.full((4, 2), 3.0),
        "weights": jnp.zeros(3),
    }


def test_each_group_has_its_rate_decay_and_clip() -> None:
    """One step of plain descent, computed by hand."""
    config = dataclasses.replace(
        tiny.OPTIMIZER,
        name="sgd",
        b1=0.0,
        warmup="0 steps",
        freeze_backbone="0 steps",
        schedule="constant",
        clip_norm=1.0,
    )
    optimizer = optim.make_optimizer(config, optim.make_schedules(config, SIZE))
    before = params()
    gradient = {
        "network": {
            "backbone": {"kernel": jnp.full((2, 3), 0.1), "scale": jnp.full(3, 0.1)},
            "head": {"kernel": jnp.full((3, 2), 10.0)},
        },
        "proxies": jnp.full((4, 2), 0.2),
        "weights": jnp.full(3, 100.0),
    }
    updates, _ = optimizer.update(gradient, optimizer.init(before), before)
    backbone = updates["network"]["backbone"]
    np.testing.assert_allclose(backbone["kernel"], -1e-2 * (0.1 + 1e-3 * 1.0), rtol=1e-5)
    np.testing.assert_allclose(backbone["scale"], -1e-2 * 0.1, rtol=1e-5)  # vectors do not decay
    clipped = 10 / (10 * math.sqrt(6))  # the group's norm becomes 1
    head = updates["network"]["head"]["kernel"]
    np.testing.assert_allclose(head, -2e-2 * (clipped + 1e-3 * 2.0), rtol=1e-5)
    np.testing.assert_allclose(updates["proxies"], -5e-2 * 0.2, rtol=1e-5)
    np.testing.assert_allclose(updates["weights"], -5e-2 * 100, rtol=1e-5)  # never clipped


def test_table_of_groups_counts_every_parameter() -> None:
    lines = optim.describe_groups(params(), tiny.OPTIMIZER).splitlines()
    counts = {line.split()[0]: line.split()[1:3] for line in lines[1:]}
    assert counts == {
        "backbone": ["2", "9"],
        "head": ["1", "6"],
        "proxies": ["1", "8"],
        "weights": ["1", "3"],
    }

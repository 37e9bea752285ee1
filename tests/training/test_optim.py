"""Groups, schedules, decay and clipping, against hand-computed updates."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import small_runs
import tiny
from mmljax.config import load_config
from mmljax.data import load
from mmljax.durations import RunSize
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.models.backbones import BACKBONES
from mmljax.training import optim
from mmljax.training.trainer import make_trainer

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
    decayed = optim.describe_groups(params(), dataclasses.replace(tiny.OPTIMIZER, layer_decay=0.7))
    assert decayed.splitlines()[-1] == "each layer of the backbone has 0.7 of the next one's rate"


def layer_of(name: str, *, blocks_before: dict[str, int], stem: str, last: str) -> int:
    """The layer of a parameter by its name: 0 the stem, then the blocks, then what follows."""
    if re.match(stem, name):
        return 0
    for stage, before in blocks_before.items():
        if match := re.match(rf"{stage}\.(\d+)\.", name):
            return before + int(match[1]) + 1
    assert re.match(last, name), name
    return 17 if "conv_head" in last else 13


RESNET = {"stem": r"(conv1|bn1)\.", "last": "(?!)"}
LAYERS: dict[str, tuple[int, dict[str, Any]]] = {  # the last layer, and what tells a layer
    "small": (3, {"blocks_before": {"layer1": 0, "layer2": 1, "layer3": 2}, **RESNET}),
    "resnet50": (
        16,
        {"blocks_before": {"layer1": 0, "layer2": 3, "layer3": 7, "layer4": 13}, **RESNET},
    ),
    "efficientnet_lite0": (
        17,
        {
            "blocks_before": {"blocks": 0},
            "stem": r"(conv_stem|bn0)\.",
            "last": r"(conv_head|bn1)\.",
        },
    ),
    "vit_s16": (
        13,
        {
            "blocks_before": {"blocks": 0},
            "stem": r"patch_embed\.|(cls_token|pos_embed)$",
            "last": r"norm\.",
        },
    ),
}


@pytest.mark.parametrize("backbone", LAYERS)
def test_rates_fall_from_layer_to_layer(backbone: str) -> None:
    """One step of plain descent with weight decay, for every parameter by its name."""
    build = BACKBONES[backbone]

    def make() -> Any:
        return build(width=8, channels=3, dtype=jnp.float32, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    own = jax.tree.map(lambda x: np.full((2, 2), 3.0, np.float32), shapes)
    before = {**params(), "network": {"backbone": own, "head": np.ones((2, 2), np.float32)}}
    gradient = jax.tree.map(np.ones_like, before)
    config = dataclasses.replace(
        tiny.OPTIMIZER,
        name="sgd",
        b1=0.0,
        warmup="0 steps",
        freeze_backbone="0 steps",
        schedule="constant",
        clip_norm=0.0,
        layer_decay=0.7,
    )
    schedules = optim.make_schedules(config, SIZE)
    optimizer = optim.make_optimizer(config, schedules, layers=model.layers())
    updates = jax.jit(lambda: optimizer.update(gradient, optimizer.init(before), before)[0])()
    last, rules = LAYERS[backbone]
    found = set()
    for path, update in jax.tree_util.tree_leaves_with_path(updates["network"]["backbone"]):
        name = ".".join(str(entry.key) for entry in path)
        layer = layer_of(name, **rules)
        found.add(layer)
        rate = 1e-2 * 0.7 ** (last - layer)
        np.testing.assert_allclose(update, -rate * (1 + 1e-3 * 3.0), rtol=1e-5, err_msg=name)
    assert found == set(range(last + 1))
    np.testing.assert_allclose(updates["network"]["head"], -2e-2 * (1 + 1e-3), rtol=1e-5)


@pytest.mark.slow
def test_a_run_decays_its_own_backbone(tmp_path: Path) -> None:
    """One step of a run with and without the decay: the ratio of the updates, layer by layer."""
    images = small_runs.write_images(tmp_path / "images.npz")
    changes = {
        "optimizer__name": "sgd",
        "optimizer__b1": 0.0,
        "optimizer__backbone__learning_rate": 100.0,  # so that the difference shows in float32
        "optimizer__warmup": "0 steps",
    }
    moved = []
    for decay in (1.0, 0.5):
        path = small_runs.write_config(
            tmp_path / "small.py", images, optimizer__layer_decay=decay, **changes
        )
        config, mesh = load_config(str(path)), make_mesh()
        dataset = load.load_dataset(config)
        trainer = make_trainer(
            config, classes=dataset.classes, channels=1, train_examples=72, mesh=mesh
        )
        start = jax.device_get(trainer.state.params["network"])
        batch = next(load.train_batches(dataset, config, mesh, range(1)))
        end = jax.device_get(trainer.step(trainer.state, batch)[0].params["network"])
        moved.append(jax.tree.map(lambda a, b: b - a, start, end))
    ratios = jax.tree.map(lambda a, b: np.vdot(a, b) / np.vdot(a, a), *moved)
    backbone = ratios["backbone"]
    for layer, factor in (("conv1", 1 / 8), ("layer1", 1 / 4), ("layer2", 1 / 2), ("layer3", 1)):
        for ratio in jax.tree.leaves(backbone[layer]):
            assert ratio == pytest.approx(factor, rel=1e-3), layer
    assert jax.tree.leaves(ratios["head"]) == pytest.approx([1, 1], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("layer_decay=0", "above 0 and at most 1, found 0"),
        ("layer_decay=1.01", "above 0 and at most 1, found 1.01"),
        ("ema_decay=1", "at least 0 and at most 0.999999, found 1"),
        ("ema_decay=-0.1", "at least 0 and at most 0.999999, found -0.1"),
    ],
)
def test_a_decay_out_of_range_is_refused(override: str, allowed: str) -> None:
    message = f"--config.optimizer.{override.partition('=')[0]} must be {allowed}"
    with pytest.raises(UserError, match=message):
        load_config("quickstart", [f"optimizer.{override}"])

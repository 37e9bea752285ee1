"""The layout of the state over the devices, and its bytes per device (docs/scale.md)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import tiny
from mmljax.config import load_config
from mmljax.mesh import AXIS
from mmljax.training.state import describe_state, state_bytes
from mmljax.training.trainer import make_trainer
from mmljax.types import Batch


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 5, 8])
def test_state_is_as_large_as_the_formulas_say(devices: int) -> None:
    _, state, _, _ = tiny.make(devices, memory_size=240, ema_decay=0.9)
    sizes = state_bytes(state)
    rows = {1: 10, 2: 5, 3: 4, 4: 3, 5: 2, 8: 2}[devices]  # of 10 classes, on each device
    proxies = rows * tiny.SIZE * 4
    assert sizes["proxies"] == proxies
    assert 0 <= sizes["optimizer of proxies"] - 2 * proxies <= 16  # Adam's moments, counters
    assert sizes["memory"] == 240 * (4 * tiny.SIZE + 4) // devices + 4  # and the next slot
    network = sum(4 * x.size for x in jax.tree.leaves(state.params["network"]))
    assert sizes["network"] == network
    statistics = sum(4 * x.size for x in jax.tree.leaves(state.model_state))
    assert sizes["average"] == network + statistics
    assert state_bytes(tiny.make(devices)[1])["average"] == 0
    rest = sizes["optimizer of the rest"]
    assert 2 * network <= rest < 2 * network + 200  # and the contribution weights, counters


def test_the_line_for_the_log_has_the_sum_and_leaves_out_what_is_empty() -> None:
    _, state, _, _ = tiny.make(2)
    line = describe_state(state)
    assert line.startswith("state per device: 0.0 MiB (network ")
    assert "proxies" in line
    assert "memory" not in line


def test_shapes_with_shardings_do_for_arrays() -> None:
    _, state, _, _ = tiny.make(8)

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    assert state_bytes(jax.tree.map(shape, state)) == state_bytes(state)


def test_state_is_split_by_rows_and_padded() -> None:
    """Proxies, their moments and the memory over the devices; the rest on each of them."""
    _, state, _, _ = tiny.make(8, memory_size=100, centers=2)
    assert state.params["proxies"].shape == (32, tiny.SIZE)  # 10 classes fill 16, 2 centers each
    assert state.objective.memory["labels"].shape == (104,)
    split = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not leaf.sharding.is_fully_replicated:
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // 8
            split.add(jax.tree_util.keystr(path))
    assert len(split) == 5  # proxies, two moments, the memory's vectors and labels
    assert all("proxies" in name or "memory" in name for name in split)


@pytest.mark.parametrize("devices", [12, 256, 512])
def test_meshes_of_any_size(devices: int) -> None:
    """Shapes alone, after a step: padding follows the mesh, its rows are equal on all devices."""
    mesh = jax.sharding.AbstractMesh((devices,), (AXIS,))
    config = load_config(
        "quickstart",
        [
            "model.backbone=small",
            "model.width=4",
            f"data.batch_size={2 * devices}",
            "memory.size=1000",
            "centers=3",
            "objectives.separation.sampled_proxies=100",
        ],
    )
    side = config.data.image_size
    batch = Batch(
        np.zeros((2 * devices, side, side, 3), np.uint8), *np.zeros((2, 2 * devices), int)
    )

    def stepped() -> Any:
        trainer = make_trainer(config, classes=1001, channels=3, train_examples=9999, mesh=mesh)
        return trainer.step(trainer.state, batch)

    state, _ = jax.eval_shape(stepped)
    classes = {12: 1008, 256: 1024, 512: 1024}[devices]
    assert state.params["proxies"].shape == (3 * classes, config.model.embedding_size)
    assert state.objective.memory["labels"].shape == ({12: 1008, 256: 1024, 512: 1024}[devices],)


def test_padding_is_zero_and_real_rows_do_not_depend_on_it() -> None:
    proxies = [np.asarray(tiny.make(n, centers=3)[1].params["proxies"]) for n in (1, 3, 8)]
    assert [len(x) for x in proxies] == [30, 36, 48]
    for x in proxies:
        np.testing.assert_array_equal(x[:30], proxies[0])
        np.testing.assert_array_equal(x[30:], 0)

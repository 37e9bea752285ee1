"""The layout of the state over the devices, and its bytes per device (docs/scale.md)."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import tiny
from mmljax.errors import UserError
from mmljax.training.state import describe_state, state_bytes


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_state_is_as_large_as_the_formulas_say(devices: int) -> None:
    _, state, _, _ = tiny.make(devices, memory_size=256, ema_decay=0.9)
    sizes = state_bytes(state)
    proxies = 128 * tiny.SIZE * 4 // devices
    assert sizes["proxies"] == proxies
    assert 0 <= sizes["optimizer of proxies"] - 2 * proxies <= 16  # Adam's moments, counters
    assert sizes["memory"] == 256 * (4 * tiny.SIZE + 4) // devices + 4  # and the next slot
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
    assert state.params["proxies"].shape == (256, tiny.SIZE)  # 10 classes fill 128, 2 centers each
    assert state.objective.memory["labels"].shape == (128,)
    split = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not leaf.sharding.is_fully_replicated:
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // 8
            split.add(jax.tree_util.keystr(path))
    assert len(split) == 5  # proxies, two moments, the memory's vectors and labels
    assert all("proxies" in name or "memory" in name for name in split)


def test_devices_that_do_not_divide_the_proxies_are_refused() -> None:
    with pytest.raises(UserError, match="3 devices do not divide the proxies.*multiple of 128"):
        tiny.make(3)

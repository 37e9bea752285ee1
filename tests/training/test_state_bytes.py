"""Bytes per device are those of the formulas in docs/scale.md."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import tiny
from mmljax.training.state_bytes import describe, state_bytes


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_state_is_as_large_as_the_formulas_say(devices: int) -> None:
    _, state, _, _ = tiny.make(devices, memory=256)
    sizes = state_bytes(state)
    proxies = 128 * tiny.SIZE * 4 // devices
    assert sizes["proxies"] == proxies
    assert 0 <= sizes["optimizer of proxies"] - 2 * proxies <= 16  # Adam's moments, counters
    assert sizes["memory"] == 256 * (4 * tiny.SIZE + 4) // devices
    network = sum(4 * x.size for x in jax.tree.leaves(state.params["network"]))
    assert sizes["network"] == network
    rest = sizes["optimizer of the rest"]
    assert 2 * network <= rest < 2 * network + 200  # and the contribution weights, counters


def test_the_line_for_the_log_has_the_sum_and_leaves_out_what_is_empty() -> None:
    _, state, _, _ = tiny.make(2)
    line = describe(state)
    assert line.startswith("state per device: 0.0 MiB (network ")
    assert "proxies" in line
    assert "memory" not in line


def test_shapes_with_shardings_do_for_arrays() -> None:
    _, state, _, _ = tiny.make(8)

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    assert state_bytes(jax.tree.map(shape, state)) == state_bytes(state)

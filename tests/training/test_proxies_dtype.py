"""Proxies in bfloat16: rounding by chance, float32 moments, the same on any number of devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from mmljax.errors import UserError
from mmljax.numerics import stochastic_round
from mmljax.training.state import state_bytes


def neighbours(x: float) -> tuple[float, float]:
    """The two bfloat16 numbers around a float32, found by cutting its bits, in order of size."""
    bits = int(np.float32(x).view(np.uint32)) & 0xFFFF0000
    values = [float(np.uint32(b).view(np.float32)) for b in (bits, bits + 0x10000)]
    return values[0], values[0] if values[0] == np.float32(x) else values[1]


def test_rounds_to_a_neighbour_with_the_right_chance() -> None:
    x = np.array([1.0, -1.0, 0.0, 1.001, -0.0437, 3e-5, 1.0039, -2.7e4], np.float32)
    count = 20_000
    many = stochastic_round(jnp.tile(jnp.asarray(x), (count, 1)), jax.random.key(0))
    assert many.dtype == jnp.bfloat16
    found = np.asarray(many, np.float64)
    for column, value in zip(found.T, x, strict=True):
        near, far = neighbours(value)
        assert set(column) == {near, far}
        if near != far:
            part = (float(value) - near) / (far - near)
            assert np.mean(column == far) == pytest.approx(part, abs=4 * 0.5 / count**0.5)


def test_draws_depend_on_the_key_and_not_on_the_rows_that_follow() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 5)), jnp.float32)
    longer = jnp.pad(x, [(0, 7), (0, 0)], constant_values=0.3)
    rounded = stochastic_round(x, jax.random.key(1))
    np.testing.assert_array_equal(stochastic_round(longer, jax.random.key(1))[:30], rounded)
    assert np.mean(np.asarray(stochastic_round(x, jax.random.key(2)) != rounded)) > 0.2


def test_numbers_that_are_not_finite_stay() -> None:
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(np.asarray(stochastic_round(x, jax.random.key(0)), float), x)


def test_small_updates_add_up_where_rounding_to_nearest_loses_them() -> None:
    """400 updates by a 20th of a unit in the last place, from components as proxies have them."""
    start = jnp.asarray(np.random.default_rng(0).normal(size=2000) / 512**0.5, jnp.bfloat16)
    wide = np.asarray(start, np.float64)
    update = np.asarray(2.0 ** (np.floor(np.log2(np.abs(wide))) - 7) / 20, np.float32)
    nearest = chance = start
    for step in range(400):
        nearest = (nearest.astype(jnp.float32) + update).astype(jnp.bfloat16)
        chance = stochastic_round(
            chance.astype(jnp.float32) + update, jax.random.fold_in(jax.random.key(3), step)
        )
    np.testing.assert_array_equal(nearest, start)
    moved = (np.asarray(chance, np.float64) - wide) / (400 * update)
    assert np.mean(moved) == pytest.approx(1, abs=0.02)


def trained(devices: int, steps: int, **options: Any) -> Any:
    step, state, place, _ = tiny.make(devices, rows=tiny.objectives(), **options)
    for index in range(steps):
        state, _ = step(state, place(tiny.batch(index)))
    return state


def test_moments_are_those_of_float32_and_the_update_is_rounded_once() -> None:
    step, state, place, _ = tiny.make(2, proxies_dtype="bfloat16")
    _, like, _, _ = tiny.make(2)
    assert state.params["proxies"].dtype == jnp.bfloat16
    wide = jax.device_put(
        state.params["proxies"].astype(jnp.float32), like.params["proxies"].sharding
    )
    like = like._replace(params=like.params | {"proxies": wide})
    np.testing.assert_allclose(wide, tiny.make(2)[1].params["proxies"], rtol=2**-8)
    batch = place(tiny.batch(0))
    after, scalars = step(state, batch)
    expected, scalars_expected = tiny.make(2)[0](like, batch)
    for name, value in scalars.items():
        np.testing.assert_array_equal(value, scalars_expected[name], err_msg=name)
    moments = jax.tree.leaves(after.optimizer_state)
    for a, b in zip(moments, jax.tree.leaves(expected.optimizer_state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    exact = np.asarray(expected.params["proxies"])[: tiny.CLASSES]
    rounded = np.asarray(after.params["proxies"], np.float32)[: tiny.CLASSES]
    for value, found in zip(exact.reshape(-1), rounded.reshape(-1), strict=True):
        assert found in neighbours(value)
    nearest = np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32)
    assert 0.1 < np.mean(rounded != nearest) < 0.4


def test_any_number_of_devices_rounds_alike() -> None:
    with jax.enable_x64(True):
        one, eight = (
            trained(devices, 5, dtype=jnp.float64, proxies_dtype="bfloat16") for devices in (1, 8)
        )
    count = tiny.CLASSES
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        if a.dtype == jnp.bfloat16:
            np.testing.assert_array_equal(a[:count], b[:count])
        else:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_bytes_of_the_state() -> None:
    half, whole = (state_bytes(tiny.make(4, proxies_dtype=d)[1]) for d in ("bfloat16", "float32"))
    assert half.pop("proxies") * 2 == whole.pop("proxies")
    assert half == whole


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match="config.optimizer.proxies_dtype='bf16' is unknown"):
        tiny.make(1, proxies_dtype="bf16")

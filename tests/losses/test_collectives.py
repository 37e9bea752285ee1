"""Fetched columns are the right rows, gradients return to their owners, draws are uniform."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mmljax.losses.collectives import (
    Axis,
    class_proxies,
    draw_proxies,
    fetch_proxies,
    return_gradient,
)
from mmljax.mesh import AXIS, make_mesh

ROWS, SIZE = 24, 3


def sharded(
    function: Callable[..., Any], *, devices: int, out: PartitionSpec
) -> Callable[..., Any]:
    """Over proxies split by rows and further arguments whole."""

    def call(proxies: Any, *arguments: Any) -> Any:
        return jax.shard_map(
            function,
            mesh=make_mesh(jax.devices()[:devices]),
            in_specs=(PartitionSpec(AXIS), *(PartitionSpec() for _ in arguments)),
            out_specs=out,
        )(proxies, *arguments)

    return jax.jit(call)


def proxies() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, SIZE)).astype(np.float32)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_proxies_of_any_device_are_fetched_exactly(devices: int) -> None:
    positions = np.array([0, 3, 7, 11, 12, 23], np.int32)
    fetch = sharded(partial(fetch_proxies, axis=Axis(AXIS)), devices=devices, out=PartitionSpec())
    np.testing.assert_array_equal(fetch(proxies(), positions), proxies()[positions])


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_gradients_of_all_devices_come_home(devices: int) -> None:
    positions = np.array([1, 2, 22, 23], np.int32)
    gradient = np.random.default_rng(1).normal(size=(4, SIZE)).astype(np.float32)

    def give(own: Any, positions: Any, gradient: Any) -> Any:
        mine = (1 + jax.lax.axis_index(AXIS)) * gradient  # each device another one
        return return_gradient(mine, positions, own, Axis(AXIS))

    found = sharded(give, devices=devices, out=PartitionSpec(AXIS))(proxies(), positions, gradient)
    expected = np.zeros((ROWS, SIZE))
    for position, row in zip(positions, gradient, strict=True):
        expected[position] += row * sum(range(1, devices + 1))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_each_sample_has_the_proxies_of_its_class(devices: int) -> None:
    centers, labels = 2, np.array([11, 0, 5, 5, 7, 1, 10, 3], np.int32)

    def call(own: Any, labels: Any) -> Any:
        count = len(labels) // devices
        mine = jax.lax.dynamic_slice_in_dim(labels, jax.lax.axis_index(AXIS) * count, count)
        return class_proxies(own, mine, Axis(AXIS), centers=centers)

    found = sharded(call, devices=devices, out=PartitionSpec(AXIS))(proxies(), labels)
    for label, own in zip(labels, found, strict=True):
        np.testing.assert_array_equal(own, proxies()[label * centers : (label + 1) * centers])


@pytest.mark.parametrize(("count", "of"), [(5, 5), (4, 10), (7, 10), (4096, 10_000_000)])
def test_draws_are_different_proxies_each_as_likely(count: int, of: int) -> None:
    keys = jax.random.split(jax.random.key(0), 2000 if of < 100 else 3)
    draws = np.asarray(jax.vmap(lambda key: draw_proxies(key, count=count, of=of))(keys))
    assert draws.min() >= 0
    assert draws.max() < of
    assert (np.diff(draws, axis=1) > 0).all()
    if of < 100:
        times = np.bincount(draws.ravel(), minlength=of) / len(keys)
        lengths = [of // count, -(-of // count)]
        assert times.min() > 0.9 / lengths[1]
        assert times.max() < 1.1 / lengths[0]
    assert jnp.issubdtype(draws.dtype, jnp.int32)

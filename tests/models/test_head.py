"""Tests for mmljax.models.head: float64 loops over rows, channels and layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from mmljax.config import ModelConfig
from mmljax.errors import UserError
from mmljax.mesh import AXIS, make_mesh
from mmljax.models.head import Head, dropout


def make(features: int = 5, size: int = 4, **changes: Any) -> Head:
    """A head whose arrays are all unlike those of a new one."""
    config = dataclasses.replace(ModelConfig(pooling="average", layer_norm="none"), **changes)
    head = Head(features, size, config=config, rngs=nnx.Rngs(3))
    random = np.random.default_rng(1)
    state = nnx.state(head)
    nnx.update(
        head, jax.tree.map(lambda x: x + jnp.asarray(random.uniform(0.1, 0.6, x.shape)), state)
    )
    return head


def array(x: Any) -> np.ndarray:
    return np.array(x[...], np.float64)


@pytest.mark.parametrize("pooling", ["average", "max", "average+max"])
@pytest.mark.parametrize("layer_norm", ["none", "before", "after"])
def test_head(pooling: str, layer_norm: str) -> None:
    head = make(pooling=pooling, layer_norm=layer_norm)
    head.projection.bias.set_value(jnp.array([0.5, -0.2, 0.1, 0.3]))
    features = np.random.default_rng(0).normal(0.5, 1, (3, 2, 4, 5)).astype(np.float32)
    kernel, bias = (np.array(head.projection.kernel[...]), np.array(head.projection.bias[...]))
    for image, found in zip(
        features, np.array(head(jnp.asarray(features), train=False)), strict=True
    ):
        cells = [image[i, j] for i in range(2) for j in range(4)]
        average, maximum = sum(cells) / 8, np.maximum.reduce(cells)
        x = {"average": average, "max": maximum, "average+max": average + maximum}[pooling]
        if layer_norm == "before":
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        x = x @ kernel + bias
        if layer_norm == "after":
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        np.testing.assert_allclose(found, x / np.linalg.norm(x), atol=1e-5)


def standardized(x: np.ndarray, mean: Any, variance: Any) -> np.ndarray:
    return (x - mean) / np.sqrt(variance)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_layers(kind: str, norm: str, train: bool) -> None:
    head = make(head=kind, head_width=7, head_norm=norm)
    rows = np.random.default_rng(0).normal(0.3, 1, (8, 5)).astype(np.float32)
    statistics = (
        None if norm != "batch" else (array(head.norm.mean).copy(), array(head.norm.var).copy())
    )

    @jax.shard_map(mesh=make_mesh(), in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(AXIS))
    def found(x: Any) -> Any:
        return nnx.merge(*nnx.split(head), copy=True)(x, train=train)

    x = rows.astype(np.float64)
    if kind == "mlp":
        x = x @ array(head.hidden.kernel)
        x = x if norm == "batch" else x + array(head.hidden.bias)
    if norm == "layer":
        x = np.stack([standardized(row, row.mean(), row.var() + 1e-6) for row in x])
    elif norm == "batch":
        mean, variance = (x.mean(0), x.var(0)) if train else statistics
        x = standardized(x, mean, variance + 1e-5)
    if norm != "none":
        x = x * array(head.norm.scale) + array(head.norm.bias)
    if kind == "mlp":
        x = np.maximum(x, 0)
    x = x @ array(head.projection.kernel) + array(head.projection.bias)
    wanted = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(found(jnp.asarray(rows)), wanted, atol=2e-5)


def test_dropout_keeps_the_mean_and_depends_on_each_row_s_key_alone() -> None:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(400))
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (400, 50)), jnp.float32)
    dropped = np.array(dropout(x, keys, rate=0.3))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], np.array(x)[kept] / 0.7, rtol=1e-6)
    assert abs(kept.mean() - 0.7) < 0.02
    assert (kept.mean(axis=0) > 0.5).all()
    assert (kept.mean(axis=1) > 0.3).all()
    order = np.random.default_rng(1).permutation(400)[:17]
    np.testing.assert_array_equal(dropout(x[order], keys[order], rate=0.3), dropped[order])


def test_dropout_is_for_training_with_keys_only() -> None:
    head, keys = make(head="mlp", dropout=0.5), jax.random.split(jax.random.key(0), 8)
    x = jnp.asarray(np.random.default_rng(0).normal(0.3, 1, (8, 5)), jnp.float32)
    plain = head(x, train=False)
    np.testing.assert_array_equal(plain, head(x, train=False, keys=keys))
    np.testing.assert_array_equal(plain, head(x, train=True))
    assert np.abs(plain - head(x, train=True, keys=keys)).max() > 0.01


@pytest.mark.parametrize("key", ["head", "head_norm", "layer_norm", "pooling"])
def test_an_unknown_name_is_an_error_that_names_the_key(key: str) -> None:
    with pytest.raises(UserError, match=rf"--config.model.{key}='bach' is unknown"):
        make(**{key: "bach"})

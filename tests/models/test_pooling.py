"""Generalised-mean pooling against a loop in float64 and against torch, with its gradients."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import torch_networks
from mmljax.config import ModelConfig
from mmljax.models.embedder import make_embedder
from mmljax.models.pooling import POOLINGS, generalized_mean
from mmljax.training.optim import label_groups

CONFIG = ModelConfig(
    backbone="small", width=4, embedding_size=6, pooling="gem", compute_dtype="float32"
)


def features(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Features of which a third are negative."""
    return np.random.default_rng(0).normal(0.4, 1.0, shape) * scale


def by_loop(x: np.ndarray, p: float) -> np.ndarray:
    result = np.empty((x.shape[0], x.shape[2]))
    for image in range(x.shape[0]):
        for channel in range(x.shape[2]):
            total = 0.0
            for place in range(x.shape[1]):
                total += max(float(x[image, place, channel]), 1e-6) ** p
            result[image, channel] = (total / x.shape[1]) ** (1 / p)
    return result


@pytest.mark.parametrize("p", [0.7, 1.0, 3.0, 6.5, -2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
def test_value_is_that_of_a_loop(p: float, dtype: str, tolerance: float) -> None:
    x = features(3, 7, 5).astype(dtype)
    x[1, :, 2] = -1.0  # a channel without any positive feature
    with jax.enable_x64(dtype == "float64"):
        found = generalized_mean(jnp.asarray(x), jnp.asarray(p, dtype))
        assert found.dtype == dtype
    np.testing.assert_allclose(found, by_loop(x, p), rtol=tolerance)


@pytest.mark.parametrize("scale", [1e-5, 1e20])
def test_powers_neither_overflow_nor_vanish_in_float32(scale: float) -> None:
    x = np.abs(features(2, 6, 3, scale=scale))
    expected = by_loop(x, 9.0)
    found, gradient = jax.value_and_grad(lambda x: jnp.sum(generalized_mean(x, jnp.float32(9))))(
        jnp.asarray(x, jnp.float32)
    )
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0.1


def test_gradients_are_differences_of_the_loop() -> None:
    x, p, h = features(2, 5, 3), 2.6, 1e-6
    cotangent = np.random.default_rng(1).normal(size=(2, 3))
    with jax.enable_x64(True):
        _, backward = jax.vjp(generalized_mean, jnp.asarray(x), jnp.asarray(p))
        at_x, at_p = map(np.asarray, backward(jnp.asarray(cotangent)))
    expected = np.sum(cotangent * (by_loop(x, p + h) - by_loop(x, p - h))) / (2 * h)
    np.testing.assert_allclose(at_p, expected, rtol=1e-7)
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = h
        expected = np.sum(cotangent * (by_loop(x + step, p) - by_loop(x - step, p))) / (2 * h)
        np.testing.assert_allclose(at_x[place], expected, rtol=1e-6, atol=1e-8)
        assert (at_x[place] == 0) == (x[place] < 1e-6)


def test_limits() -> None:
    x = jnp.asarray(np.abs(features(2, 8, 3)) + 0.01, jnp.float32)
    np.testing.assert_allclose(generalized_mean(x, jnp.float32(1)), x.mean(1), rtol=1e-5)
    np.testing.assert_allclose(generalized_mean(x, jnp.float32(2000)), x.max(1), rtol=2e-3)
    equal = jnp.full((1, 4, 2), 0.3)
    np.testing.assert_allclose(generalized_mean(equal, jnp.float32(3)), 0.3, rtol=1e-6)
    assert jax.grad(lambda p: generalized_mean(equal, p).sum())(jnp.float32(3)) == 0


def test_map_equals_the_formula_in_torch() -> None:
    """The formula of the authors' and later code: average pooling of clamped powers."""
    torch = torch_networks.load_torch()
    x = features(3, 4, 6, 5)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    powers = images.clamp(min=1e-6).pow(p)
    expected = torch.nn.functional.avg_pool2d(powers, (4, 6)).pow(1 / p)[..., 0, 0]
    torch.sum(expected * torch.arange(5)).backward()
    with jax.enable_x64(True):
        graphdef, state = nnx.split(POOLINGS["map"]["gem"]())
        state = jax.tree.map(lambda v: v.astype(jnp.float64), state)

        def pooled(state: Any, x: Any) -> Any:
            found = nnx.merge(graphdef, state)(x)
            return jnp.sum(found * jnp.arange(5)), found

        (at_p, at_x), found = jax.grad(pooled, (0, 1), has_aux=True)(state, jnp.asarray(x))
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-12)
    np.testing.assert_allclose(at_p["p"][...], p.grad, rtol=1e-9)
    np.testing.assert_allclose(
        at_x.transpose(0, 3, 1, 2), images.grad.numpy(), rtol=1e-9, atol=1e-15
    )


def test_tokens_are_pooled_without_the_class_token() -> None:
    tokens = features(2, 1 + 6, 4).astype(np.float32)
    pool = POOLINGS["tokens"]["gem"]()
    np.testing.assert_allclose(pool(jnp.asarray(tokens)), by_loop(tokens[:, 1:], 3.0), rtol=2e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_exponent_is_a_parameter_of_the_head(kind: str) -> None:
    config = dataclasses.replace(CONFIG, compute_dtype=kind)
    model = make_embedder(config, channels=3, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    exponent = params["head"]["pool"]["p"]
    assert (exponent[...], exponent[...].dtype) == (3.0, jnp.float32)
    groups = label_groups({"network": nnx.to_pure_dict(params)})
    assert groups["network"]["head"]["pool"]["p"] == "head"
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), np.uint8))

    def loss(params: Any) -> Any:
        return nnx.merge(graphdef, params, rest)(images, train=False)[:, 0].sum()

    gradient = jax.jit(jax.grad(loss))(params)["head"]["pool"]["p"][...]
    assert math.isfinite(gradient)
    assert gradient != 0

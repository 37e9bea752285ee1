"""The shared stable forms, at the values where plain formulas break."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax import numerics
from mmljax.types import Values


def test_l2_normalize_has_unit_rows_and_survives_zero() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0], [3e18, 4e18]])
    y = numerics.l2_normalize(x)
    np.testing.assert_allclose(y, [[0.6, 0.8], [0, 0], [1, 0], [0.6, 0.8]], rtol=1e-6)
    gradient = jax.jacobian(numerics.l2_normalize)(x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_l2_normalize_in_half_precision(dtype: str) -> None:
    """In float16 the epsilon is 0 and the square of 300 is infinite."""
    x = jnp.array([[0, 0], [300, 400], [3e-3, -4e-3]], dtype)
    y = numerics.l2_normalize(x)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y.astype(np.float32), [[0, 0], [0.6, 0.8], [0.6, -0.8]], rtol=1e-2)
    gradient = jax.grad(lambda x: numerics.l2_normalize(x).astype(jnp.float32).sum())(x)
    assert np.isfinite(gradient.astype(np.float32)).all()


@pytest.mark.parametrize("distance", [1e-4, 1.7e-3, 0.1, 1.0])
def test_squared_distances_keep_their_digits(distance: float) -> None:
    """Value and gradient of the distance in float32 against float64, from the same vectors."""
    random = np.random.default_rng(0)
    x = random.normal(size=(5, 16))
    away = random.normal(size=(5, 16))
    away -= x * np.sum(x * away, axis=1, keepdims=True) / np.sum(x * x, axis=1, keepdims=True)
    x, away = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, away))
    angle = 2 * math.asin(distance / 2)
    y = (math.cos(angle) * x + math.sin(angle) * away).astype(np.float32)
    x = x.astype(np.float32)
    difference = x.astype(float)[:, None] - y.astype(float)
    expected = np.linalg.norm(difference, axis=-1)

    def total(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sqrt(numerics.squared_distances(x, y)).sum()

    np.testing.assert_allclose(numerics.squared_distances(x, y), expected**2, rtol=2e-6)
    at_x, at_y = jax.grad(total, (0, 1))(x, y)
    directions = difference / expected[..., None]
    tolerance = 1e-6 + 1e-6 / distance  # a difference of matrix products
    np.testing.assert_allclose(at_x, directions.sum(1), atol=tolerance)
    np.testing.assert_allclose(at_y, -directions.sum(0), atol=tolerance)


@pytest.mark.parametrize("add_one", [False, True])
def test_masked_logsumexp_equals_the_loop(add_one: bool) -> None:
    random = np.random.default_rng(0)
    x, mask = random.normal(0, 3, (6, 9)), random.random((6, 9)) < 0.4
    mask[2] = False
    with jax.enable_x64(True):
        got = numerics.masked_logsumexp(jnp.asarray(x), mask, add_one=add_one)
    for i in range(6):
        total = sum(math.exp(x[i, j]) for j in range(9) if mask[i, j]) + add_one
        assert float(got[i]) == pytest.approx(math.log(total) if mask[i].any() else 0, rel=1e-12)


@pytest.mark.parametrize("add_one", [False, True])
def test_masked_logsumexp_neither_overflows_nor_poisons_gradients(add_one: bool) -> None:
    x = jnp.array([[1e4, 9e3, jnp.inf], [-1e4, -2e4, jnp.nan], [5.0, jnp.inf, 2.0]])
    mask = jnp.array([[True, True, False], [True, True, False], [False, False, False]])

    def total(x: jax.Array) -> jax.Array:
        return numerics.masked_logsumexp(x, mask, add_one=add_one).sum()

    value = numerics.masked_logsumexp(x, mask, add_one=add_one)
    np.testing.assert_allclose(value, [1e4, 0 if add_one else -1e4, 0])
    gradient = jax.grad(total)(x)
    np.testing.assert_allclose(gradient, [[1, 0, 0], [0 if add_one else 1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bound", [-20.0, 0.5, 60.0])
def test_masked_logsumexp_with_a_bound_equals_the_loop(bound: float, dtype: str) -> None:
    """Value and gradient up to the largest bound, and small values keep their digits."""
    random = np.random.default_rng(0)
    x, mask = bound - random.exponential(9, (6, 9)), random.random((6, 9)) < 0.4
    x[0, 0], mask[0, 0], mask[2] = bound, True, False
    x[3, mask[3].argmin()] = np.inf  # not in the mask
    tolerance = {"float32": 5e-6, "float64": 1e-12}[dtype]  # float32 rounds an exponent of 60
    with jax.enable_x64(dtype == "float64"):

        def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = numerics.masked_logsumexp(x, mask, add_one=True, bound=bound)
            return jnp.arange(1, 7) @ value, value

        gradient, value = jax.grad(total, has_aux=True)(jnp.asarray(x, dtype))
    assert value.dtype == dtype
    for i in range(6):
        kept = sum(math.exp(x[i, j]) for j in range(9) if mask[i, j])
        np.testing.assert_allclose(value[i], math.log1p(kept), rtol=tolerance)
        for j in range(9):
            weight = math.exp(x[i, j]) / (1 + kept) if mask[i, j] else 0
            np.testing.assert_allclose(gradient[i, j], (i + 1) * weight, rtol=tolerance)


def test_masked_logsumexp_with_a_bound_hides_no_nan() -> None:
    x, mask = jnp.array([[0.1, jnp.nan], [jnp.nan, 0.2]]), jnp.array([[True, True], [False, True]])
    value = numerics.masked_logsumexp(x, mask, add_one=True, bound=1)
    assert np.isnan(value).tolist() == [True, False]


@pytest.mark.parametrize("bound", [60.1, 1e4, math.inf])
def test_masked_logsumexp_does_not_overflow_with_a_large_bound(bound: float) -> None:
    x = jnp.array([[1e4, -3.0], [-1e4, -2e4]])
    value = numerics.masked_logsumexp(x, x > -2e4, add_one=True, bound=bound)
    np.testing.assert_allclose(value, [1e4, 0])


def test_masked_mean_is_zero_of_nothing_and_hides_no_nan() -> None:
    value, none = jnp.array([1.0, jnp.nan, 4.0]), jnp.zeros(3, bool)
    assert float(numerics.masked_mean(Values(value, none))) == 0
    assert float(numerics.masked_mean(Values(value, jnp.array([True, False, True])))) == 2.5
    assert math.isnan(float(numerics.masked_mean(Values(value, jnp.array([True, True, True])))))
    terms = Values(jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[True, False], [True, True]]))
    np.testing.assert_allclose(numerics.masked_mean(terms), [1, 4])

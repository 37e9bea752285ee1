"""Combinations: stationary points, targets met, control, surgery."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.losses import combination

LOSSES = np.array([0.7, 5.0, 0.2], np.float32)
NORMS = np.array([[0.5, 20.0, 0.0], [0.0, 4.0, 0.03]], np.float32)  # pair, proxy, separation


def descend(
    combine: Any, *, losses: Any = LOSSES, norms: Any = NORMS, rate: float = 0.1, steps: int = 2000
) -> np.ndarray:
    """Weights after plain descent on constant losses and norms."""
    params, state = combine.init(3)

    @jax.jit
    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        weights, gradient, state = combine.apply(params, state, losses, norms)
        return (jax.tree.map(lambda p, g: p - rate * g, params, gradient), state), weights

    _, weights = jax.lax.scan(step, (params, state), length=steps)
    return np.asarray(weights[-1])


def test_fixed_stays() -> None:
    np.testing.assert_allclose(descend(combination.fixed((1.0, 0.5, 0.1))), [1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="2 weights for 3 objectives"):
        combination.fixed((1.0, 2.0)).init(3)


def test_uncertainty_comes_to_rest_at_one_over_the_loss() -> None:
    weights = descend(combination.uncertainty((1.0, 1.0, 1.0), cap=100.0))
    np.testing.assert_allclose(weights, 1 / LOSSES, rtol=1e-3)


def test_uncertainty_is_capped_and_comes_back() -> None:
    combine = combination.uncertainty((1.0, 1.0, 1.0), cap=10.0)
    vanished = np.array([1e-6, 5.0, 0.2], np.float32)
    np.testing.assert_allclose(descend(combine, losses=vanished)[0], 10.0, rtol=1e-5)
    params = jnp.full((3,), -jnp.log(10.0))
    _, gradient, _ = combine.apply(params, (), jnp.asarray([0.0, 5.0, 0.05]), NORMS)
    assert gradient[0] == 0  # held at the cap
    assert gradient[1] < 0  # a large loss pulls its weight down again, by raising s
    assert gradient[2] == 0


def test_uncertainty_gradient_is_that_of_its_objective() -> None:
    """Central differences of the published objective."""
    combine = combination.uncertainty((0.5, 0.1, 2.0), cap=1e6)
    s, _ = combine.init(3)
    _, gradient, _ = combine.apply(s, (), LOSSES, NORMS)
    for k in range(3):
        ends = []
        for sign in (1, -1):
            moved = np.asarray(s, np.float64)
            moved[k] += sign * 1e-5
            ends.append(sum(np.exp(-v) * loss + v for v, loss in zip(moved, LOSSES, strict=True)))
        assert float(gradient[k]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


def test_share_meets_both_targets() -> None:
    targets = ((0.8, 0.2, 0.0), (0.0, 0.9, 0.1))
    weights = descend(combination.share((1.0, 1.0, 1.0), targets=targets), rate=0.2, steps=4000)
    shares = combination.contribution_shares(weights, NORMS)
    np.testing.assert_allclose(shares, targets, atol=1e-4)
    assert weights.sum() == pytest.approx(3, rel=1e-5)


def test_share_says_nothing_where_no_gradient_reaches() -> None:
    targets = ((0.8, 0.2, 0.0), (0.0, 0.9, 0.1))
    combine = combination.share((1.0, 1.0, 1.0), targets=targets)
    params, state = combine.init(3)
    _, gradient, _ = combine.apply(params, state, LOSSES, np.zeros_like(NORMS))
    np.testing.assert_array_equal(gradient, 0)


def test_shares_sum_to_one_or_are_zero() -> None:
    shares = combination.contribution_shares(jnp.asarray([1.0, 2.0, 3.0]), NORMS)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    expected = [0.5 / 40.5, 40 / 40.5, 0]
    np.testing.assert_allclose(shares[0], expected, rtol=1e-6)
    none = combination.contribution_shares(jnp.ones(3), np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(none, 0)


def test_gradnorm_levels_the_norms_of_equally_fast_objectives() -> None:
    """With constant losses all rates are 1, so within a group the weighted norms become equal."""
    norms = np.array([[0.5, 2.0, 0.0], [0.0, 2.0, 1.0]], np.float32)
    combine = combination.gradnorm((1.0, 1.0, 1.0), alpha=1.5)
    weights = descend(combine, norms=norms, rate=0.005, steps=4000)
    np.testing.assert_allclose(weights * [0.5, 2.0, 1.0], np.full(3, 6 / 7), rtol=0.05)


def test_gradnorm_raises_what_trains_slowly() -> None:
    combine = combination.gradnorm((1.0, 1.0, 1.0), alpha=1.0)
    params, state = combine.init(3)
    norms = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], np.float32)
    _, _, state = combine.apply(params, state, LOSSES, norms)
    np.testing.assert_allclose(state, LOSSES)  # the first losses are remembered
    later = LOSSES * np.array([1.0, 0.5, 0.5], np.float32)  # the pair objective has not moved
    _, gradient, again = combine.apply(params, state, later, norms)
    np.testing.assert_allclose(again, LOSSES)
    assert gradient[0] < 0 < gradient[1]


def test_random_changes_every_step_and_is_seeded() -> None:
    draws = []
    for _ in range(2):
        combine = combination.random(seed=4)
        params, state = combine.init(3)
        first, params, state = combine.apply(params, state, LOSSES, NORMS)
        second, _, _ = combine.apply(params, state, LOSSES, NORMS)
        assert not np.allclose(first, second)
        assert float(first.sum()) == pytest.approx(3, rel=1e-5)
        draws.append((first, second))
    np.testing.assert_array_equal(draws[0], draws[1])


def loop_pcgrad(gradients: np.ndarray) -> np.ndarray:
    """The algorithm on the gradients themselves."""
    total = np.zeros(gradients.shape[1])
    for i, gradient in enumerate(gradients):
        projected = gradient.copy()
        for j, other in enumerate(gradients):
            inner = projected @ other
            if i != j and inner < 0:
                projected -= inner / (other @ other) * other
        total += projected
    return total


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_equals_projecting_the_gradients(seed: int) -> None:
    with jax.enable_x64(True):
        gradients = np.random.default_rng(seed).normal(size=(4, 3))  # few dimensions: conflicts
        assert (gradients @ gradients.T).min() < 0
        factors = combination.pcgrad_coefficients(jnp.asarray(gradients @ gradients.T))
        np.testing.assert_allclose(factors @ gradients, loop_pcgrad(gradients), rtol=1e-10)


def test_pcgrad_leaves_agreeing_and_absent_gradients_alone() -> None:
    gradients = np.array([[1.0, 0.1], [0.5, 0.5], [0.0, 0.0]])
    factors = combination.pcgrad_coefficients(jnp.asarray(gradients @ gradients.T))
    np.testing.assert_allclose(factors, 1)

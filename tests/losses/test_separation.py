"""Cases of the separation losses that random blocks do not reach."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.losses import separation
from mmljax.numerics import masked_mean
from mmljax.types import PairMasks
from objective_blocks import quick_jit


def proxies_and_masks(classes, centers, d):
    """Unit proxies, contiguous by class, the similarities of all of them, and their masks."""
    p = np.random.default_rng(classes).normal(size=(classes * centers, d))
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    owner = np.arange(classes * centers) // centers
    same = owner[:, None] == owner
    masks = PairMasks(jnp.asarray(same & ~np.eye(len(p), dtype=bool)), jnp.asarray(~same))
    return p, jnp.asarray(p @ p.T, jnp.float32), masks


def test_the_mean_of_soft_orthogonality_is_the_squared_frobenius_norm_over_c():
    p, similarity, masks = proxies_and_masks(7, 1, 4)
    expected = np.linalg.norm(p @ p.T - np.eye(7), "fro") ** 2 / 7
    got = masked_mean(separation.soft_orthogonality_loss(similarity, masks))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_mean_of_the_regularizer_is_softtriples():
    classes, centers = 4, 3
    p, similarity, masks = proxies_and_masks(classes, centers, 5)
    total = 0.0
    for c in range(classes):
        for k, t in itertools.combinations(range(centers), 2):
            total += math.sqrt(2 - 2 * (p[c * centers + k] @ p[c * centers + t]))
    expected = total / (classes * centers * (centers - 1))
    got = masked_mean(separation.soft_triple_regularizer(similarity, masks))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_sharpness_leads_from_all_proxies_to_the_nearest():
    _, similarity, masks = proxies_and_masks(9, 1, 3)

    def gradient(gamma):
        def total(s):
            loss = separation.nearest_proxy_separation_loss(s, masks, gamma=gamma, margin=-2.0)
            return loss.value.sum()

        return np.asarray(jax.grad(total)(similarity))

    nearest = np.where(masks.negative, similarity, -np.inf).argmax(axis=1)
    np.testing.assert_allclose(gradient(20_000.0), np.eye(9)[nearest], atol=1e-3)
    soft = gradient(1e-4)[np.asarray(masks.negative)]
    np.testing.assert_allclose(soft, 1 / 9, rtol=1e-3)  # of the eight others and the one


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_energy_of_coincident_proxies_is_high_and_finite(power):
    masks = PairMasks(jnp.zeros((1, 1), bool), jnp.ones((1, 1), bool))

    def energy(cosine):
        loss = separation.hyperspherical_energy_loss
        return loss(jnp.full((1, 1), cosine), masks, power=power).value[0]

    value_and_grad = quick_jit(jax.value_and_grad(energy))
    for cosine in (1.0, 1.0 + 1e-6, 1.0 - 1e-6, 1.0 - 1e-4):
        value, gradient = value_and_grad(cosine)
        assert np.isfinite(value)
        assert np.isfinite(gradient)
        assert value > energy(0.9)

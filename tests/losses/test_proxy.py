"""Cases of the proxy losses that random blocks do not reach."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import arcface, normalized_softmax

from mmljax.errors import UserError
from mmljax.losses import proxy
from mmljax.types import PairMasks
from objective_blocks import check_against_loop, quick_jit, random_block


def test_several_own_proxies_are_summed():
    hyper = {"temperature": 0.3}
    check_against_loop(
        partial(proxy.normalized_softmax_loss, **hyper), partial(normalized_softmax, **hyper)
    )


def test_proxy_anchor_divides_each_term_by_its_own_count():
    similarity, masks = random_block(8, 12, seed=2)
    values = proxy.proxy_anchor_loss(
        jnp.asarray(similarity), PairMasks(*map(jnp.asarray, masks)), alpha=32.0, margin=0.1
    )
    assert values.value.shape == values.valid.shape == (2, 8)
    np.testing.assert_array_equal(values.valid[0], masks.positive.any(axis=1))
    assert 0 < values.valid[0].sum() < 8
    assert values.valid[1].all()


def test_small_losses_keep_their_digits():
    similarity = jnp.array([[1.0, -1.0]])
    masks = PairMasks(jnp.array([[True, False]]), jnp.array([[False, True]]))
    value = proxy.normalized_softmax_loss(similarity, masks, temperature=0.05).value[0]
    np.testing.assert_allclose(value, math.exp(-40), rtol=1e-5)


def test_arcface_is_finite_where_the_arccosine_is_not():
    masks = PairMasks(jnp.array([[True, False]]), jnp.array([[False, True]]))
    value_and_grad = quick_jit(
        jax.value_and_grad(lambda s: proxy.arcface_loss(s, masks, scale=16.0, margin=0.5).value[0])
    )
    for cosine in (1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6):
        value, gradient = value_and_grad(jnp.array([[cosine, 0.2]]))
        clipped = max(-1, min(1, cosine))
        expected = arcface([clipped, 0.2], [0], [1], None, scale=16.0, margin=0.5)
        np.testing.assert_allclose(value, expected, rtol=5e-3, atol=1e-5)
        assert np.isfinite(gradient).all()
        assert gradient[0, 0] < 0 < gradient[0, 1]


def test_arcface_falls_with_the_angle_all_the_way():
    angles = np.linspace(0.01, math.pi - 0.01, 200)
    similarity = jnp.stack([jnp.cos(angles), jnp.full(200, 0.3)], axis=1)
    masks = PairMasks(jnp.array([[True, False]] * 200), jnp.array([[False, True]] * 200))
    value = proxy.arcface_loss(similarity, masks, scale=4.0, margin=0.7).value
    assert (np.diff(value) > 0).all()


@pytest.mark.parametrize("centers", [0, 4])
def test_columns_that_are_no_whole_groups_raise_a_user_error(centers):
    masks = PairMasks(jnp.zeros((2, 6), bool), jnp.zeros((2, 6), bool))
    with pytest.raises(UserError, match=f"centers={centers}: the 6 proxies"):
        proxy.subcenter_arcface_loss(
            jnp.zeros((2, 6)), masks, scale=8.0, margin=0.5, centers=centers
        )

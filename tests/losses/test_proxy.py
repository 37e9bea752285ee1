"""Objectives between proxies and samples against slow loops from the papers' equations."""

from __future__ import annotations

import doctest
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.losses import proxy
from mmljax.types import PairMasks
from objective_blocks import check_against_loop, quick_jit, random_block


def proxy_anchor(s, positives, negatives, _, alpha, margin):
    attraction = sum(math.exp(-alpha * (s[j] - margin)) for j in positives)
    repulsion = sum(math.exp(alpha * (s[j] + margin)) for j in negatives)
    return math.log(1 + attraction) if positives else None, math.log(1 + repulsion)


def cross_entropy(own, others):
    """``own``, ``others``: logits of the own class's columns and of the other classes'."""
    if not own:
        return None
    numerator = sum(math.exp(z) for z in own)
    denominator = numerator + sum(math.exp(z) for z in others)
    return -math.log(numerator / denominator)


def proxy_nca_pp(s, positives, negatives, _, temperature):
    def logit(j):
        return -(math.sqrt(2 - 2 * s[j]) ** 2) / temperature

    return cross_entropy([logit(j) for j in positives], [logit(j) for j in negatives])


def normalized_softmax(s, positives, negatives, _, temperature):
    return cross_entropy(
        [s[j] / temperature for j in positives], [s[j] / temperature for j in negatives]
    )


def cosface(s, positives, negatives, _, scale, margin):
    return cross_entropy(
        [scale * (s[j] - margin) for j in positives], [scale * s[j] for j in negatives]
    )


def arcface_logit(s, scale, margin):
    angle = math.acos(s)
    if angle < math.pi - margin:
        return scale * math.cos(angle + margin)
    return scale * (s - margin * math.sin(margin))


def arcface(s, positives, negatives, _, scale, margin):
    return cross_entropy(
        [arcface_logit(s[j], scale, margin) for j in positives], [scale * s[j] for j in negatives]
    )


def by_class(columns, centers):
    groups = {}
    for j in columns:
        groups.setdefault(j // centers, []).append(j)
    return list(groups.values())


def subcenter_arcface(s, positives, negatives, _, scale, margin, centers):
    own, others = (
        [max(s[j] for j in group) for group in by_class(columns, centers)]
        for columns in (positives, negatives)
    )
    return cross_entropy(
        [arcface_logit(z, scale, margin) for z in own], [scale * z for z in others]
    )


def soft_triple(s, positives, negatives, _, scale, gamma, margin, centers):
    def relaxed(group):
        total = sum(math.exp(s[j] / gamma) for j in group)
        return sum(math.exp(s[j] / gamma) / total * s[j] for j in group)

    own = [scale * (relaxed(group) - margin) for group in by_class(positives, centers)]
    return cross_entropy(own, [scale * relaxed(group) for group in by_class(negatives, centers)])


CASES = [
    (proxy.proxy_anchor_loss, proxy_anchor, {"alpha": 32.0, "margin": 0.1}),
    (proxy.proxy_nca_pp_loss, proxy_nca_pp, {"temperature": 1 / 9}),
    (proxy.normalized_softmax_loss, normalized_softmax, {"temperature": 0.1}),
    (proxy.cosface_loss, cosface, {"scale": 16.0, "margin": 0.35}),
    (proxy.arcface_loss, arcface, {"scale": 16.0, "margin": 0.5}),
    (proxy.arcface_loss, arcface, {"scale": 4.0, "margin": 1.3}),  # most angles beyond pi - m
    (
        proxy.subcenter_arcface_loss,
        subcenter_arcface,
        {"scale": 8.0, "margin": 0.5, "centers": 3},
    ),
    (
        proxy.soft_triple_loss,
        soft_triple,
        {"scale": 20.0, "gamma": 0.1, "margin": 0.01, "centers": 2},
    ),
]


@pytest.mark.parametrize(("loss", "loop", "hyper"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_value_validity_and_gradient(loss, loop, hyper):
    centers = hyper.get("centers", 0 if loop is proxy_anchor else 1)
    check_against_loop(partial(loss, **hyper), partial(loop, **hyper), centers=centers)


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
def test_columns_that_are_no_whole_groups_are_the_users_mistake(centers):
    masks = PairMasks(jnp.zeros((2, 6), bool), jnp.zeros((2, 6), bool))
    with pytest.raises(UserError, match=f"centers={centers}: the 6 proxies"):
        proxy.subcenter_arcface_loss(
            jnp.zeros((2, 6)), masks, scale=8.0, margin=0.5, centers=centers
        )


def test_doctests():
    assert doctest.testmod(proxy).failed == 0

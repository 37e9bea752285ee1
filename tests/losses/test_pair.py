"""Sample-to-sample objectives against slow loops written from the papers' equations."""

from __future__ import annotations

import doctest
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.losses import pair, ranking
from mmljax.types import PairMasks
from objective_blocks import SIZES, check_against_loop, quick_jit, random_block


def hinge(z):
    return z if z > 0 else 0.0


def distance(s):
    return math.sqrt(2 - 2 * s)


def multi_similarity(s, positives, negatives, _, alpha, beta, base):
    attraction = repulsion = 0.0
    for j in positives:
        attraction += math.exp(-alpha * (s[j] - base))
    for j in negatives:
        repulsion += math.exp(beta * (s[j] - base))
    return math.log(1 + attraction) / alpha + math.log(1 + repulsion) / beta


def contrastive(s, positives, negatives, _, positive_margin, negative_margin):
    total = 0.0
    for j in positives:
        total += hinge(positive_margin - s[j])
    for j in negatives:
        total += hinge(s[j] - negative_margin)
    return total


def triplet_hard(s, positives, negatives, _, margin):
    if not positives or not negatives:
        return None
    worst = -math.inf  # over all triplets, of the margin's violation in squared distance
    for p in positives:
        for n in negatives:
            worst = max(worst, 2 * margin + distance(s[p]) ** 2 - distance(s[n]) ** 2)
    return hinge(worst) / 2


def triplet_semihard(s, positives, negatives, _, margin):
    found = []
    for p in positives:
        farther = [distance(s[n]) for n in negatives if distance(s[n]) > distance(s[p])]
        if farther:
            violation = distance(s[p]) ** 2 - min(farther) ** 2 + 2 * margin
            found.append(hinge(violation) / 2)
    return sum(found) / len(found) if found else None


def triplet_all(s, positives, negatives, _, margin):
    found = []
    for p in positives:
        for n in negatives:
            violation = margin + s[n] - s[p]
            if violation > 0:
                found.append(violation)
    return sum(found) / len(found) if found else None


def margin_based(s, positives, negatives, _, margin, beta):
    found = []
    for sign, columns in ((1, positives), (-1, negatives)):
        for j in columns:
            violation = margin + sign * (distance(s[j]) - beta)
            if violation > 0:
                found.append(violation)
    return sum(found) / len(found) if found else None


def circle(s, positives, negatives, at, margin, gamma):
    if not positives or not negatives:
        return None
    total = 0.0
    for p in positives:
        for n in negatives:
            weight_p, weight_n = hinge(1 + margin - at[p]), hinge(at[n] + margin)
            exponent = weight_n * (s[n] - margin) - weight_p * (s[p] - (1 - margin))
            total += math.exp(gamma * exponent)
    return math.log(1 + total)


def supcon(s, positives, negatives, _, temperature):
    if not positives:
        return None
    total = 0.0
    for p in positives:
        everything = 0.0
        for j in positives + negatives:
            everything += math.exp(s[j] / temperature)
        total -= math.log(math.exp(s[p] / temperature) / everything)
    return total / len(positives)


def nt_xent(s, positives, negatives, _, temperature):
    if not positives:
        return None
    total = 0.0
    for p in positives:
        everything = math.exp(s[p] / temperature)
        for n in negatives:
            everything += math.exp(s[n] / temperature)
        total -= math.log(math.exp(s[p] / temperature) / everything)
    return total / len(positives)


def smooth_ap(s, positives, negatives, _, temperature):
    if not positives:
        return None

    def rank(i, columns):
        found = 1.0
        for j in columns:
            if j != i:
                found += 1 / (1 + math.exp(-(s[j] - s[i]) / temperature))
        return found

    precision = 0.0
    for i in positives:
        precision += rank(i, positives) / rank(i, positives + negatives)
    return 1 - precision / len(positives)


CASES = [
    (pair.multi_similarity_loss, multi_similarity, {"alpha": 2.0, "beta": 40.0, "base": 0.5}),
    (pair.multi_similarity_loss, multi_similarity, {"alpha": 18.0, "beta": 5.0, "base": -0.2}),
    (pair.contrastive_loss, contrastive, {"positive_margin": 0.9, "negative_margin": 0.1}),
    (pair.triplet_hard_loss, triplet_hard, {"margin": 0.2}),
    (pair.triplet_semihard_loss, triplet_semihard, {"margin": 0.5}),
    (pair.triplet_all_loss, triplet_all, {"margin": 0.3}),
    (pair.margin_loss, margin_based, {"margin": 0.2, "beta": 1.2}),
    (pair.circle_loss, circle, {"margin": 0.4, "gamma": 8.0}),
    (pair.supcon_loss, supcon, {"temperature": 0.1}),
    (pair.nt_xent_loss, nt_xent, {"temperature": 0.2}),
    (ranking.smooth_ap_loss, smooth_ap, {"temperature": 0.1}),
]


@pytest.mark.parametrize(("loss", "loop", "hyper"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_value_validity_and_gradient(loss, loop, hyper):
    check_against_loop(partial(loss, **hyper), partial(loop, **hyper))


def test_the_random_blocks_reach_both_sides_of_every_validity():
    for n, m in SIZES:
        _, masks = random_block(n, m, seed=n)
        some_positive, some_negative = (mask.any(axis=1) for mask in masks)
        assert {*zip(some_positive.tolist(), some_negative.tolist(), strict=True)} == {
            (a, b) for a in (False, True) for b in (False, True)
        }
        assert (~masks.positive & ~masks.negative).any()


def test_semihard_leaves_out_a_positive_without_a_farther_negative():
    similarity = jnp.array([[0.9, 0.2, 0.5, 0.4]])
    masks = PairMasks(
        jnp.array([[True, True, False, False]]), jnp.array([[False, False, True, True]])
    )
    value, valid = pair.triplet_semihard_loss(similarity, masks, margin=0.5)
    np.testing.assert_allclose(value, [0.5 + 0.5 - 0.9], rtol=1e-6)
    assert bool(valid[0])
    alone = PairMasks(jnp.array([[False, True, False, False]]), masks.negative)
    assert not pair.triplet_semihard_loss(similarity, alone, margin=0.5).valid.any()


def test_triplet_ties_are_neither_semihard_nor_lost():
    similarity = jnp.array([[0.5, 0.5, 0.5]])
    masks = PairMasks(jnp.array([[True, False, False]]), jnp.array([[False, True, True]]))
    assert not pair.triplet_semihard_loss(similarity, masks, margin=0.25).valid.any()
    for loss in (pair.triplet_hard_loss, pair.triplet_all_loss):
        assert float(loss(similarity, masks, margin=0.25).value[0]) == 0.25


def test_all_triplets_keep_their_digits_among_many_negatives():
    rng = np.random.default_rng(0)
    similarity = rng.uniform(-1, 1, size=(2, 20_001))
    similarity[:, 0] = [0.95, 1.05 + 1e-3 - 0.05]
    positive = np.arange(20_001) == 0
    masks = PairMasks(jnp.array([positive] * 2), jnp.array([~positive] * 2))
    got = pair.triplet_all_loss(jnp.asarray(similarity, jnp.float32), masks, margin=0.01)
    violation = 0.01 + similarity[:, 1:] - similarity[:, :1]
    expected = [row[row > 0].mean() if (row > 0).any() else 0.0 for row in violation]
    np.testing.assert_allclose(got.value, expected, rtol=1e-4)


def test_smooth_ap_is_the_average_precision_when_the_sigmoids_are_steps():
    similarity = jnp.array([[0.9, 0.8, 0.7, 0.6, 0.5]])  # ranks: + - + - +
    positive = jnp.array([[True, False, True, False, True]])
    value, _ = ranking.smooth_ap_loss(similarity, PairMasks(positive, ~positive), temperature=1e-4)
    np.testing.assert_allclose(value, [1 - (1 / 1 + 2 / 3 + 3 / 5) / 3], rtol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        partial(pair.multi_similarity_loss, alpha=500.0, beta=500.0, base=0.0),
        partial(pair.circle_loss, margin=0.4, gamma=1000.0),
        partial(pair.supcon_loss, temperature=1e-3),
        partial(pair.nt_xent_loss, temperature=1e-3),
        partial(ranking.smooth_ap_loss, temperature=1e-4),
    ],
    ids=lambda loss: loss.func.__name__,
)
def test_sharp_exponents_do_not_overflow(loss):
    similarity, masks = random_block(8, 12, seed=3)
    total = quick_jit(jax.value_and_grad(lambda s, masks: loss(s, masks).value.sum()))
    value, gradient = total(similarity.astype(np.float32), masks)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("module", [pair, ranking], ids=lambda m: m.__name__)
def test_doctests(module):
    assert doctest.testmod(module).failed == 0

"""Cases of the pair losses that random blocks do not reach."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.losses import pair, proxy, ranking, separation
from mmljax.types import PairMasks
from objective_blocks import quick_jit, random_block


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


def test_recall_at_k_is_the_recall_when_the_sigmoids_are_steps():
    """Of what can be found within k: a query with three positives finds at most one at k = 1."""
    similarity = jnp.array([[0.9, 0.8, 0.7, 0.6, 0.5], [0.5, 0.6, 0.7, 0.8, 0.9]])
    positive = jnp.array([[True, False, True, False, True], [False, True, False, False, False]])
    value, valid = ranking.recall_at_k_loss(
        similarity,
        PairMasks(positive, ~positive),
        ks=(1, 2, 3, 4),
        temperature=1e-4,
        rank_temperature=1e-2,
    )
    # Ranks are 1, 3, 5 and 4; a rank of exactly k counts half.
    at = [[0.5, 1 / 2, 1.5 / 3, 2 / 3], [0, 0, 0, 0.5]]
    np.testing.assert_allclose(value, 1 - np.mean(at, axis=1), rtol=1e-6)
    assert valid.all()


@pytest.mark.parametrize("ks", [(), (0, 1), (2.0,)])
def test_ks_that_are_no_ranks_are_refused(ks):
    masks = PairMasks(*jnp.zeros((2, 2, 3), bool))
    with pytest.raises(UserError, match="must be one or more positive integers"):
        ranking.recall_at_k_loss(jnp.zeros((2, 3)), masks, ks=ks)


@pytest.mark.parametrize(
    "loss",
    [
        partial(pair.multi_similarity_loss, alpha=500.0, beta=500.0, base=0.0),
        partial(pair.multi_similarity_loss, alpha=500.0, beta=30.0, base=0.9),
        partial(pair.multi_similarity_loss, alpha=30.0, beta=500.0, base=-0.9),
        partial(proxy.proxy_anchor_loss, alpha=500.0, margin=0.9),
        partial(separation.nearest_proxy_separation_loss, gamma=500.0, margin=-0.9),
        partial(pair.circle_loss, margin=0.4, gamma=1000.0),
        partial(pair.supcon_loss, temperature=1e-3),
        partial(pair.nt_xent_loss, temperature=1e-3),
        partial(ranking.smooth_ap_loss, temperature=1e-4),
        partial(ranking.recall_at_k_loss, temperature=1e-4, rank_temperature=1e-3),
    ],
    ids=lambda loss: loss.func.__name__,
)
def test_sharp_exponents_do_not_overflow(loss):
    similarity, masks = random_block(8, 12, seed=3)
    for mask in masks:  # the ends of the range, in both masks
        similarity[np.nonzero(mask)[0][:2], np.nonzero(mask)[1][:2]] = -1, 1
    total = quick_jit(jax.value_and_grad(lambda s, masks: loss(s, masks).value.sum()))
    value, gradient = total(similarity.astype(np.float32), masks)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()

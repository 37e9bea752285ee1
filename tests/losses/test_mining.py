"""Every rule against loops over hand-listed pairs; masks only shrink; compiled once."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmljax.losses import mining
from mmljax.types import PairMasks, Points, Views

RULES = {
    "sample": mining.sample_miner,
    "proxy": mining.proxy_miner,
    "either": mining.either_miner,
    "both": mining.both_miner,
    "blend": mining.blend_miner,
    "hard": mining.hard_miner,
    "semi_hard": mining.semi_hard_miner,
    "distance_weighted": partial(mining.distance_weighted_miner, dimension=8),
}


def example(
    seed: int, *, anchors: int = 7, references: int = 11, classes: int = 3
) -> tuple[Views, PairMasks]:
    """Two unrelated views on asymmetric data; anchors are the first references."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, references)
    own = np.arange(anchors)[:, None] == np.arange(references)[None]
    same = labels[:anchors, None] == labels[None]
    views = Views(
        sample=random.uniform(-1, 1, (anchors, references)),
        proxy=random.uniform(-1, 1, (anchors, references)),
        anchor=random.uniform(-1, 1, anchors),
        keys=jax.random.split(jax.random.key(seed), anchors),
    )
    return views, PairMasks(same & ~own, ~same)


def loop_select(
    z: Any, masks: PairMasks, margin: float, anchor: Any = None
) -> tuple[set[Any], set[Any]]:
    """Multi-Similarity mining, pair by pair."""
    positive, negative = set(), set()
    for i in range(z.shape[0]):
        own = [j for j in range(z.shape[1]) if masks.positive[i, j]]
        other = [j for j in range(z.shape[1]) if masks.negative[i, j]]
        least = min(
            [z[i, j] for j in own] + ([anchor[i]] if anchor is not None else []) or [math.inf]
        )
        most = max([z[i, j] for j in other] or [-math.inf])
        positive |= {(i, j) for j in own if z[i, j] - margin < most}
        negative |= {(i, j) for j in other if z[i, j] + margin > least}
    return positive, negative


def loop(rule: str, views: Views, masks: PairMasks, margin: float, blend: float) -> Any:
    s, t, a = views.sample, views.proxy, views.anchor
    sample, proxy = loop_select(s, masks, margin), loop_select(t, masks, margin, a)
    if rule == "either":
        return tuple(x | y for x, y in zip(sample, proxy, strict=True))
    if rule == "both":
        return tuple(x & y for x, y in zip(sample, proxy, strict=True))
    if rule == "blend":
        mixed = blend * s + (1 - blend) * t
        return loop_select(mixed, masks, margin, [blend + (1 - blend) * v for v in a])
    return {"sample": sample, "proxy": proxy}[rule]


def pairs(mask: Any) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(np.asarray(mask)), strict=True)}


@pytest.mark.parametrize("rule", ["sample", "proxy", "either", "both", "blend"])
@pytest.mark.parametrize("seed", range(4))
def test_rule_equals_the_loop(rule: str, seed: int) -> None:
    with jax.enable_x64(True):
        views, masks = example(seed, classes=2 + seed)
        margin, blend = (0.1, 0.3, 0.02, 0.05)[seed], 0.3
        options = {"blend": blend} if rule == "blend" else {}
        got = RULES[rule](views, masks, margin=margin, **options)
        positive, negative = loop(rule, views, masks, margin, blend)
        assert pairs(got.positive) == positive
        assert pairs(got.negative) == negative
        assert positive | negative  # the example is not empty
        assert (positive, negative) != (pairs(masks.positive), pairs(masks.negative))


def test_hard_miner_equals_the_loop() -> None:
    views, masks = example(5)
    got = RULES["hard"](views, masks)
    for i in range(7):
        own = [j for j in range(11) if masks.positive[i, j]]
        other = [j for j in range(11) if masks.negative[i, j]]
        hardest = {(i, min(own, key=lambda j: views.sample[i, j]))} if own else set()
        nearest = {(i, max(other, key=lambda j: views.sample[i, j]))} if other else set()
        assert {p for p in pairs(got.positive) if p[0] == i} == hardest
        assert {p for p in pairs(got.negative) if p[0] == i} == nearest


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_semi_hard_miner_equals_the_loop(margin: float) -> None:
    views, masks = example(6, references=17)
    got = RULES["semi_hard"](views, masks, margin=margin)
    positive, negative = set(), set()
    for i in range(7):
        for p in range(17):
            for n in range(17):
                gap = views.sample[i, p] - views.sample[i, n]
                if masks.positive[i, p] and masks.negative[i, n] and 0 < gap < margin:
                    positive.add((i, p))
                    negative.add((i, n))
    assert positive
    assert pairs(got.positive) == positive
    assert pairs(got.negative) == negative


def test_distance_weighted_miner_draws_as_the_density_says() -> None:
    """Frequencies over many keys against weights computed negative by negative."""
    dimension, draws = 8, 4000
    s = np.array([[0.9, 0.95, 0.6, 0.2, -0.3, -0.7]])
    masks = PairMasks(s == 0.9, s != 0.9)  # one positive: one negative is drawn
    weights = []
    for value in s[0, 1:]:
        d = max(math.sqrt(2 - 2 * value), 0.5)
        weights.append(1 / (d ** (dimension - 2) * (1 - d * d / 4) ** ((dimension - 3) / 2)))
    expected = np.array(weights) / sum(weights)

    def draw(key: Any) -> Any:
        views = Views(jnp.asarray(s), jnp.asarray(s), jnp.zeros(1), key[None])
        return RULES["distance_weighted"](views, masks).negative[0]

    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws)))
    assert (drawn.sum(1) == 1).all()
    sigma = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(drawn.mean(0)[1:] - expected) < 4.5 * sigma + 1e-9).all()


def test_distance_weighted_miner_balances_and_needs_a_positive() -> None:
    views, masks = example(8, references=40)
    lone = masks._replace(positive=masks.positive & (np.arange(7) != 2)[:, None])
    got = RULES["distance_weighted"](views, lone)
    wanted = np.minimum(lone.positive.sum(1), lone.negative.sum(1))
    np.testing.assert_array_equal(np.asarray(got.negative).sum(1), wanted)
    assert np.asarray(got.negative)[2].sum() == 0


@pytest.mark.parametrize("rule", RULES)
def test_masks_only_shrink_and_carry_no_gradient(rule: str) -> None:
    views, masks = example(9)

    def kept(sample: Any) -> Any:
        mined = RULES[rule](views._replace(sample=sample), masks)
        return jnp.sum(jnp.where(mined.negative, 1.0, 0.0)), mined

    (_, got), gradient = jax.value_and_grad(kept, has_aux=True)(jnp.asarray(views.sample))
    assert pairs(got.positive) <= pairs(masks.positive)
    assert pairs(got.negative) <= pairs(masks.negative)
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("rule", RULES)
def test_compiled_once_whatever_is_hard(rule: str) -> None:
    """None, few and all of the negatives kept run the same program."""
    traces = []

    @jax.jit
    def mine(views: Views, masks: PairMasks) -> PairMasks:
        traces.append(1)
        return RULES[rule](views, masks)

    views, masks = example(10, classes=2)
    masks = PairMasks(*(jnp.asarray(m) for m in masks))
    fractions = []
    for negative in (-1.0, 0.0, 1.0):
        easy = jnp.where(masks.negative, negative, 0.1 * jnp.asarray(views.sample))
        mined = mine(Views(easy, easy, jnp.zeros(7), views.keys), masks)
        fractions.append(float(mined.negative.sum() / masks.negative.sum()))
    assert len(traces) == 1
    if rule in ("sample", "proxy", "either", "both", "blend"):
        assert fractions[0] == 0
        assert fractions[2] == 1


def test_pair_masks_tell_self_by_position_not_by_value() -> None:
    labels = np.array([0, 0, 1, 1])
    vectors = np.ones((4, 2))  # exact duplicates
    columns = Points(vectors, labels, np.arange(4), np.array([True, True, True, False]))
    rows = Points(vectors[2:], labels[2:], np.array([2, 3]), np.array([True, True]))
    masks = mining.pair_masks(rows, columns, same_kind=True)
    assert pairs(masks.positive) == {(1, 2)}  # column 3 is padding; row 2 is itself in column 2
    assert pairs(masks.negative) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    other = mining.pair_masks(rows, columns, same_kind=False)
    assert pairs(other.positive) == {(0, 2), (1, 2)}


def test_proxy_masks_equal_the_loop() -> None:
    random = np.random.default_rng(3)
    anchors, references, proxies = 6, 9, 5
    labels = random.integers(0, 4, references)  # the last proxy has no anchor
    kept = PairMasks(*(random.random((2, anchors, references)) < 0.3))
    kept.positive[4], kept.negative[4] = False, False  # an anchor that keeps nothing
    own = np.arange(proxies)[:, None] == labels[None]
    got = mining.proxy_masks(kept, own[:, :anchors], PairMasks(own, ~own))
    positive, negative = set(), set()
    for c in range(proxies):
        for i in range(anchors):
            if labels[i] != c:
                continue
            if kept.positive[i].any() or kept.negative[i].any():
                positive.add((c, i))
            for j in range(references):
                if kept.positive[i, j] and labels[j] == c:
                    positive.add((c, j))
                if kept.negative[i, j] and labels[j] != c:
                    negative.add((c, j))
    assert pairs(got.positive) == positive
    assert pairs(got.negative) == negative
    assert negative
    assert not any(c == 4 for c, _ in positive | negative)

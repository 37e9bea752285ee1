"""One table: every objective (rows) has every property below.

``docs/proofs.md`` shows the same table; a property is one test function here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from mmljax.losses import pair, proxy, ranking, separation
from mmljax.numerics import l2_normalize, masked_mean, similarity_matrix
from mmljax.types import PairMasks, Values
from objective_blocks import quick_jit

SAMPLES = CLASSES = 16  # as many classes as samples, so that all labels can differ
DIMENSIONS = 6


class Objective(NamedTuple):
    """A row of the table."""

    loss: Callable[..., Values]
    relation: str
    centers: int = 1  # proxies per class
    detached: bool = False  # part of the formula is constant to the gradient by design


SAMPLE, ANCHOR, SOFTMAX, PROXY = (
    "sample_to_sample",
    "proxy_to_sample",
    "sample_to_proxy",
    "proxy_to_proxy",
)
OBJECTIVES = {
    "multi_similarity": Objective(
        partial(pair.multi_similarity_loss, alpha=2.0, beta=40.0, base=0.5), SAMPLE
    ),
    "contrastive": Objective(
        partial(pair.contrastive_loss, positive_margin=0.9, negative_margin=0.4), SAMPLE
    ),
    "triplet_hard": Objective(partial(pair.triplet_hard_loss, margin=0.2), SAMPLE),
    "triplet_semihard": Objective(partial(pair.triplet_semihard_loss, margin=0.2), SAMPLE),
    "triplet_all": Objective(partial(pair.triplet_all_loss, margin=0.2), SAMPLE),
    "margin": Objective(partial(pair.margin_loss, margin=0.2, beta=1.2), SAMPLE),
    "circle": Objective(partial(pair.circle_loss, margin=0.4, gamma=16.0), SAMPLE, detached=True),
    "supcon": Objective(partial(pair.supcon_loss, temperature=0.1), SAMPLE),
    "nt_xent": Objective(partial(pair.nt_xent_loss, temperature=0.1), SAMPLE),
    "smooth_ap": Objective(partial(ranking.smooth_ap_loss, temperature=0.1), SAMPLE),
    "recall_at_k": Objective(
        partial(ranking.recall_at_k_loss, temperature=0.1, rank_temperature=1.0), SAMPLE
    ),
    "proxy_anchor": Objective(partial(proxy.proxy_anchor_loss, alpha=32.0, margin=0.1), ANCHOR),
    "proxy_nca_pp": Objective(partial(proxy.proxy_nca_pp_loss, temperature=0.4), SOFTMAX),
    "normalized_softmax": Objective(
        partial(proxy.normalized_softmax_loss, temperature=0.2), SOFTMAX
    ),
    "cosface": Objective(partial(proxy.cosface_loss, scale=16.0, margin=0.35), SOFTMAX),
    "arcface": Objective(partial(proxy.arcface_loss, scale=16.0, margin=0.5), SOFTMAX),
    "subcenter_arcface": Objective(
        partial(proxy.subcenter_arcface_loss, scale=16.0, margin=0.5, centers=2), SOFTMAX, 2
    ),
    "soft_triple": Objective(
        partial(proxy.soft_triple_loss, scale=20.0, gamma=0.1, margin=0.01, centers=2), SOFTMAX, 2
    ),
    "nearest_proxy_separation": Objective(
        partial(separation.nearest_proxy_separation_loss, gamma=32.0, margin=0.1), PROXY
    ),
    "soft_orthogonality": Objective(separation.soft_orthogonality_loss, PROXY),
    "hyperspherical_energy": Objective(
        partial(separation.hyperspherical_energy_loss, power=1.0), PROXY
    ),
    "soft_triple_regularizer": Objective(separation.soft_triple_regularizer, PROXY, 2),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


class Problem(NamedTuple):
    """Samples, proxies (contiguous by class), labels, and how many of the classes are real."""

    samples: np.ndarray
    proxies: np.ndarray
    labels: np.ndarray
    real: int


def random_problem(name, *, seed=0):
    rng = np.random.default_rng(seed)
    return Problem(
        rng.normal(size=(SAMPLES, DIMENSIONS)).astype(np.float32),
        rng.normal(size=(CLASSES * OBJECTIVES[name].centers, DIMENSIONS)).astype(np.float32),
        rng.permutation(np.arange(SAMPLES) % 5),
        7,
    )


def masks_and_rows(name, problem):
    """The masks of the objective's relation, and which rows exist (the caller's duty)."""
    objective = OBJECTIVES[name]
    labels, owner = problem.labels, np.arange(len(problem.proxies)) // objective.centers
    rows, columns = {
        SAMPLE: (labels, labels),
        ANCHOR: (owner, labels),
        SOFTMAX: (labels, owner),
        PROXY: (owner, owner),
    }[objective.relation]
    same, exists = rows[:, None] == columns, np.ones(same_shape := (len(rows), len(columns)), bool)
    if objective.relation in (SAMPLE, PROXY):
        exists &= ~np.eye(*same_shape, dtype=bool)
    if objective.relation in (SOFTMAX, PROXY):
        exists &= owner < problem.real
    real_rows = owner < problem.real if objective.relation in (ANCHOR, PROXY) else rows >= 0
    exists &= real_rows[:, None]
    return PairMasks(same & exists, ~same & exists), real_rows


def similarity_block(name, samples, proxies):
    """From raw samples and proxies, rows and columns as the objective's relation has them."""
    first, _, second = OBJECTIVES[name].relation.partition("_to_")
    unit = {"sample": l2_normalize(samples), "proxy": l2_normalize(proxies)}
    return similarity_matrix(unit[first], unit[second])


def reduce(values, rows):
    """As a training step does it: the mean of each term over its valid rows that exist."""
    return jnp.sum(masked_mean(Values(values.value, values.valid & rows)))


@functools.cache
def on_similarity(name):
    """Compiled: values, loss, and the loss's gradient at the similarities."""

    def loss(similarity, masks, rows):
        values = OBJECTIVES[name].loss(similarity, masks)
        return reduce(values, rows), values

    def run(similarity, masks, rows):
        (total, values), gradient = jax.value_and_grad(loss, has_aux=True)(similarity, masks, rows)
        return values, total, gradient

    return quick_jit(run)


@functools.cache
def blocks(relation):
    """Compiled, one for all objectives of a relation: similarities, and their pull-back."""
    name = next(name for name, row in OBJECTIVES.items() if row.relation == relation)
    block = partial(similarity_block, name)

    def pull_back(samples, proxies, gradient):
        return jax.vjp(block, samples, proxies)[1](gradient)

    return quick_jit(block), quick_jit(pull_back)


def evaluate(name, problem):
    """Values, loss, and gradients at similarities, samples and proxies."""
    block, pull_back = blocks(OBJECTIVES[name].relation)
    similarity = block(problem.samples, problem.proxies)
    values, total, gradient = on_similarity(name)(similarity, *masks_and_rows(name, problem))
    return values, total, (gradient, *pull_back(problem.samples, problem.proxies, gradient))


def assert_finite(name, problem):
    values, total, gradients = evaluate(name, problem)
    assert np.isfinite(total)
    assert np.isfinite(np.where(values.valid, values.value, 0)).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    return total, gradients


@every_objective
def test_compiled_equals_eager(name):
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    similarity = similarity_block(name, problem.samples, problem.proxies)
    compiled, total, _ = on_similarity(name)(similarity, masks, rows)
    eager = OBJECTIVES[name].loss(similarity, jax.tree.map(jnp.asarray, masks))
    np.testing.assert_array_equal(compiled.valid, eager.valid)
    np.testing.assert_allclose(compiled.value, eager.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, reduce(eager, rows), rtol=1e-5, atol=1e-6)


@every_objective
def test_sharded_rows_equal_the_whole(name):
    """Rows local, columns gathered: no row looks at another, on eight devices."""
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    similarity = similarity_block(name, problem.samples, problem.proxies)
    _, _, expected = on_similarity(name)(similarity, masks, rows)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_rows = PartitionSpec("data")
    terms = OBJECTIVES[name].loss(similarity, jax.tree.map(jnp.asarray, masks)).value.ndim - 1
    out = PartitionSpec(*[None] * terms, "data")
    sharded = jax.shard_map(
        OBJECTIVES[name].loss, mesh=mesh, in_specs=by_rows, out_specs=Values(out, out)
    )
    gradient = quick_jit(jax.grad(lambda s: reduce(sharded(s, masks), rows)))(similarity)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@every_objective
def test_permuted_rows_and_columns_permute_the_values(name):
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    similarity = np.asarray(similarity_block(name, problem.samples, problem.proxies))
    values, _, gradient = on_similarity(name)(similarity, masks, rows)
    rng = np.random.default_rng(1)
    n, m = similarity.shape
    order = rng.permutation(n)
    group = OBJECTIVES[name].centers  # columns of a class stay together
    columns = rng.permutation(m // group)[:, None] * group + rng.permutation(group)
    index = np.ix_(order, columns.ravel())
    permuted = PairMasks(*(mask[index] for mask in masks))
    got, _, got_gradient = on_similarity(name)(similarity[index], permuted, rows[order])
    np.testing.assert_array_equal(got.valid, values.valid[..., order])
    np.testing.assert_allclose(got.value, values.value[..., order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_gradient, gradient[index], rtol=1e-5, atol=1e-6)


@every_objective
def test_columns_in_neither_mask_play_no_part(name):
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    kept = np.random.default_rng(2).random(masks.positive.shape) > 0.3
    masks = PairMasks(masks.positive & kept, masks.negative & kept)
    similarity = np.asarray(similarity_block(name, problem.samples, problem.proxies))
    values, _, gradient = on_similarity(name)(similarity, masks, rows)
    neither = ~masks.positive & ~masks.negative
    changed = np.where(neither, similarity[::-1] * 1.5 - 0.3, similarity)
    got, _, got_gradient = on_similarity(name)(changed, masks, rows)
    np.testing.assert_array_equal(got.value, values.value)
    np.testing.assert_array_equal(got_gradient, gradient)
    assert not np.asarray(gradient)[neither].any()


@every_objective
def test_all_masked_is_zero_with_zero_gradient(name):
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    nothing = jax.tree.map(np.zeros_like, masks)
    similarity = similarity_block(name, problem.samples, problem.proxies)
    _, total, gradient = on_similarity(name)(similarity, nothing, rows)
    assert total == 0
    assert not gradient.any()


@every_objective
def test_one_class_only(name):
    problem = random_problem(name)
    labels = np.zeros_like(problem.labels)
    total, _ = assert_finite(name, problem._replace(labels=labels, real=1))
    repel_only = {"nearest_proxy_separation", "soft_orthogonality", "hyperspherical_energy"}
    need_both = {"triplet_hard", "triplet_semihard", "triplet_all", "circle", "nt_xent"}
    softmax = {name for name, row in OBJECTIVES.items() if row.relation == SOFTMAX}
    no_loss = repel_only | need_both | softmax | {"smooth_ap"}
    assert (total == 0) == (name in no_loss)


@every_objective
def test_all_classes_distinct(name):
    problem = random_problem(name)
    labels = np.arange(SAMPLES)
    total, gradients = assert_finite(name, problem._replace(labels=labels, real=CLASSES))
    if OBJECTIVES[name].relation == SAMPLE:  # no positives: only plain repulsion is left
        repel = {"multi_similarity", "contrastive", "margin"}
        assert (total != 0) == gradients[1].any() == (name in repel)


@every_objective
def test_zero_vectors(name):
    problem = random_problem(name)
    problem.samples[::3] = 0
    problem.proxies[::3] = 0
    assert_finite(name, problem)
    assert_finite(name, problem._replace(samples=problem.samples * 0, proxies=problem.proxies * 0))


@every_objective
def test_duplicates(name):
    problem = random_problem(name)
    problem.samples[1::2] = problem.samples[::2]
    problem.proxies[1::2] = problem.proxies[::2]
    problem.proxies[:SAMPLES:3] = problem.samples[::3]
    assert_finite(name, problem)
    collapsed = problem._replace(
        samples=np.ones_like(problem.samples), proxies=np.ones_like(problem.proxies)
    )
    assert_finite(name, collapsed)


@every_objective
def test_cosines_of_exactly_plus_and_minus_one(name):
    problem = random_problem(name)
    for array in (problem.samples, problem.proxies):
        array[:] = 0
        array[np.arange(len(array)), np.arange(len(array)) % 2] = (-1.0) ** (
            np.arange(len(array)) // 2
        )
    similarity = similarity_block(name, problem.samples, problem.proxies)
    assert set(np.unique(similarity)) == {-1.0, 0.0, 1.0}
    assert_finite(name, problem)


@every_objective
def test_half_precision_is_computed_in_float32(name):
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    half = similarity_block(name, problem.samples, problem.proxies).astype(jnp.bfloat16)
    loss, masks = OBJECTIVES[name].loss, jax.tree.map(jnp.asarray, masks)
    expected, _, _ = on_similarity(name)(half.astype(jnp.float32), masks, rows)
    values = loss(half, masks)
    assert values.value.dtype == jnp.float32
    np.testing.assert_array_equal(values.valid, expected.valid)
    np.testing.assert_allclose(values.value, expected.value, rtol=1e-5, atol=1e-6)
    gradient = jax.eval_shape(jax.grad(lambda s: reduce(loss(s, masks), rows)), half)
    assert gradient.dtype == jnp.bfloat16


@every_objective
def test_nothing_is_promoted_unasked(name):
    masks, _ = masks_and_rows(name, random_problem(name))
    for given, computed in (("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2):
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            similarity = jax.ShapeDtypeStruct(masks.positive.shape, given)
            values = jax.eval_shape(OBJECTIVES[name].loss, similarity, masks)
        assert values.value.dtype == computed
        assert values.valid.dtype == bool
        assert values.value.shape == values.valid.shape
        assert values.value.shape[-1] == len(masks.positive)


@every_objective
def test_a_nan_is_not_hidden(name):
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    similarity = similarity_block(name, problem.samples, problem.proxies)
    _, total, _ = on_similarity(name)(similarity.at[2].set(np.nan), masks, rows)
    assert np.isnan(total)


@every_objective
def test_gradient_equals_finite_differences_in_float64(name):
    """Along random directions, and float32 agrees with float64."""
    problem = random_problem(name)
    masks, rows = masks_and_rows(name, problem)
    similarity = np.asarray(similarity_block(name, problem.samples, problem.proxies))
    _, total32, gradient32 = on_similarity(name)(similarity, masks, rows)
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        similarity = similarity.astype(np.float64)
        _, total, gradient = on_similarity(name)(similarity, masks, rows)
        for _ in range(4):
            direction = 1e-6 * rng.normal(size=similarity.shape)
            _, above, _ = on_similarity(name)(similarity + direction, masks, rows)
            _, below, _ = on_similarity(name)(similarity - direction, masks, rows)
            slope = np.sum(direction * gradient)
            if OBJECTIVES[name].detached:
                assert abs((above - below) / 2 - slope) > 1e-3 * abs(slope)
            else:
                np.testing.assert_allclose((above - below) / 2, slope, rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(total32, total, rtol=1e-5, atol=1e-6)
    scale = max(1, np.abs(gradient).max())
    np.testing.assert_allclose(gradient32, gradient, rtol=1e-5, atol=1e-5 * scale)
    assert np.abs(gradient).max() > 1e-4


def recall_at_1(samples, labels):
    similarity = similarity_matrix(l2_normalize(samples), l2_normalize(samples))
    nearest = np.argmax(similarity - 4 * np.eye(len(labels)), axis=1)
    return np.mean(labels[nearest] == labels)


@functools.partial(quick_jit, static_argnames=("name", "steps"))
def descend(name, samples, proxies, masks, rows, *, steps):
    """Samples and proxies after Adam on this loss alone."""
    optimizer = optax.adam(0.03)

    def loss(params):
        return reduce(OBJECTIVES[name].loss(similarity_block(name, *params), masks), rows)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    params = (samples, proxies)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params


REACHES_SAMPLES = [name for name, row in OBJECTIVES.items() if row.relation != PROXY]


@pytest.mark.parametrize("name", REACHES_SAMPLES)
def test_descent_alone_reaches_the_perfect_embedding(name):
    problem = random_problem(name)
    problem = problem._replace(labels=np.repeat(np.arange(4), 4), real=4)
    centers = OBJECTIVES[name].centers
    masks, rows = masks_and_rows(name, problem)

    def score(samples, proxies):
        """R@1; where a class may have several modes, the share nearest to a proxy of its own."""
        if centers == 1:
            return recall_at_1(samples, problem.labels)
        nearest = np.argmax(similarity_block(name, samples, proxies)[:, : 4 * centers], axis=1)
        return np.mean(nearest // centers == problem.labels)

    assert score(problem.samples, problem.proxies) < 0.7
    assert score(*descend(name, problem.samples, problem.proxies, masks, rows, steps=300)) == 1


@pytest.mark.parametrize(
    ("name", "dimensions", "cosine"),
    [
        ("nearest_proxy_separation", 4, 0.0),  # below the margin of 0.1: it rests
        ("soft_orthogonality", 4, 0.0),
        ("hyperspherical_energy", 3, -1 / 3),  # four proxies in three dimensions: a tetrahedron
    ],
)
def test_descent_alone_parts_the_proxies(name, dimensions, cosine):
    problem = random_problem(name, seed=2)
    proxies = problem.proxies.copy()
    proxies[:, dimensions:] = 0
    masks, rows = masks_and_rows(name, problem := problem._replace(proxies=proxies, real=4))

    def nearest(proxies):
        unit = l2_normalize(proxies[:4])
        return np.max(np.asarray(similarity_matrix(unit, unit)) - 2 * np.eye(4))

    assert nearest(proxies) > 0.2
    _, proxies = descend(name, *problem[:2], masks, rows, steps=300)
    assert nearest(proxies) <= cosine + 0.01
    assert nearest(proxies) >= -1 / 3 - 1e-5


def test_descent_alone_merges_superfluous_centers():
    name = "soft_triple_regularizer"
    problem = random_problem(name)
    _, proxies = descend(name, *problem[:2], *masks_and_rows(name, problem), steps=300)

    def cosines(proxies):
        unit = np.asarray(l2_normalize(proxies[: 2 * problem.real]))
        return np.sum(unit[::2] * unit[1::2], axis=1)

    assert cosines(problem.proxies).min() < 0.5
    assert cosines(proxies).min() > 0.99

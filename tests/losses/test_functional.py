"""The public losses against loops over raw arrays, and what they refuse."""

from __future__ import annotations

import doctest
import inspect
import math
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import CASES

from mmljax import combinations, losses, miners
from mmljax.errors import UserError
from mmljax.losses import pair, registry
from mmljax.numerics import l2_normalize
from mmljax.types import PairMasks
from objective_blocks import quick_jit

LABELS = np.array([0, 2, 0, 1, 1, 2, 2])
CLASSES, DIMENSIONS = 4, 3  # class 3 has no sample
PUBLIC = {
    f"{module.__name__.removeprefix('mmljax.')}.{name}": getattr(module, name)
    for module in (losses, miners, combinations)
    for name in module.__all__
}


def arrays(case):
    """What the public form of a loss takes, of any length, with the keywords it needs."""
    rng = np.random.default_rng(4)
    centers = max(case.centers, 2 if case.name == "soft_triple_regularizer" else 1)
    embeddings = 3 * rng.normal(size=(len(LABELS), DIMENSIONS))
    proxies = 0.2 * rng.normal(size=(CLASSES * centers, DIMENSIONS))
    parameters = inspect.signature(getattr(losses, case.name)).parameters
    taken = {"embeddings": embeddings, "labels": LABELS, "proxies": proxies}
    given = {name: array for name, array in taken.items() if name in parameters}
    options = {"centers": centers} if "centers" in parameters else {}
    return given, options | case.hyper, centers


def loop_mean(case, given, centers, at):
    """The mean of the loop over all rows, from raw arrays; ``at`` are the unperturbed ones."""
    owner = np.arange(CLASSES * centers) // centers

    def sides(arrays):
        unit = {
            name: array / np.linalg.norm(array, axis=1, keepdims=True)
            for name, array in arrays.items()
            if name != "labels"
        }
        samples, proxies = unit.get("embeddings"), unit.get("proxies")
        if case.name == "proxy_anchor":
            return (proxies, owner), (samples, LABELS)
        if "proxies" not in unit:
            return (samples, LABELS), (samples, LABELS)
        if "embeddings" not in unit:
            return (proxies, owner), (proxies, owner)
        return (samples, LABELS), (proxies, owner)

    (rows, row_labels), (columns, column_labels) = sides(given)
    (fixed_rows, _), (fixed_columns, _) = sides(at)
    terms = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(columns)) if rows is not columns or i != j]
        found = case.loop(
            [float(row @ column) for column in columns],
            [j for j in others if column_labels[j] == row_labels[i]],
            [j for j in others if column_labels[j] != row_labels[i]],
            [float(fixed_rows[i] @ column) for column in fixed_columns],
            **case.hyper,
        )
        terms.append(found if isinstance(found, tuple) else (found,))
    columns_of_terms = ([v for v in term if v is not None] for term in zip(*terms, strict=True))
    return sum(sum(values) / len(values) for values in columns_of_terms)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_gradient_equal_the_loop(case):
    given, options, centers = arrays(case)
    function = getattr(losses, case.name)

    vectors = {name: array for name, array in given.items() if name != "labels"}
    with jax.enable_x64(True):
        labels = {"labels": LABELS} if "labels" in given else {}
        total = quick_jit(jax.value_and_grad(lambda x: function(**x, **labels, **options)))
        value, gradient = jax.tree.map(np.asarray, total(vectors))
    np.testing.assert_allclose(value, loop_mean(case, given, centers, given), rtol=1e-10)
    rng = np.random.default_rng(5)
    step = {name: 1e-5 * rng.normal(size=array.shape) for name, array in vectors.items()}
    ends = [
        loop_mean(case, {n: a + sign * step[n] for n, a in vectors.items()}, centers, vectors)
        for sign in (1, -1)
    ]
    slope = sum(np.sum(step[name] * gradient[name]) for name in vectors)
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=1e-6, atol=1e-13)
    assert abs(slope) > 1e-9


NAMES = sorted({case.name for case in CASES})
ON_SAMPLES = [n for n in NAMES if "pairs" in inspect.signature(getattr(losses, n)).parameters]


def example(name, dtype=np.float32):
    case = next(case for case in CASES if case.name == name)
    given, options, _ = arrays(case)
    return {n: a if n == "labels" else a.astype(dtype) for n, a in given.items()}, options


def test_every_registered_loss_is_public_and_has_a_loop():
    assert sorted(losses.__all__) == sorted(registry.LOSSES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name):
    given, options = example(name)
    half = {n: a if n == "labels" else jnp.asarray(a, jnp.float16) for n, a in given.items()}
    wide = {n: a if n == "labels" else a.astype(jnp.float32) for n, a in half.items()}
    function = quick_jit(partial(getattr(losses, name), **options))
    got = function(**half)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, function(**wide))


@pytest.mark.parametrize("name", ON_SAMPLES)
def test_references_and_pairs_state_the_same_block(name):
    given, options = example(name)
    x, loss = given["embeddings"], partial(getattr(losses, name), **options)
    rows = np.isin(np.arange(7), (0, 1, 3, 6))
    expected = quick_jit(loss)(
        x[rows], LABELS[rows], reference_embeddings=x[~rows], reference_labels=LABELS[~rows]
    )
    same = LABELS[:, None] == LABELS
    cross = rows[:, None] & ~rows
    got = quick_jit(loss)(x, LABELS, pairs=PairMasks(same & cross, ~same & cross))
    over_all = name in ("multi_similarity", "contrastive")  # their mean runs over every anchor
    np.testing.assert_allclose(got, (4 / 7 if over_all else 1) * expected, rtol=1e-5)
    assert expected > 0


def test_labels_of_64_bits_are_told_apart():
    x, wide = example("supcon")[0]["embeddings"], LABELS * 2**32 - 5  # equal modulo 2^32
    np.testing.assert_array_equal(losses.supcon(x, wide), losses.supcon(x, LABELS))
    references = {"reference_embeddings": x[3:], "reference_labels": wide[3:]}
    expected = losses.supcon(x[:3], LABELS[:3], **references | {"reference_labels": LABELS[3:]})
    np.testing.assert_array_equal(losses.supcon(x[:3], wide[:3], **references), expected)
    with pytest.raises(UserError, match="labels beyond 32 bits"):
        losses.supcon(x[:3], jnp.asarray(LABELS[:3]), **references)


def close_vectors(distance):
    """Two vectors of different lengths whose directions are this far apart, float32."""
    first, away = np.array([2.0, 1.0, -2.0]) / 3, np.array([1.0, -2.0, 0.0]) / math.sqrt(5)
    angle = 2 * math.asin(distance / 2)
    second = math.cos(angle) * first + math.sin(angle) * away
    return np.array([1.5 * first, 0.7 * second], np.float32)


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1.7e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("name", ["margin", "soft_triple_regularizer", "hyperspherical_energy"])
def test_gradients_of_distances_are_right_near_zero(name, distance):
    """The slope of each function of the distance, along the tangent at the first vector."""
    x = close_vectors(distance)
    wide = x.astype(float)
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    exact = np.linalg.norm(unit[0] - unit[1])
    labels = np.zeros(2, int)
    loss, value, slope = {
        "margin": (lambda x: losses.margin(x, labels, beta=0.0), 0.2 + exact, 1),
        "soft_triple_regularizer": (
            lambda x: losses.soft_triple_regularizer(x, centers=2),
            exact / 2,
            0.5,
        ),
        "hyperspherical_energy": (
            losses.hyperspherical_energy,
            max(exact, 1e-2) ** -2,
            -2 * exact**-3 * (exact > 1e-2),
        ),
    }[name]
    direction = (unit[0] - unit[1]) / exact
    tangent = direction - unit[0] * (unit[0] @ direction)
    expected = slope * tangent / np.linalg.norm(wide[0])
    got, gradient = quick_jit(jax.value_and_grad(loss))(x)
    tolerance = 1e-6 + 2e-7 / distance
    np.testing.assert_allclose(got, value, rtol=tolerance)
    error = np.linalg.norm(gradient[0] - expected)
    assert error <= 2 * tolerance * max(np.linalg.norm(expected), 1e-9)


def test_the_block_form_without_distances_has_the_stated_error():
    x = close_vectors(1.7e-3)
    similarity = l2_normalize(jnp.asarray(x)) @ l2_normalize(jnp.asarray(x)).T
    masks = PairMasks(~np.eye(2, dtype=bool), np.zeros((2, 2), bool))
    value = pair.margin_loss(similarity, masks, margin=0.0, beta=0.0).value[0]
    assert 1e-3 < abs(value / 1.7e-3 - 1) < 0.1


def test_pairs_of_miners_are_accepted_under_jit():
    given, _ = example("multi_similarity")
    x, proxies = given["embeddings"], example("cosface")[0]["proxies"]
    sharp = {"margin": 0.02}

    @jax.jit
    def loss(x, labels):
        pairs = miners.sample(x, labels, **sharp)
        return losses.multi_similarity(x, labels, pairs=pairs)

    pairs = miners.sample(x, LABELS, **sharp)
    expected = losses.multi_similarity(x, LABELS, pairs=pairs)
    np.testing.assert_allclose(loss(x, LABELS), expected, rtol=1e-6)
    assert expected < losses.multi_similarity(x, LABELS)
    either = miners.either(x, LABELS, proxies, pairs=pairs, **sharp)
    assert int(either.negative.sum()) <= int(pairs.negative.sum())


X, P = np.ones((4, 3), np.float32), np.ones((6, 3), np.float32)
Y = np.array([0, 1, 1, 2])
ALL = np.ones((4, 4), bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.supcon(X[0], Y), r"embeddings must be .*\(3,\)"),
        (lambda: losses.supcon(X[:0], Y[:0]), r"embeddings must be .*\(0, 3\)"),
        (lambda: losses.supcon(X.astype(int), Y), "embeddings must be .*int64"),
        (lambda: losses.supcon(X, Y[:3]), r"labels must be 4 integers.*\(3,\)"),
        (lambda: losses.supcon(X, Y.astype(float)), "labels must be 4 integers.*float64"),
        (lambda: losses.supcon(X, Y, reference_embeddings=X), "both reference_embeddings and"),
        (
            lambda: losses.supcon(X, Y, reference_embeddings=X[:, :2], reference_labels=Y),
            "reference_embeddings must have the embeddings' 3 columns",
        ),
        (lambda: losses.supcon(X, Y, pairs=PairMasks(ALL, ALL[1:])), r"pairs.negative.*\(3, 4\)"),
        (lambda: losses.supcon(X, Y, pairs=PairMasks(ALL * 1, ALL)), "pairs.positive.*int"),
        (lambda: losses.cosface(X, Y, P[:, :2]), "proxies must have the embeddings' 3 columns"),
        (lambda: losses.cosface(X, Y + 4, P), r"labels must lie in 0 \.\. 5.*found 4 \.\. 6"),
        (lambda: losses.cosface(X, Y - 1, P), r"found -1 \.\. 1"),
        (lambda: losses.soft_triple(X, Y, P, centers=4), "centers=4: the 6 rows of proxies"),
        (lambda: losses.soft_orthogonality(P, centers=0), "centers=0"),
        (lambda: miners.both(X, Y + 4, P), r"labels must lie in 0 \.\. 5"),
    ],
)
def test_bad_arrays_are_refused_by_name(call, words):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.supcon(X, Y, temprature=0.1), "supcon.*'temprature'.*'temperature'"),
        (lambda: losses.supcon(X), r"supcon\(\) missing a required argument: 'labels'"),
        (lambda: losses.soft_triple(X, Y, P), r"soft_triple\(\) missing .*'centers'"),
        (lambda: miners.hard(X, Y, margin=0.1), r"hard\(\) has no argument 'margin'"),
        (lambda: miners.distance_weighted(X, Y, dimension=3), "no argument 'dimension'"),
    ],
)
def test_unknown_and_missing_keywords_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_the_hyperparameters_are_in_the_signature():
    signature = inspect.signature(losses.multi_similarity)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    assert [defaults[name] for name in ("alpha", "beta", "base")] == [2.0, 40.0, 0.5]
    assert pickle.loads(pickle.dumps(losses.margin)) is losses.margin


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_and_its_example_runs(name):
    function = PUBLIC[name]
    text = inspect.getdoc(function)
    for word in ("Source:", "Args:", "Returns:", "``["):
        assert word in text, word
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}: " in text
    assert max(map(len, text.splitlines())) <= 100
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, module=False, globs={})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0

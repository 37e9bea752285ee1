"""Matryoshka training equals separate objectives on the unit prefixes, and a slow loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mmljax import MultiObjective, Objective
from mmljax.errors import UserError
from mmljax.losses.prefixes import make_prefixes

SIZES, WEIGHTS, CLASSES = (3, 8), (2.0, 0.5), 6
ROWS = {
    "mined": Objective("multi_similarity", mining="either", mining_params={"margin": 0.3}),
    "drawn": Objective("margin", weight=0.7, mining="distance_weighted", memory=True),
    "selected": Objective("proxy_anchor", weight=0.3, mining="both", memory=True),
    "softmax": Objective("soft_triple", weight=0.2, sampled_proxies=4),
    "separation": Objective("nearest_proxy", weight=0.1),
}


def make(dimension: int, **options: Any) -> MultiObjective:
    """The objectives under fixed weights, with two proxies per class and a memory."""
    return MultiObjective(
        ROWS,
        classes=CLASSES,
        dimension=dimension,
        centers=2,
        combination="fixed",
        memory_size=7,
        **options,
    )


def prefix(x: Any, size: int) -> Any:
    """Unit prefixes, by NumPy."""
    cut = np.asarray(x)[..., :size]
    return cut / np.linalg.norm(cut, axis=-1, keepdims=True)


def start(random: np.random.Generator) -> tuple[Any, ...]:
    """Embeddings, labels, params and state after a step, in float64."""
    embeddings = random.normal(size=(12, 8)) * random.uniform(0.5, 3, (12, 1))
    labels = jnp.asarray(np.arange(12) % 5, jnp.int32)
    params, state = make(8).init(jax.random.key(0), dtype=jnp.float64)
    held = {
        "vectors": jnp.asarray(prefix(random.normal(size=(7, 8)), 8)),
        "labels": jnp.asarray([0, 1, 2, -1, 4, 0, 3], jnp.int32),
        "next": jnp.zeros((), jnp.int32),
    }
    return jnp.asarray(embeddings), labels, params, state._replace(memory=held)


def gradients(objective: MultiObjective, state: Any, labels: Any) -> Any:
    """A compiled ``(embeddings, params) -> ((loss, (state, ledger)), gradients)``."""

    def loss(embeddings: Any, params: Any) -> Any:
        return objective(params, state, embeddings, labels)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.slow
def test_objectives_are_the_weighted_sum_of_those_of_each_prefix() -> None:
    """With mining in both views, drawn pairs, selected samples, sampled proxies and a memory."""
    with jax.enable_x64(True):
        embeddings, labels, params, state = start(np.random.default_rng(1))
        whole = make(8, matryoshka=SIZES, matryoshka_weights=WEIGHTS)
        (loss, (_, ledger)), found = gradients(whole, state, labels)(embeddings, params)
        total, at_embeddings, at_proxies = 0.0, np.zeros((12, 8)), np.zeros((12, 8))
        for size, weight in zip(SIZES, WEIGHTS, strict=True):
            held = {**state.memory, "vectors": prefix(state.memory["vectors"], size)}
            alone = gradients(make(size), state._replace(memory=held), labels)
            own = {**params, "proxies": params["proxies"][:, :size]}
            (value, (_, expected)), (first, second) = alone(embeddings[:, :size], own)
            total += weight * value
            at_embeddings[:, :size] += weight * first
            at_proxies[:, :size] += weight * second["proxies"]
            for name in ROWS:
                assert expected[f"loss/{name}"] > 0, name
                close(ledger[f"loss@{size}/{name}"], expected[f"loss/{name}"], name)
            for name in ("mined", "drawn", "selected"):
                for kind in ("kept_positive", "kept_negative"):
                    close(ledger[f"{kind}@{size}/{name}"], expected[f"{kind}/{name}"], name)
        close(loss, total)
        close(found[0], at_embeddings)
        close(found[1]["proxies"], at_proxies)
        assert ledger["loss/mined"] == pytest.approx(
            sum(w * ledger[f"loss@{m}/mined"] for m, w in zip(SIZES, WEIGHTS, strict=True))
        )
        norm = np.linalg.norm(at_embeddings[:, -1])
        assert norm > 0  # the last dimension belongs to the last size alone


def close(found: Any, expected: Any, name: str = "") -> None:
    """Equal in float64 but for the order of sums."""
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_contrastive_loss_of_prefixes_equals_a_slow_loop() -> None:
    random = np.random.default_rng(2)
    x, labels = random.normal(size=(7, 4)), np.array([0, 1, 0, 2, 1, 0, 2])
    expected = 0.0
    for size in (2, 4):
        unit = prefix(x, size)
        for i in range(7):
            for j in range(7):
                s = float(unit[i] @ unit[j])
                if i != j:
                    expected += max(0.9 - s, 0) if labels[i] == labels[j] else max(s - 0.4, 0)
    row = Objective("contrastive", {"positive_margin": 0.9, "negative_margin": 0.4})
    options = {"dimension": 4, "combination": "fixed", "matryoshka": (2, 4)}
    for row_block in (0, 3):
        objective = MultiObjective({"pair": row}, classes=3, row_block=row_block, **options)
        params, state = objective.init(jax.random.key(0))
        loss, _ = jax.jit(objective)(params, state, jnp.asarray(x), jnp.asarray(labels))
        assert loss == pytest.approx(expected / 7, rel=1e-5)


def test_one_product_of_the_whole_embeddings_serves_all_sizes() -> None:
    def products(**options: Any) -> list[int]:
        """The number of multiplications of each product, forward and back."""
        objective = MultiObjective(
            {"pair": "contrastive"}, classes=3, dimension=16, combination="fixed", **options
        )
        params, state = objective.init(jax.random.key(0))
        x, labels = jnp.ones((7, 16)), jnp.arange(7) % 3
        traced = jax.make_jaxpr(lambda x: objective(params, state, x, labels)[0])(x)
        return [multiplications(e) for e in equations(traced.jaxpr) if 7 in e.outvars[0].aval.shape]

    whole, cut = products(), products(matryoshka=(2, 4, 8, 16))
    assert sum(cut) == sum(whole) == 3 * 7 * 7 * 16  # similarities, and gradients of both sides
    assert len(cut) == 4 * len(whole)


def equations(jaxpr: Any) -> Any:
    """Every matrix product of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def multiplications(equation: Any) -> int:
    """Of a matrix product."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return int(np.prod([*equation.outvars[0].aval.shape, *inner]))


def test_one_size_changes_nothing() -> None:
    embeddings, labels = jax.random.normal(jax.random.key(1), (12, 8)), jnp.arange(12) % 5
    row = {"pair": Objective("multi_similarity", mining="either")}
    options = {"classes": CLASSES, "dimension": 8, "combination": "fixed"}
    plain, one = (MultiObjective(row, matryoshka=sizes, **options) for sizes in ((), (8,)))
    params, state = plain.init(jax.random.key(0))
    expected, found = (gradients(o, state, labels)(embeddings, params) for o in (plain, one))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    assert not any("@" in name for name in found[0][1][1])


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ((4, 2, 8), (), r"matryoshka=\(4, 2, 8\) must rise to --config.model.embedding_size=8"),
        ((2, 4), (), r"must rise .* for example \(4, 8\)"),
        ((2, 2, 8), (), "must rise"),
        ((0, 8), (), "must rise"),
        ((4, 16), (), "must rise"),
        ((4, 8), (1.0,), r"matryoshka_weights=\(1.0,\) must hold a weight for each size"),
        ((4, 8), (0.0, 0.0), "not all of them 0"),
        ((), (1.0,), r"each size of --config.model.matryoshka=\(\)"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: Any, weights: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_prefixes(sizes, weights, dimension=8)

"""MultiObjective equals the trainer's step in own loops, and refuses bad input; its memory."""

from __future__ import annotations

import collections
import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mmljax
from mmljax.errors import UserError
from mmljax.losses import registry
from mmljax.losses.collectives import Axis
from mmljax.losses.memory import init_memory, write_memory
from mmljax.mesh import AXIS, make_mesh, place
from mmljax.training.state import make_state
from mmljax.training.step import make_train_step
from mmljax.types import Batch, Points

OWN_LOOP = Path(__file__).parents[2] / "examples" / "own_loop.py"


def rows(**changes: Any) -> dict[str, mmljax.Objective]:
    """The default objectives, with changes of the pair objective."""
    found = dict(mmljax.default_config().objectives.to_dict())
    found = {name: mmljax.Objective(**row) for name, row in found.items()}
    return {**found, "pair": dataclasses.replace(found["pair"], **changes)}


def points(count: int, classes: int, *, seed: int = 0) -> tuple[Any, Any]:
    """Embeddings of several lengths, and labels."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, 6)) * random.uniform(0.5, 3, (count, 1))
    return jnp.asarray(vectors), jnp.asarray(random.integers(0, classes, count), jnp.int32)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-6), pytest.param("float64", 1e-12, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_own_loop_equals_the_step_of_the_trainer(
    devices: int, dtype: str, tolerance: float
) -> None:
    """Gradients and ledger of three steps; under descent with rate 1 the change is the gradient."""
    with jax.enable_x64(dtype == "float64"):
        example = runpy.run_path(str(OWN_LOOP))
        objective, mesh = example["objective"], make_mesh(jax.devices()[:devices])
        network = jax.tree.map(lambda x: x.astype(dtype), example["network"])

        class Named(nnx.Module):  # as the trainer calls a network
            def __init__(self) -> None:
                self.inner = nnx.merge(example["graphdef"], network)

            def __call__(self, images: Any, *, train: bool, keys: Any = None) -> Any:
                return self.inner(images)

        graphdef, split = nnx.split(Named())
        rate = optax.partition(
            {"network": optax.sgd(1e-2), "proxies": optax.sgd(1e-2), "weights": optax.sgd(1e-2)},
            {"network": "network", "proxies": "proxies", "weights": "weights"},
        )
        trained = make_state(
            jax.tree.map(jnp.copy, nnx.to_pure_dict(split)),  # the step donates them
            {},
            objective=objective,
            optimizer=rate,
            seed=0,
            mesh=mesh,
        )
        theirs = make_train_step(graphdef=graphdef, objective=objective, optimizer=rate, mesh=mesh)
        objective_params, state = objective.init(jax.random.key(0), dtype=dtype)
        params = {"network": network, **objective_params}
        step = own_step(example, rate, mesh if devices > 1 else None)
        for index in range(3):
            inputs, labels = example["batch"](index)
            inputs = inputs.astype(dtype)
            batch = Batch(np.asarray(inputs), np.asarray(labels), np.ones(len(labels), bool))
            trained, expected = theirs(trained, place(batch, mesh))
            params, state, ledger, norm = step(params, state, inputs, labels)
            for name, value in ledger.items():
                scale = max(1.0, abs(float(expected[name])))
                assert abs(value - expected[name]) <= 10 * tolerance * scale, name
            np.testing.assert_allclose(norm, expected["gradient_norm/network"], rtol=10 * tolerance)
        ours = jax.tree.leaves((nnx.to_pure_dict(params["network"]), params["proxies"]))
        others = jax.tree.leaves((trained.params["network"]["inner"], trained.params["proxies"]))
        assert len(ours) == len(others) == 5
        for a, b in zip(ours, others, strict=True):
            assert a.dtype == dtype
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def own_step(example: dict[str, Any], optimizer: Any, mesh: Any) -> Any:
    """A step of the example's gradients, sharded over a mesh if there is one."""
    gradients = example["gradients"]
    if mesh is not None:
        rows, whole = jax.P(AXIS), jax.P()
        params_specs, state_specs = example["objective"].partition_specs(AXIS)
        layout = {"network": whole, **params_specs}
        gradients = jax.shard_map(
            functools.partial(gradients, axis_name=AXIS),
            mesh=mesh,
            in_specs=(layout, state_specs, rows, rows),
            out_specs=(layout, (state_specs, whole)),
        )

    @jax.jit
    def step(params: Any, state: Any, inputs: Any, labels: Any) -> Any:
        grads, (state, ledger) = gradients(params, state, inputs, labels)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        norm = optax.tree.norm(grads["network"])
        return optax.apply_updates(params, updates), state, ledger, norm

    return step


def test_the_example_runs_on_eight_devices() -> None:
    """Its own sharded step equals its step on one device."""
    example = runpy.run_path(str(OWN_LOOP))
    params, optimizer_state, state = example["start"]()
    steps = example["step"], example["sharded_step"](make_mesh(jax.devices()))
    ledgers = [step(params, optimizer_state, state, *example["batch"](0))[3] for step in steps]
    for name, value in ledgers[0].items():
        np.testing.assert_allclose(ledgers[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", registry.LOSSES)
def test_every_loss_gives_finite_gradients_and_a_ledger(name: str) -> None:
    objective = mmljax.MultiObjective(
        {"one": name, "separation": "nearest_proxy"}, classes=5, dimension=6, centers=2
    )
    params, state = objective.init(jax.random.key(0))
    embeddings, labels = points(12, 5)

    def loss(embeddings: Any, params: Any) -> Any:
        return objective(params, state, embeddings, labels)

    grads, (_, ledger) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(embeddings, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, ledger)))
    assert ledger["loss/one"] > 0


@pytest.mark.parametrize(
    ("rule", "combination"),
    [
        *((rule, "share") for rule in registry.MINERS),
        *(("either", c) for c in registry.COMBINATIONS),
    ],
)
def test_every_rule_and_combination(rule: str, combination: str) -> None:
    objective = mmljax.MultiObjective(
        rows(mining=rule, mining_params={}), classes=5, dimension=6, combination=combination
    )
    params, state = objective.init(jax.random.key(0))
    loss, (new, ledger) = jax.jit(objective)(params, state, *points(12, 5))
    assert np.isfinite(loss)
    assert int(new.step) == 1
    assert ("kept_negative/pair" in ledger) == (rule != "none")


def test_padded_rows_have_no_effect() -> None:
    objective = mmljax.MultiObjective(rows(), classes=5, dimension=6, memory_size=20)
    params, state = objective.init(jax.random.key(0))
    embeddings, labels = points(12, 5)

    @jax.jit
    def gradients(embeddings: Any, labels: Any, valid: Any) -> Any:
        def loss(embeddings: Any) -> Any:
            return objective(params, state, embeddings, labels, valid=valid)

        return jax.grad(loss, has_aux=True)(embeddings)

    short, (_, expected) = gradients(embeddings[:9], labels[:9], None)
    padded, (new, ledger) = gradients(embeddings, labels, jnp.arange(12) < 9)
    np.testing.assert_allclose(padded[:9], short, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(padded[9:], 0)
    for name, value in expected.items():
        np.testing.assert_allclose(ledger[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert (new.memory["labels"] >= 0).sum() == 9


def test_gradients_at_any_length_equal_those_through_the_normalisation() -> None:
    """Also of rows that are zero or shorter than the normalisation's epsilon."""
    with jax.enable_x64(True):
        embeddings, labels = points(12, 4, seed=2)
        embeddings *= jnp.asarray([0, 1e-8] + [1] * 10)[:, None]
        pair = mmljax.Objective("multi_similarity")
        proxy = mmljax.Objective("proxy_anchor", weight=0.3)
        objective = mmljax.MultiObjective(
            {"pair": pair, "proxy": proxy}, classes=4, dimension=6, combination="fixed"
        )
        params, state = objective.init(jax.random.key(1), dtype=jnp.float64)
        proxies = params["proxies"] * jnp.asarray([[3.0], [1e-9], [0.0], [0.2]])

        def ours(x: jax.Array, p: jax.Array) -> jax.Array:
            return objective(params | {"proxies": p}, state, x, labels)[0]

        def expected(x: jax.Array, p: jax.Array) -> jax.Array:
            proxy = mmljax.losses.proxy_anchor(x, labels, p)
            return mmljax.losses.multi_similarity(x, labels) + 0.3 * proxy

        got = jax.grad(ours, (0, 1))(embeddings, proxies)
        for a, b in zip(got, jax.grad(expected, (0, 1))(embeddings, proxies), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_half_precision_embeddings_are_computed_in_float32() -> None:
    objective = mmljax.MultiObjective(rows(), classes=5, dimension=6)
    params, state = objective.init(jax.random.key(0))
    embeddings, labels = points(12, 5)
    half = embeddings.astype(jnp.bfloat16)

    def loss(embeddings: Any) -> Any:
        return objective(params, state, embeddings, labels)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(half)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, jax.jit(loss)(half.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(("size", "count"), [(40, 16), (24, 16), (5, 16), (16, 16), (1, 8)])
def test_memory_is_a_ring_for_any_size(size: int, count: int, devices: int) -> None:
    """It holds the last ``size`` embeddings, also below the batch or not a multiple of it."""
    mesh = make_mesh(jax.devices()[:devices])
    rows, whole = jax.P(AXIS), jax.P()
    specs = {"vectors": rows, "labels": rows, "next": whole}

    def write(memory: Any, batch: Points) -> Any:
        return write_memory(memory, batch, Axis(AXIS), size=size)

    sharded = jax.jit(
        jax.shard_map(write, mesh=mesh, in_specs=(specs, whole), out_specs=specs, check_vma=False)
    )
    memory = init_memory(size, 3, dtype=jnp.float32, multiple_of=8)
    expected: collections.deque[int] = collections.deque(maxlen=size)
    for step in range(7):
        labels = jnp.arange(step * count, (step + 1) * count, dtype=jnp.int32)
        vectors = jnp.stack([labels, labels + 1, labels + 2], axis=1).astype(jnp.float32)
        batch = Points(vectors, labels, jnp.arange(count), jnp.ones(count, bool))
        memory = sharded(memory, batch)
        expected.extend(labels.tolist())
        held = np.asarray(memory["labels"])
        assert sorted(held[held >= 0].tolist()) == sorted(expected)
        filled = np.flatnonzero(held >= 0)
        assert filled.max() < size
        np.testing.assert_array_equal(memory["vectors"][filled, 0], held[filled])
        assert 0 <= int(memory["next"]) < size  # never overflows


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"loss": "circl"}, {}, r"pair.loss='circl' is unknown.*'circle'"),
        ({"params": {"alfa": 1.0}}, {}, r"pair.params.alfa is unknown.*'alpha'"),
        ({"params": {"alpha": "x"}}, {}, r"pair.params.alpha must be of type float"),
        ({"params": {"alpha": (1, 2)}}, {}, r"pair.params.alpha must be of type float"),
        ({"loss": "recall_at_k", "params": {"ks": 4}}, {}, r"pair.params.ks must be of type tuple"),
        ({"mining": "eithr"}, {}, r"pair.mining='eithr' is unknown.*'either'"),
        ({"mining": "hard"}, {}, r"mining_params.margin is unknown: hard takes no hyper.*'{}'"),
        ({"mining": "none"}, {}, r"mining_params.*has no rule.*'{}'"),
        ({"mining_params": {"blend": 0.5}}, {}, r"mining_params.blend is unknown: either takes m"),
        ({"memory": True}, {}, r"pair.memory=True needs --config.memory.size"),
        ({"sampled_proxies": 2}, {}, r"sampled_proxies=2 is for losses with prox"),
        ({"weight": 0.0}, {}, r"pair.weight must be above 0"),
        ({"loss": "nearest_proxy"}, {}, r"pair has proxies as columns"),
        ({}, {"combination": "shares"}, r"combination.name='shares' is unknown.*'share'"),
        ({}, {"combination_params": {"alpha": 1.5}}, r"combination.params.alpha is unknown: share"),
        ({}, {"surgery": "pcgrd"}, r"surgery='pcgrd' is unknown.*'pcgrad'"),
    ],
)
def test_bad_objectives_are_refused(changes: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mmljax.MultiObjective(rows(**changes), classes=5, dimension=6, **options)


def test_embeddings_of_another_size_are_refused() -> None:
    objective = mmljax.MultiObjective({"pair": "multi_similarity"}, classes=5, dimension=7)
    params, state = objective.init(jax.random.key(0))
    with pytest.raises(UserError, match=r"must be \[b 7\] with labels \[b\], found \(12, 6\)"):
        objective(params, state, *points(12, 5))


def test_a_deleted_row_is_gone_and_shares_are_normalised() -> None:
    kept = rows()
    del kept["proxy"]
    objective = mmljax.MultiObjective(kept, classes=5, dimension=6)
    params, state = objective.init(jax.random.key(0))
    _, (_, ledger) = objective(params, state, *points(12, 5))
    assert not [name for name in ledger if name.endswith("/proxy")]
    assert ledger["share_embeddings/pair"] == 1

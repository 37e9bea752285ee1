"""The step: its gradient is the true one, on any number of devices, and it is compiled once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from mmljax.losses import combination, mining
from mmljax.losses.relations import nearest_class_proxies
from mmljax.numerics import l2_normalize, masked_mean
from mmljax.types import Points, Views


def gradients_of(step: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """The step's gradients: under plain descent with rate 1 they are the change of parameters."""
    before = jax.device_get(state.params)
    after, scalars = step(state, batch)
    change = jax.tree.map(lambda a, b: a - np.asarray(b), before, jax.device_get(after.params))
    return change, jax.device_get(scalars)


def whole_loss(params: Any, model_state: Any, graphdef: Any, batch: Any, weights: Any) -> Any:
    """The weighted sum on one device, written on whole matrices without any of the step's parts."""
    model = nnx.merge(graphdef, params["network"], model_state, copy=True)
    model.head.norm.axis_name = None
    x = model(batch.images, train=True)
    p = l2_normalize(params["proxies"])
    count = len(batch.labels)
    real = jnp.arange(len(p)) < tiny.CLASSES
    samples = Points(x, batch.labels, jnp.arange(count), jnp.ones(count, bool))
    proxies = Points(p, jnp.arange(len(p)), jnp.arange(len(p)), real)
    rows = tiny.objectives()
    masks = mining.pair_masks(samples, samples, same_kind=True)
    partners = nearest_class_proxies(x, p[batch.labels][:, None])
    views = Views(x @ x.T, partners @ x.T, jnp.sum(partners * x, 1), None)
    kept = mining.either_miner(views, masks, margin=0.1, blend=0.5)
    own = (jnp.arange(len(p))[:, None] == batch.labels[None]) & real[:, None]
    to_proxy = mining.pair_masks(proxies, samples, same_kind=False)
    pair = rows[0].loss(x @ x.T, kept)
    proxy = rows[1].loss(p @ x.T, mining.proxy_masks(kept, own, to_proxy))
    separation = rows[2].loss(p @ p.T, mining.pair_masks(proxies, proxies, same_kind=True))
    losses = [
        masked_mean(values._replace(valid=values.valid & valid)).sum()
        for values, valid in ((pair, True), (proxy, real), (separation, real))
    ]
    return sum(w * value for w, value in zip(weights, losses, strict=True))


@pytest.mark.parametrize("devices", [1, 8])
def test_gradient_is_that_of_the_weighted_sum(devices: int) -> None:
    with jax.enable_x64(True):
        weights = (1.0, 0.2, 0.05)
        step, state, place, graphdef = tiny.make(
            devices,
            dtype=jnp.float64,
            combine=combination.fixed(weights),
            optimizer=optax.sgd(1.0),
        )
        batch = tiny.batch(0)
        params = jax.device_get(state.params)
        model_state = jax.tree.map(jnp.asarray, jax.device_get(state.model_state))
        value, expected = jax.jit(jax.value_and_grad(whole_loss), static_argnums=2)(
            params, model_state, graphdef, batch, weights
        )
        got, scalars = gradients_of(step, state, place(batch))
        np.testing.assert_allclose(scalars["loss"], value, rtol=1e-10)
        for group in ("network", "proxies"):
            for a, b in zip(
                jax.tree.leaves(got[group]), jax.tree.leaves(expected[group]), strict=True
            ):
                assert np.linalg.norm(b) > 0
                assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(b)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_eight_devices_equal_one(dtype: str, tolerance: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        results = []
        for devices in (1, 8):
            step, state, place, _ = tiny.make(
                devices, dtype=jnp.dtype(dtype), optimizer=optax.sgd(1.0)
            )
            results.append(gradients_of(step, state, place(tiny.batch(0))))
        (one, scalars), (eight, scalars_eight) = results
        np.testing.assert_allclose(scalars["loss"], scalars_eight["loss"], rtol=tolerance)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.slow
def test_twenty_steps_on_any_number_of_devices(devices: int) -> None:
    """Pair, proxy, separation, learned weights and memory: parameters equal to 1e-9."""
    with jax.enable_x64(True):
        finals = []
        for count in (1, devices):
            rows = tiny.objectives(memory=True)
            step, state, place, _ = tiny.make(count, dtype=jnp.float64, rows=rows, memory=128)
            start = jax.device_get(state.params)
            for index in range(20):
                state, _ = step(state, place(tiny.batch(index)))
            finals.append(jax.device_get((state.params, state.memory, state.model_state)))
        for a, b in zip(jax.tree.leaves(finals[0]), jax.tree.leaves(finals[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(finals[0][0]), strict=True):
            assert not np.allclose(a, b)  # it really trained, the contribution weights too


def sampled(count: int) -> list[Any]:
    *others, separation = tiny.objectives()
    return [*others, separation._replace(sampled_proxies=count)]


def test_all_proxies_drawn_is_all_proxies() -> None:
    with jax.enable_x64(True):
        results = []
        for rows in (sampled(0), sampled(tiny.CLASSES)):
            step, state, place, _ = tiny.make(
                4, dtype=jnp.float64, rows=rows, optimizer=optax.sgd(1.0)
            )
            results.append(gradients_of(step, state, place(tiny.batch(0))))
    (every, scalars), (drawn, scalars_drawn) = results
    assert scalars["loss/separation"] > 0
    for name, value in scalars.items():
        np.testing.assert_allclose(scalars_drawn[name], value, rtol=1e-9, err_msg=name)
    for a, b in zip(jax.tree.leaves(every), jax.tree.leaves(drawn), strict=True):
        assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(a)


def test_drawn_proxies_are_the_same_on_any_number_of_devices() -> None:
    with jax.enable_x64(True):
        finals, losses = [], []
        for devices in (1, 8):
            step, state, place, _ = tiny.make(
                devices, dtype=jnp.float64, rows=sampled(4), optimizer=optax.sgd(0.1)
            )
            for index in range(3):
                state, scalars = step(state, place(tiny.batch(index)))
                losses.append(float(scalars["loss/separation"]))
            finals.append(jax.device_get(state.params))
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-9)
    for a, b in zip(jax.tree.leaves(finals[0]), jax.tree.leaves(finals[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_row_blocks_change_nothing() -> None:
    with jax.enable_x64(True):
        results = []
        for block in (0, 3):
            step, state, place, _ = tiny.make(
                2, dtype=jnp.float64, row_block=block, optimizer=optax.sgd(1.0)
            )
            results.append(gradients_of(step, state, place(tiny.batch(0))))
    (dense, scalars), (blocked, scalars_blocked) = results
    for name, value in scalars.items():
        np.testing.assert_allclose(scalars_blocked[name], value, rtol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(blocked), strict=True):
        assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(a)


def test_traced_once() -> None:
    calls = []

    def counted(similarity: Any, masks: Any) -> Any:
        calls.append(1)
        return tiny.objectives()[0].loss(similarity, masks)

    rows = tiny.objectives()
    rows[0] = rows[0]._replace(loss=counted)
    step, state, place, _ = tiny.make(2, rows=rows)
    state, _ = step(state, place(tiny.batch(0)))
    first = len(calls)
    assert first > 0
    for index in range(1, 4):
        state, _ = step(state, place(tiny.batch(index)))
    assert len(calls) == first


def test_ledger_adds_up() -> None:
    step, state, place, _ = tiny.make(4)
    _, scalars = step(state, place(tiny.batch(0)))
    s = {name: float(value) for name, value in scalars.items()}
    names = ("pair", "proxy", "separation")
    assert s["loss"] == pytest.approx(sum(s[f"weighted/{n}"] for n in names), rel=1e-6)
    for n in names:
        assert s[f"weighted/{n}"] == pytest.approx(s[f"weight/{n}"] * s[f"loss/{n}"], rel=1e-6)
    for group in ("embeddings", "proxies"):
        assert sum(s[f"share_{group}/{n}"] for n in names) == pytest.approx(1, rel=1e-6)
    assert s["gradient_embeddings/separation"] == 0  # it reaches the proxies alone
    assert s["gradient_proxies/pair"] == 0  # and the pair objective only the network
    assert -1 <= s["conflict/pair_proxy"] <= 1
    assert s["conflict/pair_proxy"] != 0
    assert 0 < s["kept_negative/pair"] < 1


def test_memory_joins_the_references_after_its_start() -> None:
    """The pair loss changes when remembered embeddings count, and not before."""
    losses: dict[int, list[float]] = {}
    for size in (0, 128):
        rows = tiny.objectives(rule="none", memory=size > 0)
        step, state, place, _ = tiny.make(2, rows=rows, memory=size, optimizer=optax.sgd(0.0))
        losses[size] = []
        for index in range(5):
            state, scalars = step(state, place(tiny.batch(index)))
            losses[size].append(float(scalars["loss/pair"]))
    np.testing.assert_allclose(losses[0][:3], losses[128][:3], rtol=1e-6)
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses[0][3:], losses[128][3:], strict=True))


def test_frozen_backbone_stays_and_padding_proxies_stay() -> None:
    step, state, place, _ = tiny.make(2)
    start = jax.device_get(state.params)
    state, _ = step(state, place(tiny.batch(0)))  # freeze_backbone is one step
    after = jax.device_get(state.params)
    for a, b in zip(
        jax.tree.leaves(start["network"]["backbone"]),
        jax.tree.leaves(after["network"]["backbone"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        start["proxies"][tiny.CLASSES :], after["proxies"][tiny.CLASSES :]
    )
    assert not np.allclose(start["proxies"][: tiny.CLASSES], after["proxies"][: tiny.CLASSES])

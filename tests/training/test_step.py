"""The step: its gradient is the true one, on any number of devices, and it is compiled once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from mmljax.config import Objective
from mmljax.losses import pair, registry
from mmljax.planning.hlo_text import collectives
from mmljax.training.step import move_average


def gradients_of(step: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """The step's gradients: under plain descent with rate 1 they are the change of parameters."""
    before, _ = real(state.params, {})
    after, scalars = step(state, batch)
    change = jax.tree.map(lambda a, b: a - b, before, real(after.params, {})[0])
    return change, jax.device_get(scalars)


def mined(similarity: Any, positive: Any, negative: Any, lowest: Any, margin: float) -> Any:
    """Multi-Similarity mining of one view by its definition."""
    highest = jnp.max(jnp.where(negative, similarity, -jnp.inf), axis=1)
    return (
        positive & (similarity - margin < highest[:, None]),
        negative & (similarity + margin > lowest[:, None]),
    )


def log_sum(exponent: Any, mask: Any) -> Any:
    return jnp.log(1 + jnp.sum(jnp.where(mask, jnp.exp(exponent), 0), axis=1))


def whole_loss(params: Any, model_state: Any, graphdef: Any, batch: Any, weights: Any) -> Any:
    """The weighted sum on one device, from equations on whole matrices, without our losses."""
    model = nnx.merge(graphdef, params["network"], model_state, copy=True)
    model.head.norm.axis_name = None
    x = model(batch.images, train=True)
    p = params["proxies"][: tiny.CLASSES]
    p = p / jnp.linalg.norm(p, axis=1, keepdims=True)
    y = jnp.asarray(batch.labels)
    same = y[:, None] == y[None, :]
    positive, negative = same & ~jnp.eye(len(y), dtype=bool), ~same
    s, t = x @ x.T, p[y] @ x.T  # the views of the anchor and of its proxy
    of_sample = mined(s, positive, negative, jnp.min(jnp.where(positive, s, jnp.inf), axis=1), 0.1)
    of_proxy = mined(t, positive, negative, jnp.min(jnp.where(same, t, jnp.inf), axis=1), 0.1)
    kept = [a | b for a, b in zip(of_sample, of_proxy, strict=True)]
    pair = log_sum(-2 * (s - 0.5), kept[0]) / 2 + log_sum(40 * (s - 0.5), kept[1]) / 40

    r, q = p @ x.T, p @ p.T
    own = jnp.arange(tiny.CLASSES)[:, None] == y[None, :]
    anchors = own.astype(x.dtype)
    chosen = own & ((anchors @ kept[0] > 0) | (own & jnp.any(kept[0] | kept[1], axis=1)[None, :]))
    against = ~own & (anchors @ kept[1] > 0)
    attraction, present = log_sum(-32 * (r - 0.1), chosen), jnp.any(chosen, axis=1)
    repulsion = log_sum(32 * (r + 0.1), against)
    proxy = jnp.sum(attraction) / jnp.sum(present) + jnp.mean(repulsion)

    separation = log_sum(32 * (q - 0.1), ~jnp.eye(tiny.CLASSES, dtype=bool)) / 32
    losses = (jnp.mean(pair), proxy, jnp.mean(separation))
    return sum(w * value for w, value in zip(weights, losses, strict=True))


@pytest.mark.parametrize("devices", [1, 8])
def test_gradient_is_that_of_the_weighted_sum(devices: int) -> None:
    with jax.enable_x64(True):
        weights = (1.0, 0.2, 0.05)
        step, state, place, graphdef = tiny.make(
            devices,
            dtype=jnp.float64,
            rows=weighted(weights),
            combination="fixed",
            optimizer=optax.sgd(1.0),
        )
        batch = tiny.batch(0)
        params, _ = real(state.params, {})
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


@pytest.mark.parametrize(
    ("dtype", "tolerance", "sizes"),
    [
        ("float32", 1e-5, ()),
        ("float64", 1e-9, ()),
        pytest.param("float64", 1e-9, (2, 4, 6), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_equal_one(dtype: str, tolerance: float, sizes: tuple[int, ...]) -> None:
    with jax.enable_x64(dtype == "float64"):
        results = []
        for devices in (1, 8):
            step, state, place, _ = tiny.make(
                devices, dtype=jnp.dtype(dtype), optimizer=optax.sgd(1.0), matryoshka=sizes
            )
            results.append(gradients_of(step, state, place(tiny.batch(0))))
        (one, scalars), (eight, scalars_eight) = results
        np.testing.assert_allclose(scalars["loss"], scalars_eight["loss"], rtol=tolerance)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)


@pytest.mark.parametrize("devices", [2, 3, 4, 5, 8])
@pytest.mark.slow
def test_twenty_steps_on_any_number_of_devices(devices: int) -> None:
    """Pair, proxy, separation, learned weights and memory: parameters equal to 1e-9."""
    size = {3: 24, 5: 20}.get(devices, 32)
    with jax.enable_x64(True):
        finals = []
        for count in (1, devices):
            rows = tiny.objectives(memory=True)
            step, state, place, _ = tiny.make(count, dtype=jnp.float64, rows=rows, memory_size=100)
            start = real(state.params, state.objective.memory)
            for index in range(20):
                state, _ = step(state, place(tiny.batch(index, size=size)))
            finals.append((*real(state.params, state.objective.memory), state.model_state))
        for a, b in zip(jax.tree.leaves(finals[0]), jax.tree.leaves(finals[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        for a, b in zip(jax.tree.leaves(start[0]), jax.tree.leaves(finals[1][0]), strict=True):
            assert not np.allclose(a, b)  # it really trained, the contribution weights too


def real(params: Any, memory: Any) -> tuple[Any, Any]:
    """Without the rows that are padding, of 10 classes and 100 slots."""
    memory = {name: x[:100] if x.ndim else x for name, x in memory.items()}
    params = {**params, "proxies": params["proxies"][: tiny.CLASSES]}
    return jax.device_get((params, memory))


def weighted(weights: Any) -> dict[str, Any]:
    rows = tiny.objectives()
    return {
        name: dataclasses.replace(row, weight=weight)
        for (name, row), weight in zip(rows.items(), weights, strict=True)
    }


def softmax(count: int, **row: Any) -> dict[str, Any]:
    """Pair and sub-center ArcFace on sampled classes, with margins by class size that rise."""
    margin = {"margin_rise": "4 steps", "margin_schedule": "cosine", "least_margin": 0.1, **row}
    hyper = {"scale": 8.0, "margin": 0.5}
    proxy = Objective("subcenter_arcface", hyper, weight=0.1, sampled_proxies=2 * count, **margin)
    return {"pair": tiny.objectives()["pair"], "softmax": proxy}


SOFTMAX = {
    "centers": 2,
    "class_sizes": np.array([1, 9, 9, 30, 2, 50, 4, 7, 7, 300]),
    "combination": "fixed",
}


@pytest.mark.parametrize("row_block", [0, 3])
@pytest.mark.parametrize("count", [0, 3, tiny.CLASSES])
def test_softmax_on_sampled_classes_is_the_same_on_eight_devices(
    count: int, row_block: int
) -> None:
    """Sub-centres, margins that differ and rise, three steps; all classes drawn is all classes."""
    with jax.enable_x64(True):
        finals, losses = [], []
        for devices, drawn in ((1, count % tiny.CLASSES), (8, count)):
            step, state, place, _ = tiny.make(
                devices,
                dtype=jnp.float64,
                rows=softmax(drawn),
                optimizer=optax.sgd(0.1),
                row_block=row_block,
                **SOFTMAX,
            )
            for index in range(3):
                state, scalars = step(state, place(tiny.batch(index)))
                losses.append(float(scalars["loss/softmax"]))
            finals.append({**state.params, "proxies": state.params["proxies"][:20]})
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-9)
    for a, b in zip(jax.tree.leaves(finals[0]), jax.tree.leaves(finals[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_softmax_on_sampled_classes_gathers_no_proxies() -> None:
    """Collectives of a step on eight devices have no part that grows with the classes."""
    found = []
    for sizes in (SOFTMAX["class_sizes"], np.arange(1, 801)):
        rows = {"softmax": softmax(3)["softmax"]}
        options = {**SOFTMAX, "class_sizes": sizes, "classes": len(sizes)}
        step, state, place, _ = tiny.make(8, rows=rows, **options)
        program = step.lower(state, place(tiny.batch(0))).compile()
        found.append({name: one.bytes for name, one in collectives(program.as_text()).items()})
    assert found[0] == found[1]
    assert found[0].keys() == {"all-gather", "all-reduce"}
    assert found[0]["all-gather"] == 32 * 5  # labels and validity
    assert found[0]["all-reduce"] > 2 * 2 * (32 + 3) * 4 * tiny.SIZE  # proxies, and back


def sampled(count: int) -> dict[str, Any]:
    rows = tiny.objectives()
    row = dataclasses.replace(rows["separation"], sampled_proxies=count)
    return {**rows, "separation": row}


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
            finals.append(real(state.params, {}))
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


def test_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(similarity: Any, masks: Any) -> Any:
        calls.append(1)
        return pair.multi_similarity_loss(similarity, masks)

    monkeypatch.setitem(registry.LOSSES, "counted", ("sample_to_sample", counted))
    rows = tiny.objectives()
    rows["pair"] = dataclasses.replace(rows["pair"], loss="counted")
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
        step, state, place, _ = tiny.make(2, rows=rows, memory_size=size, optimizer=optax.sgd(0.0))
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


def test_average_of_the_weights_is_that_of_a_slow_loop() -> None:
    """Weights and statistics after each of 12 steps, averaged in NumPy, on one device and eight."""
    decay, finals = 0.5, []
    with jax.enable_x64(True):
        for devices in (1, 8):
            step, state, place, _ = tiny.make(devices, dtype=jnp.float64, ema_decay=decay)
            expected = jax.device_get({"network": state.params["network"], **statistics(state)})
            for t in range(12):
                state, _ = step(state, place(tiny.batch(t)))
                kept = min(decay, (1 + t) / (10 + t))  # reaches the decay at t = 8
                new = jax.device_get({"network": state.params["network"], **statistics(state)})
                expected = jax.tree.map(lambda a, b: kept * a + (1 - kept) * b, expected, new)  # noqa: B023
            got = jax.device_get(state.average)
            assert jax.tree.structure(got) == jax.tree.structure(expected)
            for a, b, c in zip(*map(jax.tree.leaves, (got, expected, new)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
                assert np.linalg.norm(a - c) > 1e-4 * np.linalg.norm(c)  # not the last weights
            finals.append(got)
    for a, b in zip(*map(jax.tree.leaves, finals), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def statistics(state: Any) -> dict[str, Any]:
    return {"model_state": state.model_state}


def test_an_average_changes_nothing_else() -> None:
    """The training is the same bit for bit; without a decay the state has no copy."""
    states = []
    for decay in (0.0, 0.9):
        step, state, place, _ = tiny.make(2, ema_decay=decay)
        for index in range(3):
            state, _ = step(state, place(tiny.batch(index)))
        states.append(jax.device_get(state))
    assert states[0].average == ()
    for a, b in zip(
        *map(jax.tree.leaves, (states[0], states[1]._replace(average=()))), strict=True
    ):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)


def test_what_stays_equal_keeps_its_average_and_counters_are_replaced() -> None:
    old = {"frozen": jnp.full(3, 0.1), "count": jnp.array(3)}
    new = {"frozen": jnp.full(3, 0.1), "count": jnp.array(4)}
    got = move_average(old, new, step=jnp.array(1), decay=0.9999)
    np.testing.assert_array_equal(got["frozen"], old["frozen"])
    assert int(got["count"]) == 4

"""Softmax losses over the batch's classes and some drawn ones (Partial FC)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

import mmljax
from mmljax.errors import UserError
from mmljax.losses.collectives import sample_classes
from objective_blocks import check_slope, quick_jit

CLASSES = 11
LABELS = np.array([9, 2, 9, 0, 0, 2, 7])
LOSSES = {
    "cosface": ({"scale": 8.0, "margin": 0.3}, 1),
    "arcface": ({"scale": 8.0, "margin": 0.4}, 1),
    "normalized_softmax": ({"temperature": 0.2}, 1),
    "proxy_nca_pp": ({"temperature": 0.3}, 1),
    "subcenter_arcface": ({"scale": 8.0, "margin": 0.4}, 3),
    "soft_triple": ({"scale": 8.0, "margin": 0.1}, 2),
}


@pytest.mark.parametrize("count", [1, 4, 11])
def test_classes_of_the_batch_and_drawn_ones_are_valid_once(count: int) -> None:
    """Padded rows add no class; over many keys every other class is drawn about as often."""
    exists = np.array([True] * 6 + [False])  # class 7 is padding alone
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = jax.vmap(lambda key: sample_classes(key, LABELS, exists, count=count, of=CLASSES))(keys)
    times = np.zeros(CLASSES)
    for classes, valid in zip(*map(np.asarray, draws), strict=True):
        assert classes.shape == valid.shape == (len(LABELS) + count,)
        chosen = classes[valid].tolist()
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) >= {0, 2, 9}
        assert len(chosen) <= 3 + count
        assert set(chosen) == {0, 2, 9} | set(classes[len(LABELS) :].tolist())
        times[chosen] += 1
    others = np.delete(times, [0, 2, 9]) / len(keys)
    assert others.min() >= 0.8 / -(-CLASSES // count)  # one of a range of this many, or one fewer
    assert others.max() <= 1.2 / (CLASSES // count)


def make(name: str, count: int, *, seed: int = 0) -> tuple[Any, Any, Any]:
    hyper, centers = LOSSES[name]
    objective = mmljax.MultiObjective(
        {"softmax": mmljax.Objective(name, hyper, sampled_proxies=count * centers)},
        classes=CLASSES,
        dimension=4,
        centers=centers,
        combination="fixed",
    )
    return objective, *objective.init(jax.random.key(seed), dtype=float)


def points(centers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    return {
        "embeddings": 3 * rng.normal(size=(len(LABELS), 4)),
        "proxies": 0.3 * rng.normal(size=(CLASSES * centers, 4)),
    }


def value_and_gradient(objective: Any, params: Any, state: Any, given: Any) -> Any:
    def loss(given: Any) -> Any:
        own = params | {"proxies": given["proxies"]}
        return objective(own, state, given["embeddings"], jnp.asarray(LABELS))[0]

    return jax.tree.map(np.asarray, quick_jit(jax.value_and_grad(loss))(given))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_sampled_classes(name: str) -> None:
    """Against a loop over these classes; proxies of others get no gradient."""
    hyper, centers = LOSSES[name]
    given = points(centers)
    with jax.enable_x64(True):
        objective, params, state = make(name, 4)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
        classes, valid = sample_classes(key, LABELS, np.ones(7, bool), count=4, of=CLASSES)
        chosen = np.asarray(classes)[np.asarray(valid)]
        value, gradient = value_and_gradient(objective, params, state, given)
    columns = (chosen[:, None] * centers + np.arange(centers)).ravel().tolist()

    def loop(given: dict[str, np.ndarray]) -> float:
        x, p = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in given.values())
        options = hyper | ({"centers": centers} if centers > 1 else {})
        values = []
        for row, label in zip(x, LABELS, strict=True):
            own = [j for j in columns if j // centers == label]
            others = [j for j in columns if j // centers != label]
            s = [float(row @ q) for q in p]
            values.append(getattr(loops, name)(s, own, others, None, **options))
        return sum(values) / len(values)

    assert 4 < len(chosen) < CLASSES
    check_slope(loop, given, value, gradient)
    seen = np.isin(np.arange(len(given["proxies"])), columns)
    assert gradient["proxies"][seen].any(axis=1).sum() > 4
    assert not gradient["proxies"][~seen].any()


@pytest.mark.parametrize("name", LOSSES)
def test_all_classes_drawn_is_the_whole_loss(name: str) -> None:
    given = points(LOSSES[name][1])
    with jax.enable_x64(True):
        every, drawn = (value_and_gradient(*make(name, n), given) for n in (0, CLASSES))
    np.testing.assert_allclose(drawn[0], every[0], rtol=1e-12)
    for side in given:
        np.testing.assert_allclose(drawn[1][side], every[1][side], rtol=1e-9, atol=1e-14)


def test_draws_follow_seed_and_step_alone() -> None:
    given = points(1)
    found = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        objective, params, state = make("cosface", 3, seed=seed)
        state = state._replace(step=jnp.asarray(step, jnp.int32))
        value, gradient = value_and_gradient(objective, params, state, given)
        found.append((float(value), *gradient["proxies"].ravel().tolist()))
    assert found[0] == found[1]
    assert len({row[0] for row in found}) == 3


@pytest.mark.parametrize(
    ("loss", "count", "centers", "message"),
    [
        ("multi_similarity", 2, 1, r"is for losses with proxies as columns, not for multi_simil"),
        ("proxy_anchor", 2, 1, r"is for losses with proxies as columns, not for proxy_anchor"),
        ("cosface", 12, 1, r"sampled_proxies=12 is above the number of proxies, 11"),
        ("soft_triple", 5, 2, r"whole classes of 2 proxies: set it to a multiple of --config.cent"),
    ],
)
def test_bad_numbers_are_refused(loss: str, count: int, centers: int, message: str) -> None:
    rows = {"one": mmljax.Objective(loss, sampled_proxies=count)}
    with pytest.raises(UserError, match=message):
        mmljax.MultiObjective(rows, classes=CLASSES, dimension=4, centers=centers)

"""Margins per class and margins that rise, against loops and in MultiObjective."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

import mmljax
from mmljax import losses
from mmljax.errors import UserError
from mmljax.losses.margins import dynamic_margins, margins_at
from mmljax.types import Margin
from objective_blocks import check_slope, quick_jit

SIZES = [3, 40, 7, 7, 300]
MARGINS = [0.1, 0.6, 0.35, 0.0, 0.2]
LABELS = np.array([0, 2, 0, 1, 1, 2, 3])  # class 4 has no sample
LOSSES = {
    "cosface": ({"scale": 8.0}, 1),
    "arcface": ({"scale": 8.0}, 1),
    "subcenter_arcface": ({"scale": 8.0}, 3),
    "soft_triple": ({"scale": 8.0}, 2),
}


def test_dynamic_margins_equal_the_loop() -> None:
    lengths = [1 / math.sqrt(math.sqrt(n)) for n in SIZES]
    expected = [
        0.1 + 0.4 * (length - min(lengths)) / (max(lengths) - min(lengths)) for length in lengths
    ]
    found = dynamic_margins(SIZES, least=0.1, most=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] == 0.5  # the smallest class
    assert found[4] == pytest.approx(0.1)  # the largest
    assert found[2] == found[3]


def test_classes_of_one_size_have_the_greatest_margin() -> None:
    np.testing.assert_array_equal(dynamic_margins([6, 6], least=0.1, most=0.3), [0.3, 0.3])


@pytest.mark.parametrize("sizes", [[], [3, 0], [[3, 4]], [3, -1]])
def test_bad_sizes_are_refused(sizes: Any) -> None:
    with pytest.raises(UserError, match="class_sizes must be the number of training images"):
        dynamic_margins(sizes)


def test_a_least_margin_above_the_greatest_is_refused() -> None:
    with pytest.raises(UserError, match=r"the least margin, 0\.6, is above the greatest, 0\.5"):
        dynamic_margins(SIZES, least=0.6)


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        ("linear", {0: 0, 1: 0.1, 5: 0.5, 10: 1, 11: 1, 2**30: 1}),
        ("cosine", {0: 0, 1: math.sin(math.pi / 20) ** 2, 5: 0.5, 10: 1, 11: 1}),
    ],
)
def test_margins_rise_to_their_value(schedule: str, parts: dict[int, float]) -> None:
    for value in (0.4, np.array([0.4, 0.1])):
        margin = Margin(value, rise=10, schedule=schedule)
        for step, part in parts.items():
            got = jax.jit(lambda step, margin=margin: margins_at(margin, step))(step)
            np.testing.assert_allclose(got, part * np.asarray(value), rtol=1e-6, atol=1e-8)


def points(centers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    return {
        "embeddings": 3 * rng.normal(size=(len(LABELS), 4)),
        "proxies": 0.3 * rng.normal(size=(len(SIZES) * centers, 4)),
    }


def loop_mean(name: str, given: dict[str, np.ndarray], margins: Any, centers: int) -> float:
    """The mean over samples of the loop, each with the margin of its class."""
    x, p = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in given.values())
    values = []
    for row, label in zip(x, LABELS, strict=True):
        own = range(label * centers, (label + 1) * centers)
        others = [j for j in range(len(p)) if j not in own]
        options = {**LOSSES[name][0], "margin": margins[label]}
        options |= {"centers": centers} if centers > 1 else {}
        loop = getattr(loops, name)
        values.append(loop([float(row @ q) for q in p], list(own), others, None, **options))
    return sum(values) / len(values)


@pytest.mark.parametrize("name", LOSSES)
def test_public_losses_with_a_margin_per_class_equal_the_loop(name: str) -> None:
    hyper, centers = LOSSES[name]
    given = points(centers)
    options = {**hyper, "margin": np.array(MARGINS)} | ({"centers": centers} if centers > 1 else {})
    with jax.enable_x64(True):

        def loss(given: Any) -> Any:
            return getattr(losses, name)(given["embeddings"], LABELS, given["proxies"], **options)

        value, gradient = jax.tree.map(np.asarray, quick_jit(jax.value_and_grad(loss))(given))
    check_slope(lambda given: loop_mean(name, given, MARGINS, centers), given, value, gradient)


@pytest.mark.parametrize(
    ("loss", "margin", "words"),
    [
        (losses.arcface, [0.1, 0.2], r"margin must be a number, or 5 of them, found \(2,\)"),
        (losses.proxy_anchor, MARGINS, r"margin must be a number, found \(5,\)"),
    ],
)
def test_margins_that_fit_no_classes_are_refused(loss: Any, margin: Any, words: str) -> None:
    given = points(1)
    with pytest.raises(UserError, match=words):
        loss(given["embeddings"], LABELS, given["proxies"], margin=np.array(margin))


def make(name: str, *, devices: int = 1, **row: Any) -> mmljax.MultiObjective:
    hyper, centers = LOSSES[name]
    return mmljax.MultiObjective(
        {"softmax": mmljax.Objective(name, {**hyper, "margin": 0.5}, **row)},
        classes=len(SIZES),
        dimension=4,
        centers=centers,
        combination="fixed",
        class_sizes=np.array(SIZES),
        multiple_of=devices,
    )


@pytest.mark.parametrize("row_block", [0, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_objective_takes_class_margins_that_rise(name: str, row_block: int) -> None:
    """At step 3 of a rise over 8 steps, against the loop."""
    objective = make(name, margin_rise="8 steps", margin_schedule="cosine", least_margin=0.1)
    objective.row_block = row_block
    centers = LOSSES[name][1]
    given = points(centers)
    part = math.sin(math.pi * 3 / 16) ** 2
    margins = [part * m for m in dynamic_margins(SIZES, least=0.1, most=0.5)]
    with jax.enable_x64(True):
        params, state = objective.init(jax.random.key(0), dtype=jnp.float64)
        state = state._replace(step=jnp.asarray(3, jnp.int32))

        def loss(given: Any) -> Any:
            own = params | {"proxies": given["proxies"]}
            return objective(own, state, given["embeddings"], jnp.asarray(LABELS))[0]

        value, gradient = jax.tree.map(np.asarray, quick_jit(jax.value_and_grad(loss))(given))
    check_slope(lambda given: loop_mean(name, given, margins, centers), given, value, gradient)


def test_a_margin_that_has_risen_is_the_bound_one() -> None:
    embeddings, labels = jnp.asarray(points(1)["embeddings"], jnp.float32), jnp.asarray(LABELS)
    found = []
    for row in ({}, {"margin_rise": "8 steps"}):
        objective = make("arcface", **row)
        params, state = objective.init(jax.random.key(0))
        loss = quick_jit(objective)
        for step in (8, 100, 0):
            at = state._replace(step=jnp.asarray(step, jnp.int32))
            found.append(loss(params, at, embeddings, labels)[0])
    plain, risen = found[:3], found[3:]
    np.testing.assert_array_equal(risen[:2], plain[:2])
    assert risen[2] < plain[2]  # no margin at step 0


@pytest.mark.parametrize(
    ("loss", "row", "options", "message"),
    [
        ("arcface", {"margin_schedule": "linaer"}, {}, r"margin_schedule='linaer' is.*'linear'"),
        ("arcface", {"margin_rise": "1 epochs"}, {}, r"margin_rise='1 epochs' must be in steps"),
        ("arcface", {"margin_rise": "steps"}, {}, r"margin_rise='steps' is no duration"),
        ("arcface", {"params": {"margin": "x"}}, {}, r"margin must be of type float, found 'x'"),
        ("proxy_anchor", {"margin_rise": "9 steps"}, {}, r"softmax losses with a margin, which p"),
        ("normalized_softmax", {"least_margin": 0.1}, {}, r"which normalized_softmax is not"),
        ("arcface", {"least_margin": 0.3}, {}, r"least_margin=0.3 is above .* class, 0.25: lower"),
        ("arcface", {"least_margin": 0.1}, {"class_sizes": None}, r"needs class_sizes, .* None"),
        ("arcface", {"least_margin": 0.1}, {"class_sizes": np.ones(4)}, r"of the 5 classes, found"),
    ],
)
def test_bad_margins_are_refused(loss: str, row: Any, options: Any, message: str) -> None:
    rows = {"softmax": mmljax.Objective(loss, **row)}
    options = {"class_sizes": np.array(SIZES), **options}
    with pytest.raises(UserError, match=message):
        mmljax.MultiObjective(rows, classes=5, dimension=4, **options)

"""Micro batches: the step is that of the whole batch, and holds fewer activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import tiny
from mmljax.config import ModelConfig, load_config
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.models.embedder import Embedder
from mmljax.training.trainer import make_trainer

CONVOLUTIONS = ModelConfig(
    backbone="small",
    width=4,
    embedding_size=tiny.SIZE,
    pooling="gem",
    batch_norm="frozen",
    compute_dtype="float64",
    drop_path=0.5,
    dropout=0.3,
)
TOKENS = dataclasses.replace(
    CONVOLUTIONS, backbone="vit_s16", width=1, pooling="token", batch_norm="global"
)
PREFIXES = dataclasses.replace(CONVOLUTIONS, matryoshka=(2, tiny.SIZE))
CONVOLUTIONS_32 = dataclasses.replace(CONVOLUTIONS, compute_dtype="float32")


def make(config: ModelConfig, *, devices: int, parts: int, size: int, count: int = 32) -> Any:
    """The step, the state and a batch."""

    def shorten(model: Embedder) -> None:
        if config.backbone == "vit_s16":
            model.backbone.blocks = model.backbone.blocks[8:11]

    step, state, place = tiny.make_embedder_step(
        config, devices=devices, micro_batches=parts, change=shorten
    )
    return step, state, place(tiny.image_batch(0, pixels=size, size=count))


def stepped(*arguments: Any, **options: Any) -> Any:
    """The change of all parameters, the rest of the state and the ledger."""
    step, state, batch = make(*arguments, **options)
    before = jax.device_get(state.params)
    after, scalars = step(state, batch)
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after.params, before)
    return change, jax.device_get((after.model_state, after.objective.step)), scalars


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "devices", "parts"),
    [
        (CONVOLUTIONS, 1, 8),
        (PREFIXES, 8, 2),
        (TOKENS, 2, 4),
    ],
    ids=["convolutions", "prefixes on 8 devices", "tokens on 2 devices"],
)
def test_step_is_that_of_the_whole_batch(config: ModelConfig, devices: int, parts: int) -> None:
    """With dropped features and branches, mining and learned weights, on several devices."""
    size = 32 if config is TOKENS else 12
    with jax.enable_x64(True):
        whole, state, scalars = stepped(config, devices=devices, parts=1, size=size)
        found, found_state, found_scalars = stepped(config, devices=devices, parts=parts, size=size)
    for (path, a), b in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        assert np.linalg.norm(a) > 0, name
        assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(a), name
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found_state), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in scalars.items():
        np.testing.assert_allclose(found_scalars[name], value, rtol=1e-6, err_msg=name)


def temporary_bytes(parts: int) -> int:
    """What the compiled step holds besides its arguments and results."""
    step, state, batch = make(CONVOLUTIONS_32, devices=1, parts=parts, size=40, count=64)
    return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_falls() -> None:
    whole, eighths = temporary_bytes(1), temporary_bytes(8)
    assert eighths < whole / 3


def primitives(jaxpr: Any, *, looped: bool = False) -> Iterator[str]:
    """Names of what is computed within loops, at any depth."""
    for equation in jaxpr.eqns:
        if looped:
            yield equation.primitive.name
        inside = looped or equation.primitive.name == "scan"
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner, looped=inside)


def test_gradients_are_summed_over_the_devices_after_the_loop() -> None:
    step, state, batch = make(CONVOLUTIONS_32, devices=2, parts=4, size=12)
    found = set(primitives(jax.make_jaxpr(step)(state, batch).jaxpr))
    assert "dot_general" in found or "conv_general_dilated" in found
    assert not [name for name in found if "psum" in name or "gather_" in name]


def trainer(*overrides: str) -> Any:
    config = load_config("quickstart", ["model.backbone=small", "model.width=4", *overrides])
    return make_trainer(config, classes=8, channels=3, train_examples=80, mesh=make_mesh())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.batch_size=32", "model.batch_norm=global"],
            "micro_batches=2 would give BatchNorm the statistics of a part of the batch; set "
            "--config.model.batch_norm=frozen, or",
        ),
        (
            ["data.batch_size=32", "model.batch_norm=frozen", "model.head_norm=batch"],
            "set --config.model.head_norm=layer, or --config.data.micro_batches=1",
        ),
        (
            ["data.batch_size=24", "model.batch_norm=frozen"],
            "does not divide --config.data.batch_size=24 on 8 devices; use a batch size that is a "
            "multiple of 16",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        trainer("data.micro_batches=2", *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_networks_without_batch_norm_need_no_frozen_one() -> None:
    assert trainer(
        "data.micro_batches=2",
        "data.batch_size=32",
        "model.backbone=vit_s16",
        "model.width=1",
        "model.pooling=token",
    ).step

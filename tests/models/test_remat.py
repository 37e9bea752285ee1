"""Rematerialisation: the step is the same, holds fewer activations, and has no more collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding

import tiny
from mmljax.config import ModelConfig, load_config
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.models import efficientnet
from mmljax.models.architectures import ARCHITECTURES
from mmljax.models.backbones import BACKBONES
from mmljax.models.efficientnet import STAGES, EfficientNetLite
from mmljax.models.embedder import make_embedder
from mmljax.models.remat import REMATS
from mmljax.models.resnet import BasicBlock, Bottleneck, ResNet, Stem
from mmljax.models.vit import VisionTransformer
from mmljax.planning import chips

FINE = Stem(kernel=3, stride=2, max_pool=False)
NETWORKS = {
    "basic": partial(ResNet, BasicBlock, (1, 2), stem=FINE),
    "bottleneck": partial(ResNet, Bottleneck, (2, 1), stem=FINE),
    "inverted": partial(EfficientNetLite, 1.0, 1.0),
    "transformer": lambda width, **options: VisionTransformer(
        dataclasses.replace(ARCHITECTURES["vit_s16"], depth=2, heads=2).of_width(width), **options
    ),
    "deep": partial(ResNet, BasicBlock, (12,), stem=FINE),
}
CONFIG = ModelConfig(
    width=4,
    embedding_size=tiny.SIZE,
    pooling="average",
    compute_dtype="float64",
    drop_path=0.5,
    dropout=0.3,
)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks of each kind of block."""
    monkeypatch.setattr(
        efficientnet, "STAGES", (STAGES[0], STAGES[1], STAGES[4]._replace(blocks=2))
    )
    for name, build in NETWORKS.items():
        monkeypatch.setitem(BACKBONES, name, build)


def stepped(config: ModelConfig, *, devices: int) -> Any:
    """The change of all parameters, and the statistics after the step."""
    step, state, place = tiny.make_embedder_step(config, devices=devices)
    before = jax.device_get((state.params, state.model_state))
    after, _ = step(state, place(tiny.image_batch(0, pixels=16)))
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, after.params, before[0])
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, after.model_state, before[1])
    return change, moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "batch_norm", "devices"),
    [
        ("basic", "global", 2),
        ("basic", "frozen", 1),
        ("bottleneck", "global", 1),
        ("inverted", "global", 2),
        ("transformer", "global", 2),
    ],
)
def test_gradients_and_statistics_are_the_same(
    networks: None, network: str, batch_norm: str, devices: int
) -> None:
    """With dropped branches and features; statistics move once."""
    config = dataclasses.replace(CONFIG, backbone=network, batch_norm=batch_norm)
    with jax.enable_x64(True):
        expected, moved = stepped(config, devices=devices)
        for remat in ("blocks", "full"):
            found, found_moved = stepped(dataclasses.replace(config, remat=remat), devices=devices)
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            for (path, a), b in zip(
                jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
            ):
                name = jax.tree_util.keystr(path)
                assert np.linalg.norm(a) > 0, name
                assert np.linalg.norm(a - b) <= 1e-9 * np.linalg.norm(a), name
            for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(found_moved), strict=True):
                assert (np.linalg.norm(a) > 0) == (batch_norm == "global")
                np.testing.assert_allclose(b, a, rtol=1e-9)


DEEP = dataclasses.replace(
    CONFIG, backbone="deep", compute_dtype="float32", batch_norm="frozen", drop_path=0.0
)


def kept_bytes(remat: str) -> int:
    """What the forward pass of 8 images keeps for the backward pass, parameters included."""
    model = make_embedder(dataclasses.replace(DEEP, remat=remat), channels=3, rngs=nnx.Rngs(0))
    graphdef, network, rest = nnx.split(model, nnx.Param, ...)
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)

    def pullback(network: Any, images: Any) -> Any:
        return jax.vjp(
            lambda p: nnx.merge(graphdef, p, rest, copy=True)(images, train=True), network
        )[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, network, images))
    return sum(x.size * x.dtype.itemsize for x in kept)


def test_blocks_keep_their_inputs_and_full_keeps_the_images(networks: None) -> None:
    none, blocks, full = (kept_bytes(remat) for remat in REMATS)
    assert full < blocks < 0.5 * none
    maps = 12 * 8 * 16 * 16 * 4 * 4  # the inputs of 12 blocks: 8 maps of 16 x 16 x 4
    assert maps <= blocks < 2 * maps
    assert full < maps / 2


@pytest.mark.slow
def test_a_step_compiled_for_tpus_takes_less_memory(networks: None) -> None:
    """On CPU XLA merges the second computation with the first, so memory does not fall there."""
    pytest.importorskip("libtpu", reason="needs libtpu, which compiles for TPUs: jax[tpu]")
    mesh, sizes = make_mesh(chips.tpu_target("v5e:2x2").devices), []
    for remat in ("none", "blocks"):
        config = dataclasses.replace(DEEP, remat=remat)
        step, state, place = tiny.make_embedder_step(config, devices=4, compile_for=mesh)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
            ),
            (state, place(tiny.image_batch(0, pixels=64))),
        )
        compiled = step.lower(*shapes).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.7 * sizes[0], sizes


def primitives(jaxpr: Any) -> Iterator[str]:
    """Names of what is computed, at any depth."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def test_nothing_is_summed_over_the_devices_again(networks: None) -> None:
    counts = []
    for remat in ("none", "blocks", "full"):
        config = dataclasses.replace(CONFIG, backbone="basic", compute_dtype="float32", remat=remat)
        step, state, place = tiny.make_embedder_step(config, devices=2)
        batch = place(tiny.image_batch(0, pixels=16))
        found = list(primitives(jax.make_jaxpr(step)(state, batch).jaxpr))
        counts.append(sum("psum" in name for name in found))
        assert ("remat2" in found or "checkpoint" in found) == (remat != "none")
    assert counts[0] == counts[1] == counts[2] > 20


def test_unknown_remat() -> None:
    config = dataclasses.replace(load_config("quickstart").model, remat="block")
    with pytest.raises(UserError, match="config.model.remat='block' is unknown.*'blocks'"):
        make_embedder(config, channels=3, rngs=nnx.Rngs(0))

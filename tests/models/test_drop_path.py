"""Stochastic depth: rates by depth, branches against loops, the same on any number of devices."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from mmljax.config import ModelConfig, load_config
from mmljax.errors import UserError
from mmljax.models.backbones import make_backbone
from mmljax.models.conv_norm import conv_norm
from mmljax.models.drop_path import ResidualBlock
from mmljax.models.efficientnet import InvertedBottleneck
from mmljax.models.embedder import make_embedder
from mmljax.models.resnet import BasicBlock, Bottleneck
from mmljax.models.vit import Architecture, Block

RATE = 0.4


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 8), ("resnet50", 16), ("vit_s16", 12), ("efficientnet_lite0", 16)],
)
def test_rates_rise_linearly_to_that_of_the_last_block(name: str, count: int) -> None:
    build = partial(make_backbone, name, width=8, channels=3, dtype=jnp.float32)
    network = nnx.eval_shape(lambda: build(rngs=tiny.rngs(), drop_path=0.24))
    assert [block.number for block in network.blocks] == list(range(1, count + 1))
    found = [block.drop_rate for block in network.blocks]
    np.testing.assert_allclose(found, np.linspace(0, 0.24, count + 1)[1:])
    plain = nnx.eval_shape(lambda: build(rngs=tiny.rngs()))
    assert {block.drop_rate for block in plain.blocks} == {0.0}


def kept(keys: Any, place: int, *, number: int = 3, rate: float = RATE) -> list[bool]:
    """Which examples keep a branch, one after the other."""
    stream = 2 * number + place
    return [bool(jax.random.bernoulli(jax.random.fold_in(key, stream), 1 - rate)) for key in keys]


def with_rate(block: Any) -> Any:
    block.number, block.drop_rate = 3, RATE
    return block


def test_a_branch_against_a_loop() -> None:
    block, keys = with_rate(ResidualBlock()), jax.random.split(jax.random.key(1), 400)
    x = np.random.default_rng(0).normal(size=(400, 2, 3)).astype(np.float32)
    found = [np.asarray(block.drop(jnp.asarray(x), keys, place=i)) for i in (0, 1)]
    for i, result in enumerate(found):
        masks = kept(keys, i)
        assert np.mean(masks) == pytest.approx(0.6, abs=0.08)
        for image, mask, y in zip(x, masks, result, strict=True):
            np.testing.assert_allclose(y, image / 0.6 if mask else 0 * image, rtol=1e-6)
    assert kept(keys, 0) != kept(keys, 1)
    assert kept(keys, 0) != kept(keys, 0, number=4)
    np.testing.assert_array_equal(block.drop(jnp.asarray(x), None), x)
    gradient = jax.grad(lambda x: jnp.sum(block.drop(x, keys) ** 2))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, 2 * found[0] / 0.6, rtol=1e-5)


KIND: dict[str, Any] = {"dtype": jnp.float32, "rngs": tiny.rngs()}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_blocks_of_resnets_keep_their_shortcut(kind: Any, stride: int) -> None:
    block = with_rate(kind(8 if kind is Bottleneck else 4, 4, stride=stride, **KIND))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5, 6, block.conv1.in_features)))
    keys = jax.random.split(jax.random.key(2), 12)
    layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    layers += [(block.conv3, block.bn3)] if kind is Bottleneck else []
    y = x
    for i, (conv, norm) in enumerate(layers):
        y = conv_norm(conv, norm, y, train=False)
        y = nnx.relu(y) if i + 1 < len(layers) else y
    skip = conv_norm(*block.downsample, x, train=False) if block.downsample else x
    expected = [
        np.maximum(np.asarray(s) + (np.asarray(b) / (1 - RATE) if mask else 0), 0)
        for s, b, mask in zip(skip, y, kept(keys, 0), strict=True)
    ]
    assert 3 < sum(kept(keys, 0)) < 12
    np.testing.assert_allclose(block(x, train=False, keys=keys), expected, atol=1e-5)


def test_blocks_of_efficientnet_and_vit() -> None:
    keys = jax.random.split(jax.random.key(3), 12)
    shape = {"kernel": 3, "stride": 1, "expansion": 2}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4, 5, 6)), jnp.float32)
    block = with_rate(InvertedBottleneck(6, 6, **shape, **KIND))
    branch = block(x, train=False) - x
    masks = np.array(kept(keys, 0))[:, None, None, None]
    expected = x + np.where(masks, branch / (1 - RATE), 0)
    np.testing.assert_allclose(block(x, train=False, keys=keys), expected, atol=1e-5)
    other = with_rate(InvertedBottleneck(6, 7, **shape, **KIND))  # adds nothing to its input
    np.testing.assert_array_equal(other(x, train=False, keys=keys), other(x, train=False))

    tokens = x.reshape(12, -1, 6)
    layer = with_rate(Block(Architecture(1, 2, 3, 24, patch_size=16, grid_size=14), **KIND))
    first, second = (np.array(kept(keys, i))[:, None, None] for i in (0, 1))
    middle = tokens + np.where(first, layer.attn(layer.norm1(tokens)) / (1 - RATE), 0)
    expected = middle + np.where(second, layer.mlp(layer.norm2(middle)) / (1 - RATE), 0)
    np.testing.assert_allclose(layer(tokens, keys=keys), expected, atol=1e-5)


CONFIG = ModelConfig(
    backbone="small",
    width=4,
    embedding_size=tiny.SIZE,
    batch_norm="frozen",
    compute_dtype="float64",
    drop_path=0.6,
    dropout=0.3,
)


@pytest.mark.slow
def test_only_training_with_keys_drops() -> None:
    with jax.enable_x64(True):
        model = make_embedder(CONFIG, channels=3, rngs=tiny.rngs())
        plain = make_embedder(
            dataclasses.replace(CONFIG, drop_path=0.0), channels=3, rngs=tiny.rngs()
        )
        x, keys = (
            jnp.asarray(tiny.image_batch(0, pixels=12, size=16).images),
            jax.random.split(jax.random.key(0), 16),
        )
        expected = np.asarray(plain(x, train=False))
        np.testing.assert_array_equal(model(x, train=False, keys=keys), expected)
        np.testing.assert_array_equal(model(x, train=True), expected)
        dropped = model(x, train=True, keys=keys)
        assert np.abs(dropped - plain(x, train=True, keys=keys)).max() > 1e-2
        assert np.abs(model(x, train=True, keys=keys[::-1]) - dropped).max() > 1e-2
        half = model(x[8:], train=True, keys=keys[8:])  # an example's result is its own
        np.testing.assert_allclose(half, dropped[8:], rtol=1e-9, atol=1e-12)


def plain(state: Any) -> list[np.ndarray]:
    state = state._replace(objective=state.objective._replace(key=0))
    return [np.asarray(x) for x in jax.tree.leaves(state)]


@pytest.mark.slow
def test_eight_devices_equal_one_at_every_step() -> None:
    with jax.enable_x64(True):
        one, state, put = tiny.make_embedder_step(CONFIG, devices=1, rate=0.1)
        eight, other, put_eight = tiny.make_embedder_step(CONFIG, devices=8, rate=0.1)
        layout = jax.tree.map(lambda x: x.sharding, other)
        for index in range(3):
            batch = tiny.image_batch(index, pixels=12, size=16)
            other, _ = eight(
                jax.device_put(jax.tree.map(jnp.copy, state), layout), put_eight(batch)
            )
            state, _ = one(state, put(batch))
            for a, b in zip(plain(state), plain(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_rates_out_of_range() -> None:
    with pytest.raises(UserError, match=r"model.drop_path must be at least 0 and at most 0.999"):
        load_config("quickstart", ["model.drop_path=1"])

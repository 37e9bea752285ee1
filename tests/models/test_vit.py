"""The ViT against a slow one in NumPy, its position embeddings against torch, its run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models import CONFIG, assert_trees_close, rngs, run

from mmljax.errors import UserError
from mmljax.models.backbones import make_backbone
from mmljax.models.embedder import Head, make_embedder
from mmljax.models.vit import GRID, VisionTransformer, resample_positions

HEADS = 2


def vit(*, depth: int = 2, width: int = 3, dtype: Any = jnp.float32) -> VisionTransformer:
    """A small one whose every parameter matters."""
    model = VisionTransformer(depth, HEADS, width=width, channels=3, dtype=dtype, rngs=rngs())
    random = np.random.default_rng(0)
    kind = jnp.promote_types(dtype, jnp.float32)
    nnx.update(
        model,
        jax.tree.map(
            lambda x: jnp.asarray(x + 0.3 * random.normal(size=x.shape), kind), nnx.state(model)
        ),
    )
    return model


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape)


@pytest.mark.parametrize(
    ("name", "count", "features"),
    [  # timm's counts, less the classifier of 1000 classes
        ("vit_s16", 22_050_664 - 385_000, 384),
        ("vit_b16", 86_567_656 - 769_000, 768),
    ],
)
def test_number_of_parameters_is_the_published_one(name: str, count: int, features: int) -> None:
    def build() -> Any:
        return make_backbone(name, width=64, channels=3, dtype=jnp.float32, rngs=rngs())

    model = nnx.eval_shape(build)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert model.features == features
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    for size in (224, 256):
        x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        y = nnx.eval_shape(lambda model, x: model(x, train=True), model, x)
        assert y.shape == (2, 1 + (size // 16) ** 2, features)


def slow_vit(model: VisionTransformer, x: np.ndarray) -> np.ndarray:
    """One image of the grid that the position embeddings are for, token by token, in float64."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    depth, size = len(p["blocks"]), model.features

    def norm(x: np.ndarray, row: Any) -> np.ndarray:
        deviation = math.sqrt(sum((v - x.mean()) ** 2 for v in x) / size + 1e-6)
        return (x - x.mean()) / deviation * row["scale"] + row["bias"]

    def linear(x: np.ndarray, row: Any) -> np.ndarray:
        return x @ row["kernel"] + row["bias"]

    tokens = [p["cls_token"][0, 0]]
    for i in range(GRID):
        for j in range(GRID):
            patch = x[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            kernel, bias = p["patch_embed"]["kernel"], p["patch_embed"]["bias"]
            tokens.append((patch[..., None] * kernel).sum((0, 1, 2)) + bias)
    tokens = [x + position for x, position in zip(tokens, p["pos_embed"][0], strict=True)]
    for b in range(depth):
        block = p["blocks"][b]
        projected = [linear(norm(x, block["norm1"]), block["attn"]["qkv"]) for x in tokens]
        each = size // HEADS
        attended = []
        for own in projected:
            heads = []
            for h in range(HEADS):
                query, key, value = (slice(i * size + h * each, None) for i in range(3))
                weights = [
                    math.exp(own[query][:each] @ other[key][:each] / math.sqrt(each))
                    for other in projected
                ]
                values = [w * x[value][:each] for w, x in zip(weights, projected, strict=True)]
                heads.append(np.sum(values, axis=0) / sum(weights))
            attended.append(linear(np.concatenate(heads), block["attn"]["proj"]))
        tokens = [x + y for x, y in zip(tokens, attended, strict=True)]
        hidden = [linear(norm(x, block["norm2"]), block["mlp"]["fc1"]) for x in tokens]
        gelu = [[v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x] for x in hidden]
        tokens = [
            x + linear(np.array(y), block["mlp"]["fc2"]) for x, y in zip(tokens, gelu, strict=True)
        ]
    return np.stack([norm(x, p["norm"]) for x in tokens])


def test_tokens_equal_a_slow_network() -> None:
    x = images(2, 224, 224, 3)
    with jax.enable_x64(True):
        model = vit(dtype=jnp.float64)
        y = jax.jit(lambda x: model(x, train=False))(x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y[1], slow_vit(model, x[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (7, 24), (4, 4), (2, 3)])
def test_positions_are_resampled_as_by_timm(rows: int, columns: int) -> None:
    torch = pytest.importorskip("torch", reason="the peer of the resampling")
    positions = images(1, 1 + GRID * GRID, 5)
    found = resample_positions(jnp.asarray(positions, jnp.float32), rows, columns)
    grid = torch.from_numpy(positions[:, 1:].reshape(1, GRID, GRID, 5)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=(rows, columns), mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(
        found[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, -1, 5).numpy(), atol=1e-5
    )
    np.testing.assert_array_equal(found[:, :1], positions[:, :1].astype(np.float32))


def test_positions_of_the_same_grid_are_left_alone() -> None:
    positions = jnp.asarray(images(1, 1 + GRID * GRID, 5))
    assert resample_positions(positions, GRID, GRID) is positions


def test_image_of_no_whole_patches_is_refused() -> None:
    with pytest.raises(UserError, match=r"--config.data.image_size.*16 pixels.*40 x 32"):
        vit(depth=1)(jnp.zeros((1, 40, 32, 3)), train=False)


def test_bfloat16_is_near_and_ends_in_float32() -> None:
    x = jnp.asarray(images(2, 64, 48, 3), jnp.float32)
    exact, rounded = (vit(dtype=kind)(x, train=False) for kind in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert 1e-5 < np.abs(exact - rounded).max() < 0.1


@pytest.mark.parametrize("pooling", ["token", "average"])
def test_head(pooling: str) -> None:
    tokens = images(3, 1 + 4, 8).astype(np.float32)
    config = dataclasses.replace(CONFIG, pooling=pooling, layer_norm="none")
    head = Head(8, 6, config=config, rngs=rngs(), output="tokens")
    kernel = np.array(head.projection.kernel[...])
    for token, found in zip(tokens, head(jnp.asarray(tokens), train=False), strict=True):
        x = token[0] if pooling == "token" else sum(token[i] for i in range(1, 5)) / 4
        np.testing.assert_allclose(found, x @ kernel / np.linalg.norm(x @ kernel), atol=1e-5)


def test_every_parameter_learns_alike_on_one_device_and_on_eight() -> None:
    config = dataclasses.replace(CONFIG, backbone="vit_s16", width=1, pooling="token")
    x, cotangent = images(8, 32, 32, 3) * 50 + 120, images(8, 6)
    with jax.enable_x64(True):
        model = make_embedder(
            dataclasses.replace(config, compute_dtype="float64"), channels=3, rngs=rngs()
        )
        model.backbone.blocks = model.backbone.blocks[:2]
        one, eight = (run(model, x, cotangent, devices=n) for n in (1, 8))
    assert_trees_close(eight, one, tolerance=1e-9)
    np.testing.assert_allclose(np.linalg.norm(one[0], axis=1), 1)
    for path, leaf in jax.tree.leaves_with_path(one[1]):
        assert np.abs(leaf).max() > 1e-9, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("backbone", "pooling", "fitting"),
    [
        ("vit_s16", "average+max", "token, average, gem"),
        ("vit_b16", "max", "token, average, gem"),
        ("resnet18", "token", "average, max, average+max, gem"),
    ],
)
def test_pooling_that_does_not_fit(backbone: str, pooling: str, fitting: str) -> None:
    config = dataclasses.replace(CONFIG, backbone=backbone, width=1, pooling=pooling)
    with pytest.raises(UserError) as error:
        nnx.eval_shape(lambda: make_embedder(config, channels=3, rngs=rngs()))
    assert f"--config.model.pooling='{pooling}'" in str(error.value)
    assert f"backbone='{backbone}'" in str(error.value)
    assert str(error.value).endswith(f"use one of: {fitting}")

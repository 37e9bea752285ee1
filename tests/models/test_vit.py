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
from jax import export
from test_models import CONFIG, assert_trees_close, rngs, run

from mmljax.errors import UserError
from mmljax.models.architectures import ARCHITECTURES
from mmljax.models.attention import attend, fits_cudnn, rotate
from mmljax.models.backbones import make_backbone
from mmljax.models.embedder import Head, make_embedder
from mmljax.models.positions import resample_positions, rotary_table
from mmljax.models.vit import Architecture, VisionTransformer

HEADS = 2
GRID = 14


def vit(*, depth: int = 2, width: int = 3, dtype: Any = jnp.float32) -> VisionTransformer:
    """A small one whose every parameter matters."""
    kind = Architecture(depth, HEADS, width, 4 * HEADS * width, patch_size=16, grid_size=GRID)
    model = VisionTransformer(kind, channels=3, dtype=dtype, rngs=rngs())
    random = np.random.default_rng(0)
    wide = jnp.promote_types(dtype, jnp.float32)
    nnx.update(
        model,
        jax.tree.map(
            lambda x: jnp.asarray(x + 0.3 * random.normal(size=x.shape), wide), nnx.state(model)
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


SIZES = [(16, 16), (7, 24), (4, 4), (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("kind", ["bicubic_antialias", "bicubic", "bilinear"])
def test_positions_are_resampled_as_by_torch(rows: int, columns: int, kind: Any) -> None:
    torch = pytest.importorskip("torch", reason="the peer of the resampling")
    positions = images(1, 1 + GRID * GRID, 5)
    found = resample_positions(jnp.asarray(positions, jnp.float32), GRID, rows, columns, kind=kind)
    grid = torch.from_numpy(positions[:, 1:].reshape(1, GRID, GRID, 5)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=(rows, columns), mode=kind.split("_")[0], antialias=kind == "bicubic_antialias"
    )
    np.testing.assert_allclose(
        found[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, -1, 5).numpy(), atol=1e-5
    )
    np.testing.assert_array_equal(found[:, :1], positions[:, :1].astype(np.float32))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_antialiased_positions_are_those_of_jaxs_resize(rows: int, columns: int) -> None:
    positions = jnp.asarray(images(1, 1 + GRID * GRID, 5), jnp.float32)
    found = resample_positions(positions, GRID, rows, columns)
    grid = positions[:, 1:].reshape(1, GRID, GRID, 5)
    expected = jax.image.resize(grid, (1, rows, columns, 5), method="cubic", antialias=True)
    np.testing.assert_allclose(found[:, 1:], expected.reshape(1, -1, 5), atol=1e-5)
    np.testing.assert_array_equal(found[:, :1], positions[:, :1])


def test_positions_of_the_same_grid_are_left_alone() -> None:
    positions = jnp.asarray(images(1, 1 + GRID * GRID, 5))
    assert resample_positions(positions, GRID, GRID, GRID) is positions


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_attention_is_the_sum_by_a_softmax(dtype: str, tolerance: float) -> None:
    """Against numpy in float64, for one query and for several, with large logits."""
    query, key, value = images(2, 5, 3, 8) * 6, images(2, 7, 3, 8)[:, ::-1], images(2, 7, 3, 8)
    query, key, value = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (query, key, value))
    for n in (1, 5):
        found = attend(*(jnp.asarray(x, dtype) for x in (query[:, :n], key, value)))
        assert found.dtype == dtype
        logits = np.einsum("bqhd,bkhd->bhqk", query[:, :n], key) / math.sqrt(8)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


def test_cudnn_takes_half_precision_and_heads_of_a_multiple_of_8() -> None:
    taken = {
        (dtype, head): fits_cudnn(jnp.zeros((2, 5, 3, head), dtype))
        for dtype in ("float32", "bfloat16", "float16")
        for head in (3, 64, 72, 128, 136)
    }
    assert {key for key, value in taken.items() if value} == {
        (dtype, head) for dtype in ("bfloat16", "float16") for head in (64, 72, 128)
    }


def test_a_network_on_a_gpu_is_exported_with_a_symbolic_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cuDNN's attention cannot be exported; a program for a batch of known size keeps it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    forms: list[str] = []
    attention = jax.nn.dot_product_attention

    def recorded(*arrays: Any, implementation: str) -> Any:
        forms.append(implementation)
        return attention(*arrays, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    model = vit(width=8, dtype=jnp.bfloat16)
    x = jnp.asarray(images(3, 32, 32, 3), jnp.float32)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda x: nnx.merge(graphdef, state)(x, train=False))
    expected = run(x)
    assert set(forms) == {"cudnn", "xla"}
    forms.clear()
    shape = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 32, 32, 3), jnp.float32)
    exported = export.export(run, platforms=["cpu", "cuda", "tpu"])(shape)
    assert set(forms) == {"xla"}
    np.testing.assert_allclose(exported.call(x), expected, atol=0.05)


def turned(vector: np.ndarray, angles: list[float], pairs: list[tuple[int, int]]) -> np.ndarray:
    result = vector.copy()
    for angle, (i, j) in zip(angles, pairs, strict=True):
        result[i] = vector[i] * math.cos(angle) - vector[j] * math.sin(angle)
        result[j] = vector[i] * math.sin(angle) + vector[j] * math.cos(angle)
    return result


@pytest.mark.parametrize("kind", ["dinov3", "perception"])
def test_rotary_positions_against_a_loop(kind: Any) -> None:
    rows, columns, head = 2, 3, 8
    x = images(1, 2 + rows * columns, 2, head)  # two prefix tokens
    table = rotary_table(kind, rows, columns, head, 1)
    assert table is not None
    found = np.array(rotate(jnp.asarray(x, jnp.float32), table))
    np.testing.assert_array_equal(found[:, :2], x[:, :2].astype(np.float32))
    for i in range(rows):
        for j in range(columns):
            if kind == "dinov3":  # a row's place is its centre between -1 and 1; bands 1, 1 / 10
                y, z = (math.tau * ((2 * k + 1) / n - 1) for k, n in ((i, rows), (j, columns)))
                angles, pairs = [y, y / 10, z, z / 10], [(0, 4), (1, 5), (2, 6), (3, 7)]
            else:  # columns first, counted from 1; bands 1, 1 / 100
                angles = [1 + j, (1 + j) / 100, 1 + i, (1 + i) / 100]
                pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
            for h in range(2):
                place = 2 + i * columns + j
                expected = turned(x[0, place, h], angles, pairs)
                np.testing.assert_allclose(found[0, place, h], expected, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_width_scales_channels_and_keeps_the_rest(name: str) -> None:
    kind = ARCHITECTURES[name]
    assert kind.of_width(64) == kind
    double = kind.of_width(128)
    scaled = {
        field: 2 * getattr(kind, field)
        for field in ("head_dim", "mlp_dim", "pool_mlp_dim", "output_dim")
    }
    assert double == dataclasses.replace(kind, **scaled)
    assert double.embed_dim == 2 * kind.embed_dim
    for width in (1, 8, 40):
        narrow = kind.of_width(width)
        assert 1 <= narrow.head_dim < kind.head_dim
        assert 0 < narrow.mlp_dim < kind.mlp_dim
        assert kind.rotary == "none" or narrow.head_dim % 4 == 0
        assert kind.pool != "attention" or narrow.embed_dim % narrow.pool_heads == 0


def test_width_rounds_heads_down_and_mlps_up() -> None:
    kind = Architecture(1, 2, 72, 50, patch_size=16, grid_size=2, pool_mlp_dim=145)
    narrow = kind.of_width(8)
    assert (narrow.head_dim, narrow.mlp_dim, narrow.pool_mlp_dim) == (9, 7, 19)
    assert dataclasses.replace(kind, rotary="dinov3").of_width(8).head_dim == 8
    assert dataclasses.replace(kind, rotary="dinov3").of_width(1).head_dim == 4


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_pool_has_the_number_of_heads_of_pool_heads(heads: int) -> None:
    """The pool of a network against one query's attention in NumPy, head by head."""
    kind = dataclasses.replace(
        ARCHITECTURES["pe_core_vit_b_16"],
        depth=1,
        heads=2,
        head_dim=4,
        mlp_dim=6,
        grid_size=2,
        pool_heads=heads,
        pool_mlp_dim=10,
    )
    model = VisionTransformer(kind, channels=3, dtype=jnp.float32, rngs=rngs())
    pool = model.attn_pool
    x = images(3, 5, 8)
    qkv = np.asarray(pool.qkv.kernel[...], np.float64) * 30  # far from uniform attention
    pool.qkv.kernel.set_value(jnp.asarray(qkv, jnp.float32))
    query = np.asarray(pool.latent[...], np.float64)[0, 0] @ qkv[:, :8]
    expected = []
    for tokens in x:
        key, value = tokens @ qkv[:, 8:16], tokens @ qkv[:, 16:]
        parts = []
        for head in np.split(np.arange(8), heads):
            weights = np.exp(key[:, head] @ query[head] / math.sqrt(len(head)))
            parts.append(weights / weights.sum() @ value[:, head])
        expected.append(np.concatenate(parts) @ np.asarray(pool.proj.kernel[...], np.float64))
    y = jnp.asarray(np.stack(expected), jnp.float32)
    y = y + pool.mlp(pool.norm(y))
    np.testing.assert_allclose(pool(jnp.asarray(x, jnp.float32)), y, atol=1e-4)


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

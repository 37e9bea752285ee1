"""Adapters: equation 3 by hand, the start, merging, weights of files, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_fine_tuning import random_weights
from test_models import rngs
from test_vit_families import small

from mmljax.config import LoraConfig, ModelConfig, load_config
from mmljax.errors import UserError
from mmljax.models import pretrained
from mmljax.models.attention import linear
from mmljax.models.embedder import Embedder, make_embedder
from mmljax.models.lora import AdaptedLinear, add_adapters, is_adapter, merge_adapters
from mmljax.models.vit import VisionTransformer

LORA = LoraConfig(rank=3, alpha=5.0)


def flat(model: nnx.Module) -> dict[str, Any]:
    paths = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in paths}


def noise_adapters(model: nnx.Module, *, deviation: float = 0.3) -> None:
    """Let adapters, whose ``B`` starts as 0, change the network."""
    random = np.random.default_rng(0)
    state = nnx.state(model, nnx.LoRAParam)
    assert jax.tree.leaves(state)
    nnx.update(model, jax.tree.map(lambda x: x + random.normal(0, deviation, x.shape), state))


def vit(name: str = "vit_s16", lora: LoraConfig = LORA) -> VisionTransformer:
    kind: dict[str, Any] = {"channels": 3, "dtype": jnp.float32, "rngs": rngs()}
    shape = small(name)
    shape = dataclasses.replace(shape, layer_scale=0.5 if shape.layer_scale else 0.0)
    model = VisionTransformer(shape, **kind)
    add_adapters(model, lora, name=name, rngs=nnx.Rngs(7))
    return model


@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_is_equation_3(use_bias: bool) -> None:
    """Value and gradients, in float64 by hand."""
    base = linear(6, 4, use_bias=use_bias, dtype=jnp.float32, rngs=rngs())
    layer = AdaptedLinear(base, rank=3, alpha=5.0, rngs=nnx.Rngs(1))
    noise_adapters(layer)
    w, a, b = (flat(layer)[name].astype(float) for name in ("kernel", "lora.lora_a", "lora.lora_b"))
    random = np.random.default_rng(2)
    if use_bias:
        layer.bias = nnx.Param(jnp.asarray(random.normal(size=4), jnp.float32))
    bias = flat(layer)["bias"].astype(float) if use_bias else np.zeros(4)
    x, cotangent = random.normal(size=(5, 6)), random.normal(size=(5, 4))
    wanted = np.zeros((5, 4))
    d_a, d_b = np.zeros_like(a), np.zeros_like(b)
    for i in range(5):
        low = a.T @ x[i]
        wanted[i] = w.T @ x[i] + bias + 5 / 3 * (b.T @ low)
        d_b += 5 / 3 * np.outer(low, cotangent[i])
        d_a += 5 / 3 * np.outer(x[i], b @ cotangent[i])
    x, cotangent = x.astype(np.float32), cotangent.astype(np.float32)
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)
    found = nnx.grad(
        lambda layer: (layer(x) * cotangent).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(layer)
    np.testing.assert_allclose(found["lora"]["lora_a"][...], d_a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["lora"]["lora_b"][...], d_b, rtol=1e-5, atol=1e-5)


def test_a_starts_normal_and_b_as_zero() -> None:
    base = linear(400, 50, dtype=jnp.float32, rngs=rngs())
    own = flat(AdaptedLinear(base, rank=40, alpha=1.0, rngs=nnx.Rngs(1)))
    assert own["lora.lora_a"].var() == pytest.approx(1 / 400, rel=0.05)
    assert own["lora.lora_a"].mean() == pytest.approx(0, abs=0.002)
    assert not own["lora.lora_b"].any()


def embedder(**changes: Any) -> Embedder:
    config = ModelConfig(
        backbone="vit_s16",
        width=8,
        pooling="token",
        embedding_size=8,
        compute_dtype="float32",
        **changes,
    )
    return make_embedder(config, channels=3, rngs=nnx.Rngs(jax.random.key(3, impl="rbg")))


def test_the_start_is_the_network_without_adapters_to_the_bit() -> None:
    plain, adapted = embedder(), embedder(lora=LORA)
    base, own = flat(plain), flat(adapted)
    assert {name for name in own if not is_adapter(name)} == base.keys()
    for name, value in base.items():
        np.testing.assert_array_equal(own[name], value, err_msg=name)
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    embed = nnx.jit(lambda model: model(images, train=False))
    np.testing.assert_array_equal(embed(adapted), embed(plain))
    noise_adapters(adapted)
    assert np.abs(embed(adapted) - embed(plain)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "blocks", "layers"),
    [
        ({}, "01", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        ({"blocks": 2}, "01", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        ({"targets": ("attention",), "blocks": 1}, "1", {"attn.qkv", "attn.proj"}),
        ({"targets": ("mlp", "mlp")}, "01", {"mlp.fc1", "mlp.fc2"}),
    ],
)
def test_adapters_are_where_the_config_says(
    changes: dict[str, Any], blocks: str, layers: set[str]
) -> None:
    own = flat(vit("dinov2_vit_s_14", dataclasses.replace(LORA, **changes)))
    wanted = {
        f"blocks.{block}.{layer}.lora.lora_{x}"
        for block in blocks
        for layer in layers
        for x in "ab"
    }
    assert {name for name in own if is_adapter(name)} == wanted
    for name, value in own.items():
        if name in wanted:
            kernel = own[re.sub(r"lora\.lora_.", "kernel", name)]
            inputs, outputs = kernel.shape
            assert value.shape == ((inputs, 3) if name.endswith("a") else (3, outputs))


@pytest.mark.parametrize(
    "name", ["vit_s16", "vit_b_16_siglip", "dinov2_vit_g_14", "dinov3_vit_splus_16"]
)
def test_merged_equals_adapted(name: str) -> None:
    """For fused and gated layers, with and without a bias."""
    adapted = vit(name)
    noise_adapters(adapted)
    graphdef, _, rest = nnx.split(vit(name, LoraConfig()), nnx.Param, ...)
    parameters = nnx.to_pure_dict(nnx.state(adapted, nnx.Param))
    merged = nnx.merge(graphdef, merge_adapters(parameters, LORA), rest)
    side = 3 * small(name).patch_size
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    wanted = adapted(images, train=False)
    np.testing.assert_allclose(merged(images, train=False), wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(vit(name, LoraConfig())(images, train=False) - wanted).max() > 0.01


def test_weights_of_a_file_fill_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    before = flat(model)
    ours, theirs = random_weights(vit("vit_s16", LoraConfig()))
    monkeypatch.setattr(pretrained, "locate", lambda source: source)
    monkeypatch.setattr(pretrained, "read_weights", lambda source: theirs)
    pretrained.load_pretrained(model, "file")
    for name, value in flat(model).items():
        wanted = before[name] if is_adapter(name) else ours[name]
        np.testing.assert_array_equal(value, wanted, err_msg=name)


@pytest.mark.parametrize(
    ("backbone", "lora", "message"),
    [
        ("resnet18", LORA, r"lora.rank=3: .*'resnet18' has no attention .*'vit_b16', or --config"),
        ("efficientnet_lite0", LORA, "'efficientnet_lite0' has no attention to adapt"),
        (
            "vit_s16",
            LoraConfig(rank=49),
            "lora.rank=49 is above the 48 channels of 'vit_s16'.*use at most 48, such as 8",
        ),
        (
            "vit_s16",
            LoraConfig(rank=1, targets=("atention",)),
            r"--config.model.lora.targets='atention' is unknown; .*'attention'",
        ),
        (
            "vit_s16",
            LoraConfig(rank=1, blocks=13),
            "--config.model.lora.blocks=13: 'vit_s16' has 12 blocks; use at most 12, or 0 for all",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused(backbone: str, lora: LoraConfig, message: str) -> None:
    config = ModelConfig(backbone=backbone, width=8, pooling="average", lora=lora)
    with pytest.raises(UserError, match=message) as error:
        nnx.eval_shape(lambda: make_embedder(config, channels=3, rngs=nnx.Rngs(0)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank=-1", "--config.model.lora.rank must be at least 0, found -1"),
        ("alpha=0", "--config.model.lora.alpha must be above 0, found 0"),
        ("targets=()", "--config.model.lora.targets must hold one or more values"),
        ("blocks=-2", "--config.model.lora.blocks must be at least 0, found -2"),
    ],
)
def test_values_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("quickstart", [f"model.lora.{override}"])

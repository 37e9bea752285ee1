"""Families of ViTs against their originals in transformers and timm, with random weights.

Small networks, as their own libraries save them, at the resolution of the position embeddings and
at another one that is not square. Unicom has no package: its peer is a ViT of timm's with its
settings, and its pooling in torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models import rngs

import torch_networks
from mmljax.models.architectures import ARCHITECTURES
from mmljax.models.pretrained import convert, load_pretrained
from mmljax.models.vit import Architecture, VisionTransformer
from mmljax.preprocessing import preprocessing

SIZE, HEADS, HIDDEN, DEPTH, GRID = 32, 2, 48, 2, 3
OTHER = (4, 5)  # patches in height and width of the second images
POOL_HEADS = 4  # of the Perception Encoder


def small(name: str) -> Architecture:
    kind = ARCHITECTURES[name]
    return dataclasses.replace(
        kind,
        depth=DEPTH,
        heads=HEADS,
        head_dim=SIZE // HEADS,
        mlp_dim=HIDDEN,
        grid_size=GRID,
        pool_heads=POOL_HEADS if kind.pool_heads == 8 else HEADS,
        pool_mlp_dim=4 * SIZE if kind.pool_heads == 8 else HIDDEN,
        output_dim=20,
    )


class Peer(NamedTuple):
    """An original with its weights, and what it makes of images: all tokens and the summary."""

    network: Any
    run: Callable[[Any], tuple[Any, Any]]
    save: Callable[[Path], str]
    sizes: tuple[tuple[int, int], ...]  # in patches


def hugging_face(config: str, model: str, name: str, **more: Any) -> Peer:
    transformers = pytest.importorskip("transformers", reason=torch_networks.REASON)
    patch = ARCHITECTURES[name].patch_size
    settings = {
        "hidden_size": SIZE,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": GRID * patch,
        "patch_size": patch,
        **more,
    }
    if not config.startswith("Dinov2"):
        settings["intermediate_size"] = HIDDEN
    network = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()

    def run(x: Any) -> tuple[Any, Any]:
        found = network(x)
        tokens = found.last_hidden_state
        if model.startswith("CLIP"):
            tokens = network.post_layernorm(tokens)
        return tokens, found.pooler_output

    def save(directory: Path) -> str:
        network.save_pretrained(directory)
        return str(directory / "model.safetensors")

    # CLIP and SigLIP resample positions by another filter than OpenCLIP, which timm follows.
    one_size = model.startswith(("CLIP", "Siglip"))
    return Peer(network, run, save, ((GRID, GRID),) if one_size else ((GRID, GRID), OTHER))


def timm_peer(timm_name: str, name: str, **more: Any) -> Peer:
    timm = pytest.importorskip("timm", reason=torch_networks.REASON)
    kind = ARCHITECTURES[name]
    settings = {
        "embed_dim": SIZE,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": HIDDEN / SIZE,
        "img_size": GRID * kind.patch_size,
        "dynamic_img_size": True,
        **more,
    }
    network = timm.create_model(timm_name, **settings).eval()

    def run(x: Any) -> tuple[Any, Any]:
        tokens = network.forward_features(x)
        pooled = tokens[:, 0] if network.attn_pool is None else network.attn_pool(tokens)
        return tokens, pooled

    def save(directory: Path) -> str:
        path = directory / "weights.pth"
        torch_networks.load_torch().save(network.state_dict(), path)
        return str(path)

    return Peer(network, run, save, ((GRID, GRID), OTHER))


def perception(name: str) -> Peer:
    """At another size timm rescales the rotary positions, and resamples by another filter."""
    torch = torch_networks.load_torch()
    make = functools.partial(
        timm_peer, "vit_pe_core_base_patch16_224", name, attn_pool_num_heads=POOL_HEADS
    )
    peer = make(ref_feat_shape=(GRID, GRID))

    def run(x: Any) -> tuple[Any, Any]:
        rows, columns = (n // ARCHITECTURES[name].patch_size for n in x.shape[2:])
        own = peer.network.pos_embed
        grid = own[:, 1:].reshape(1, GRID, GRID, SIZE).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(rows, columns), mode="bilinear")
        grid = grid.permute(0, 2, 3, 1).reshape(1, -1, SIZE)
        sized = make(img_size=tuple(x.shape[2:]), ref_feat_shape=(rows, columns))
        weights = peer.network.state_dict() | {"pos_embed": torch.cat([own[:, :1], grid], dim=1)}
        sized.network.load_state_dict(weights)
        return sized.run(x)

    return peer._replace(run=run)


def unicom(name: str) -> Peer:
    torch = torch_networks.load_torch()
    timm = pytest.importorskip("timm", reason=torch_networks.REASON)
    peer = timm_peer(
        "vit_base_patch16_224",
        name,
        patch_size=ARCHITECTURES[name].patch_size,
        class_token=False,
        global_pool="",
        num_classes=0,
        qkv_bias=False,
        act_layer=torch.nn.ReLU6,
        norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-5),
    )
    peer.network.feature = torch.nn.Sequential(
        torch.nn.Linear(GRID**2 * SIZE, SIZE, bias=False),
        torch.nn.BatchNorm1d(SIZE, eps=2e-5),
        torch.nn.Linear(SIZE, 20, bias=False),
        torch.nn.BatchNorm1d(20, eps=2e-5),
    ).eval()

    def run(x: Any) -> tuple[Any, Any]:
        tokens = peer.network.forward_features(x)
        return tokens, peer.network.feature(tokens.flatten(1))

    return peer._replace(run=run, sizes=((GRID, GRID),))


def gated(size: int) -> int:
    """The MLP's inner channels of a gated DINOv2, by its own rule."""
    return (int(size * 4 * 2 / 3) + 7) // 8 * 8


PEERS: dict[str, tuple[str, Callable[[str], Peer]]] = {
    "CLIP of transformers": (
        "vit_l_14_clip",
        lambda name: hugging_face("CLIPVisionConfig", "CLIPVisionModel", name),
    ),
    "CLIP of timm": (
        "vit_l_14_clip",
        lambda name: timm_peer("vit_large_patch14_clip_quickgelu_224", name, num_classes=7),
    ),
    "OpenCLIP of timm": (
        "vit_b_32_openclip",
        lambda name: timm_peer("vit_base_patch32_clip_224", name, num_classes=7),
    ),
    "SigLIP of transformers": (
        "vit_so400m_14_siglip",
        lambda name: hugging_face("SiglipVisionConfig", "SiglipVisionModel", name),
    ),
    "SigLIP 2 of timm": (
        "vit_so400m_16_siglip2",
        lambda name: timm_peer("vit_so400m_patch16_siglip_256", name, act_layer="gelu_tanh"),
    ),
    "DINOv2 of transformers": (
        "dinov2_vit_b_14",
        lambda name: hugging_face("Dinov2Config", "Dinov2Model", name, mlp_ratio=2),
    ),
    "gated DINOv2 of transformers": (
        "dinov2_vit_g_14",
        lambda name: hugging_face("Dinov2Config", "Dinov2Model", name, use_swiglu_ffn=True),
    ),
    "DINOv2 with registers of transformers": (
        "dinov2_vit_b_14_reg",
        lambda name: hugging_face(
            "Dinov2WithRegistersConfig",
            "Dinov2WithRegistersModel",
            name,
            mlp_ratio=2,
            num_register_tokens=4,
        ),
    ),
    "DINOv2 with registers of timm": (
        "dinov2_vit_b_14_reg",
        lambda name: timm_peer("vit_base_patch14_reg4_dinov2", name, mlp_ratio=2),
    ),
    "gated DINOv2 with registers of timm": (
        "dinov2_vit_g_14_reg",
        lambda name: timm_peer(
            "vit_giant_patch14_reg4_dinov2", name, mlp_ratio=2 * gated(SIZE) / SIZE
        ),
    ),
    "DINOv3 of transformers": (
        "dinov3_vit_b_16",
        lambda name: hugging_face("DINOv3ViTConfig", "DINOv3ViTModel", name, num_register_tokens=4),
    ),
    "gated DINOv3 of transformers": (
        "dinov3_vit_hplus_16",
        lambda name: hugging_face(
            "DINOv3ViTConfig",
            "DINOv3ViTModel",
            name,
            num_register_tokens=4,
            use_gated_mlp=True,
            hidden_act="silu",
        ),
    ),
    "DINOv3 of timm": (
        "dinov3_vit_b_16",
        lambda name: timm_peer("vit_base_patch16_dinov3", name, global_pool="token"),
    ),
    "gated DINOv3 of timm, with biases": (
        "dinov3_vit_splus_16",
        lambda name: timm_peer("vit_small_plus_patch16_dinov3_qkvb", name, global_pool="token"),
    ),
    "Perception Encoder of timm": ("pe_core_vit_b_16", perception),
    "Unicom": ("unicom_vit_b_32", unicom),
}


def pixels(height: int, width: int) -> np.ndarray:
    x = np.random.default_rng(height).normal(size=(2, height, width, 3))
    return x.astype(np.float32)


def strengthen(network: Any) -> None:
    """Scale matrices, so that attention is far from uniform and every layer shows in the result."""
    with torch_networks.load_torch().no_grad():
        for value in network.parameters():
            if value.ndim == 2:
                value *= 0.2 / value.std()


def assert_equal(kind: Architecture, peer: Peer, directory: Path) -> None:
    torch = torch_networks.load_torch()
    model = VisionTransformer(kind, channels=3, dtype=jnp.float32, rngs=rngs())
    load_pretrained(model, peer.save(directory))
    for rows, columns in peer.sizes:
        x = pixels(rows * kind.patch_size, columns * kind.patch_size)
        with torch.no_grad():
            tokens, pooled = peer.run(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous())
        run = jax.jit(lambda x: (model.tokens(x), model(x, train=False)))
        found, output = run(jnp.asarray(x))
        assert found.shape == tokens.shape
        np.testing.assert_allclose(found, tokens.numpy(), rtol=0, atol=1e-4)
        summary = output if model.output == "vector" else output[:, 0]
        np.testing.assert_allclose(summary, pooled.numpy(), rtol=0, atol=1e-4)
        assert np.abs(summary).max() > 0.1
        if model.output == "tokens":
            patches = tokens[:, kind.class_token + kind.registers :]
            assert output.shape == (2, 1 + rows * columns, kind.embed_dim)
            np.testing.assert_allclose(output[:, 1:], patches.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", PEERS)
def test_family_equals_its_original(case: str, tmp_path: Path) -> None:
    torch_networks.load_torch().manual_seed(0)
    torch_networks.load_torchvision()
    name, make = PEERS[case]
    kind = small(name)
    if name.startswith("dinov2"):
        kind = dataclasses.replace(kind, mlp_dim=gated(SIZE) if "_g_" in name else 2 * SIZE)
    peer = make(name)
    strengthen(torch_networks.scatter(peer.network))
    assert_equal(kind, peer, tmp_path)


NATIVE = {  # timm's names
    "vit_b_32_clip": "vit_base_patch32_clip_quickgelu_224",
    "vit_b_16_clip": "vit_base_patch16_clip_quickgelu_224",
    "vit_l_14_clip": "vit_large_patch14_clip_quickgelu_224",
    "vit_l_14_336_clip": "vit_large_patch14_clip_quickgelu_336",
    "vit_h_14_clip": "vit_huge_patch14_clip_quickgelu_224",
    "vit_b_32_openclip": "vit_base_patch32_clip_224",
    "vit_b_16_openclip": "vit_base_patch16_clip_224",
    "vit_l_14_openclip": "vit_large_patch14_clip_224",
    "vit_h_14_openclip": "vit_huge_patch14_clip_224",
    "vit_b_16_siglip": "vit_base_patch16_siglip_224",
    "vit_b_16_256_siglip": "vit_base_patch16_siglip_256",
    "vit_b_16_384_siglip": "vit_base_patch16_siglip_384",
    "vit_b_16_512_siglip": "vit_base_patch16_siglip_512",
    "vit_l_16_siglip": "vit_large_patch16_siglip_256",
    "vit_l_16_384_siglip": "vit_large_patch16_siglip_384",
    "vit_so400m_14_siglip": "vit_so400m_patch14_siglip_224",
    "vit_so400m_14_384_siglip": "vit_so400m_patch14_siglip_378",
    "vit_so400m_16_siglip": "vit_so400m_patch16_siglip_256",
    "vit_b_32_siglip2": "vit_base_patch32_siglip_256",
    "vit_l_16_512_siglip2": "vit_large_patch16_siglip_512",
    "vit_so400m_16_384_siglip2": "vit_so400m_patch16_siglip_384",
    "vit_so400m_16_512_siglip2": "vit_so400m_patch16_siglip_512",
    **{
        f"dinov2_vit_{size}_14{ours}": f"vit_{name}_patch14_{theirs}dinov2"
        for size, name in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
        for ours, theirs in (("", ""), ("_reg", "reg4_"))
    },
    "dinov3_vit_s_16": "vit_small_patch16_dinov3",
    "dinov3_vit_splus_16": "vit_small_plus_patch16_dinov3",
    "dinov3_vit_b_16": "vit_base_patch16_dinov3",
    "dinov3_vit_l_16": "vit_large_patch16_dinov3_qkvb",
    "dinov3_vit_hplus_16": "vit_huge_plus_patch16_dinov3",
    "pe_core_vit_s_16": "vit_pe_core_small_patch16_384",
    "pe_core_vit_b_16": "vit_pe_core_base_patch16_224",
    "pe_core_vit_l_14": "vit_pe_core_large_patch14_336",
    "pe_core_vit_g_14": "vit_pe_core_gigantic_patch14_448",
}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    def build() -> VisionTransformer:
        return VisionTransformer(ARCHITECTURES[name], channels=3, dtype=jnp.float32, rngs=rngs())

    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(build)))
    return {".".join(map(str, path)): leaf.shape for path, leaf in flat}


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_published_sizes_are_timms(name: str) -> None:
    """Names, shapes and layer norms' epsilons of the published network, without its numbers."""
    torch = torch_networks.load_torch()
    torch_networks.load_torchvision()
    timm = pytest.importorskip("timm", reason=torch_networks.REASON)
    with torch.device("meta"):
        network = timm.create_model(NATIVE[name])
    weights = {
        key: np.broadcast_to(np.float32(0), tuple(value.shape))
        for key, value in network.state_dict().items()
    }
    ours = shapes_of(name)
    found = convert(weights, ours, source=name)
    assert {key: value.shape for key, value in found.items()} == ours
    kind = ARCHITECTURES[name]
    assert network.blocks[0].norm1.eps == kind.epsilon
    assert network.blocks[0].attn.num_heads == kind.heads
    assert len(network.blocks) == kind.depth
    if "openclip" in name:  # whose files differ in this
        return
    norms = {"imagenet": (0.485, 0.229), "half": (0.5, 0.5), "clip": (0.48145466, 0.26862954)}
    config = network.pretrained_cfg
    assert (config["mean"][0], config["std"][0]) == norms[preprocessing(name).pixel_norm]
    assert config["input_size"][1] == kind.grid_size * kind.patch_size


@pytest.mark.slow
def test_published_width_equals_timms(tmp_path: Path) -> None:
    """CLIP ViT-B/32 in full, at 224 x 224 and at 192 x 256 pixels."""
    torch = torch_networks.load_torch()
    torch_networks.load_torchvision()
    torch.manual_seed(0)
    timm = pytest.importorskip("timm", reason=torch_networks.REASON)
    name = "vit_b_32_clip"
    network = timm.create_model(NATIVE[name], dynamic_img_size=True).eval()
    torch_networks.scatter(network)
    peer = Peer(
        network,
        lambda x: (network.forward_features(x), network.forward_features(x)[:, 0]),
        lambda directory: _save(network, directory),
        ((7, 7), (6, 8)),
    )
    assert_equal(ARCHITECTURES[name], peer, tmp_path)


def _save(network: Any, directory: Path) -> str:
    torch_networks.load_torch().save(network.state_dict(), directory / "weights.pth")
    return str(directory / "weights.pth")

"""The table of vision transformers by name: sizes, families and their differences as data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from jax.typing import DTypeLike

from mmljax.models.vit import Architecture, VisionTransformer


class _Size(NamedTuple):
    depth: int
    heads: int
    head_dim: int
    mlp_dim: int


_SIZES = {  # Touvron et al. (2020, 2012.12877) gave the S its 6 heads
    "s": _Size(12, 6, 64, 1536),
    "b": _Size(12, 12, 64, 3072),
    "l": _Size(24, 16, 64, 4096),
    "h": _Size(32, 16, 80, 5120),
    "so400m": _Size(27, 16, 72, 4304),  # Alabdulmohsin et al. (2023, 2305.13035)
}


def _architecture(size: _Size, patch: int, pixels: int, **family: Any) -> Architecture:
    return Architecture(*size, patch_size=patch, grid_size=pixels // patch, **family)


def _supervised() -> dict[str, Architecture]:
    """Of torchvision and timm; DINO's and MoCo v3's files have the same names and shapes."""
    return {f"vit_{s}16": _architecture(_SIZES[s], 16, 224) for s in ("s", "b")}


def _clip() -> dict[str, Architecture]:
    """OpenAI's (Radford et al. 2021, 2103.00020), and OpenCLIP's, which have the exact GELU."""
    family = {"pixel_norm": "clip", "epsilon": 1e-5, "pre_norm": True}
    quick = {**family, "activation": "gelu_quick"}
    return {
        "vit_b_32_clip": _architecture(_SIZES["b"], 32, 224, **quick),
        "vit_b_16_clip": _architecture(_SIZES["b"], 16, 224, **quick),
        "vit_l_14_clip": _architecture(_SIZES["l"], 14, 224, **quick),
        "vit_l_14_336_clip": _architecture(_SIZES["l"], 14, 336, **quick),
        "vit_h_14_clip": _architecture(_SIZES["h"], 14, 224, **quick),
        "vit_b_32_openclip": _architecture(_SIZES["b"], 32, 224, **family),
        "vit_b_16_openclip": _architecture(_SIZES["b"], 16, 224, **family),
        "vit_l_14_openclip": _architecture(_SIZES["l"], 14, 224, **family),
        "vit_h_14_openclip": _architecture(_SIZES["h"], 14, 224, **family),
    }


_SIGLIP = {  # published sizes by patch, pixels of the name without a number first
    "siglip": {
        ("b", 16): (224, 256, 384, 512),
        ("l", 16): (256, 384),
        ("so400m", 14): (224, 384),
        ("so400m", 16): (256,),
    },
    "siglip2": {
        ("b", 32): (256,),
        ("b", 16): (224, 256, 384, 512),
        ("l", 16): (256, 384, 512),
        ("so400m", 14): (224, 384),
        ("so400m", 16): (256, 384, 512),
    },
}


def _siglip() -> dict[str, Architecture]:
    """SigLIP (2303.15343), and SigLIP 2 (2502.14786) of fixed resolution, which is the same."""
    found = {}
    for family, published in _SIGLIP.items():
        for (name, patch), sizes in published.items():
            size = _SIZES[name]
            for pixels in sizes:
                number = "" if pixels == sizes[0] else f"_{pixels}"
                found[f"vit_{name}_{patch}{number}_{family}"] = _architecture(
                    size,
                    patch,
                    pixels,
                    pixel_norm="half",
                    activation="gelu_tanh",
                    class_token=False,
                    pool="attention",
                    pool_heads=size.heads,
                    pool_mlp_dim=size.mlp_dim,
                )
    return found


def _dinov2() -> dict[str, Architecture]:
    """DINOv2 (Oquab et al. 2023, 2304.07193), and with registers (2309.16588)."""
    sizes = {name: (_SIZES[name], "gelu") for name in ("s", "b", "l")}
    sizes["g"] = _Size(40, 24, 64, 4096), "swiglu"
    found = {}
    for name, (size, activation) in sizes.items():
        family = {"activation": activation, "layer_scale": 1e-5}
        found[f"dinov2_vit_{name}_14"] = _architecture(
            size, 14, 518, resampling="bicubic", **family
        )
        found[f"dinov2_vit_{name}_14_reg"] = _architecture(size, 14, 518, registers=4, **family)
    return found


def _dinov3() -> dict[str, Architecture]:
    """DINOv3 (Simeoni et al. 2025, 2508.10104), without the one of 7 billion parameters."""
    sizes = {name: (_SIZES[name], "gelu") for name in ("s", "b", "l")}
    sizes["splus"] = _SIZES["s"], "swiglu"
    sizes["hplus"] = _Size(32, 20, 64, 5120), "swiglu"
    return {
        f"dinov3_vit_{name}_16": _architecture(
            size,
            16,
            256,
            activation=activation,
            epsilon=1e-5,
            registers=4,
            learned_positions=False,
            rotary="dinov3",
            bias="query_value",
            layer_scale=1e-5,
        )
        for name, (size, activation) in sizes.items()
    }


def _unicom() -> dict[str, Architecture]:
    """Unicom (An et al. 2023, 2304.05884)."""
    sizes = {"b_32": (32, 224, 512), "b_16": (16, 224, 768), "l_14": (14, 224, 768)}
    sizes["l_14_336"] = (14, 336, 768)
    return {
        f"unicom_vit_{name}": _architecture(
            _SIZES[name[0]],
            patch,
            pixels,
            pixel_norm="clip",
            activation="relu6",
            epsilon=1e-5,
            class_token=False,
            bias="none",
            pool="flat",
            output_dim=output_dim,
        )
        for name, (patch, pixels, output_dim) in sizes.items()
    }


def _perception() -> dict[str, Architecture]:
    """Core networks of the Perception Encoder (Bolya et al. 2025, 2504.13181)."""
    sizes = {"s_16": (_SIZES["s"], 384), "b_16": (_SIZES["b"], 224), "l_14": (_SIZES["l"], 336)}
    sizes["g_14"] = _Size(50, 16, 96, 8960), 448
    return {
        f"pe_core_vit_{name}": _architecture(
            size,
            int(name[2:]),
            pixels,
            pixel_norm="half",
            epsilon=1e-5,
            class_token=name != "g_14",
            resampling="bilinear",
            rotary="perception",
            pre_norm=True,
            pool="attention",
            pool_heads=8,
            pool_mlp_dim=4 * size.heads * size.head_dim,
        )
        for name, (size, pixels) in sizes.items()
    }


ARCHITECTURES: Mapping[str, Architecture] = {
    **_supervised(),
    **_clip(),
    **_siglip(),
    **_dinov2(),
    **_dinov3(),
    **_unicom(),
    **_perception(),
}


def _build(
    kind: Architecture, *, width: int, channels: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> VisionTransformer:
    return VisionTransformer(kind.of_width(width), channels=channels, dtype=dtype, rngs=rngs)


VITS: Mapping[str, Callable[..., VisionTransformer]] = {
    name: functools.partial(_build, kind) for name, kind in ARCHITECTURES.items()
}
"""Constructors ``(*, width, channels, dtype, rngs)``; ``Architecture.of_width`` tells the width."""

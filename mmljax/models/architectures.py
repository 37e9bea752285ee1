"""The table of vision transformers by name: sizes, families and their differences as data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from jax.typing import DTypeLike

from mmljax.models.vit import Architecture, VisionTransformer
from mmljax.preprocessing import preprocessing


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


def _named(kinds: Mapping[str, tuple[_Size, int]], **family: Any) -> dict[str, Architecture]:
    """Architectures of a family by name, from sizes and sides of patches."""
    return {
        name: Architecture(
            *size,
            patch_size=patch,
            grid_size=preprocessing(name).image_size // patch,
            **family,
        )
        for name, (size, patch) in kinds.items()
    }


def _supervised() -> dict[str, Architecture]:
    """Of torchvision and timm; DINO's and MoCo v3's files have the same names and shapes."""
    return _named({f"vit_{s}16": (_SIZES[s], 16) for s in ("s", "b")})


def _clip() -> dict[str, Architecture]:
    """OpenAI's (Radford et al. 2021, 2103.00020), and OpenCLIP's, which have the exact GELU."""
    family = {"epsilon": 1e-5, "pre_norm": True}
    kinds = ("b", 32), ("b", 16), ("l", 14), ("l", "14_336"), ("h", 14)
    named = {f"vit_{s}_{patch}": (_SIZES[s], int(str(patch)[:2])) for s, patch in kinds}
    clip = {f"{name}_clip": kind for name, kind in named.items()}
    openclip = {f"{name}_openclip": kind for name, kind in named.items() if "336" not in name}
    return _named(clip, activation="gelu_quick", **family) | _named(openclip, **family)


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
    found: dict[str, Architecture] = {}
    for family, published in _SIGLIP.items():
        for (name, patch), sizes in published.items():
            size = _SIZES[name]
            numbers = ["", *(f"_{pixels}" for pixels in sizes[1:])]
            found |= _named(
                {f"vit_{name}_{patch}{number}_{family}": (size, patch) for number in numbers},
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
    found: dict[str, Architecture] = {}
    for name, (size, activation) in sizes.items():
        family = {"activation": activation, "layer_scale": 1e-5}
        plain = {f"dinov2_vit_{name}_14": (size, 14)}
        found |= _named(plain, resampling="bicubic", **family)
        found |= _named({f"dinov2_vit_{name}_14_reg": (size, 14)}, registers=4, **family)
    return found


def _dinov3() -> dict[str, Architecture]:
    """DINOv3 (Simeoni et al. 2025, 2508.10104), without the one of 7 billion parameters."""
    sizes = {name: (_SIZES[name], "gelu") for name in ("s", "b", "l")}
    sizes["splus"] = _SIZES["s"], "swiglu"
    sizes["hplus"] = _Size(32, 20, 64, 5120), "swiglu"
    found: dict[str, Architecture] = {}
    for name, (size, activation) in sizes.items():
        found |= _named(
            {f"dinov3_vit_{name}_16": (size, 16)},
            activation=activation,
            epsilon=1e-5,
            registers=4,
            learned_positions=False,
            rotary="dinov3",
            bias="query_value",
            layer_scale=1e-5,
        )
    return found


def _unicom() -> dict[str, Architecture]:
    """Unicom (An et al. 2023, 2304.05884)."""
    sizes = {"b_32": (32, 512), "b_16": (16, 768), "l_14": (14, 768), "l_14_336": (14, 768)}
    found: dict[str, Architecture] = {}
    for name, (patch, output_dim) in sizes.items():
        found |= _named(
            {f"unicom_vit_{name}": (_SIZES[name[0]], patch)},
            activation="relu6",
            epsilon=1e-5,
            class_token=False,
            bias="none",
            pool="flat",
            output_dim=output_dim,
        )
    return found


def _perception() -> dict[str, Architecture]:
    """Core networks of the Perception Encoder (Bolya et al. 2025, 2504.13181)."""
    sizes = {"s_16": _SIZES["s"], "b_16": _SIZES["b"], "l_14": _SIZES["l"]}
    sizes["g_14"] = _Size(50, 16, 96, 8960)
    found: dict[str, Architecture] = {}
    for name, size in sizes.items():
        found |= _named(
            {f"pe_core_vit_{name}": (size, int(name[2:]))},
            epsilon=1e-5,
            class_token=name != "g_14",
            resampling="bilinear",
            rotary="perception",
            pre_norm=True,
            pool="attention",
            pool_heads=8,
            pool_mlp_dim=4 * size.heads * size.head_dim,
        )
    return found


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

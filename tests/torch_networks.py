"""The networks of torchvision, timm and Hugging Face, with weights drawn at random."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from benchmarks.torch_peer import import_torchvision

REASON = "pip install mmljax[peers]"

RESNETS = {  # depths and kind of block
    "resnet18": ([2, 2, 2, 2], "basic"),
    "resnet34": ([3, 4, 6, 3], "basic"),
    "resnet50": ([3, 4, 6, 3], "bottleneck"),
    "resnet101": ([3, 4, 23, 3], "bottleneck"),
}
VITS = {"vit_s16": (384, 6), "vit_b16": (768, 12)}  # size and heads
LIBRARIES = ("torchvision", "timm", "transformers")


def load_torch() -> Any:
    """Import torch, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        return pytest.importorskip("torch", reason=REASON)


def load_torchvision() -> Any:
    """Import torchvision, or skip the test."""
    load_torch()
    try:
        return import_torchvision()
    except ImportError:
        pytest.skip(REASON)


def make(library: str, name: str) -> Any:
    """Return a library's counterpart of one of our networks, with classifier and new weights."""
    torch = load_torch()
    torch.manual_seed(0)
    torchvision = load_torchvision()  # timm and transformers import it where it is installed
    if library == "torchvision":
        if name in RESNETS:
            # With branches that start small, rounding does not grow from block to block.
            return torchvision.models.get_model(name, zero_init_residual=True)
        size, heads = VITS[name]
        return torchvision.models.VisionTransformer(
            224, 16, num_layers=12, num_heads=heads, hidden_dim=size, mlp_dim=4 * size
        )
    if library == "timm":
        timm = pytest.importorskip("timm", reason=REASON)
        if name in RESNETS:
            return timm.create_model(name)
        size = {"vit_s16": "small", "vit_b16": "base"}[name]
        return timm.create_model(f"vit_{size}_patch16_224", dynamic_img_size=True)
    transformers = pytest.importorskip("transformers", reason=REASON)
    if name in RESNETS:
        depths, block = RESNETS[name]
        sizes = [64 * 2**i * (4 if block == "bottleneck" else 1) for i in range(4)]
        config = transformers.ResNetConfig(depths=depths, layer_type=block, hidden_sizes=sizes)
        return transformers.ResNetForImageClassification(config)
    size, heads = VITS[name]
    config = transformers.ViTConfig(
        hidden_size=size, num_attention_heads=heads, intermediate_size=4 * size
    )
    return transformers.ViTForImageClassification(config)


def scatter(network: Any) -> Any:
    """Add noise to what starts as ones or zeros; return the network, changed in place."""
    torch = load_torch()
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim in (1, 3):  # norms, biases, tokens
                value += 0.2 * torch.randn_like(value)
        for name, value in network.named_buffers():
            if name.endswith("running_mean"):
                value.uniform_(-0.5, 0.5)
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
    return network

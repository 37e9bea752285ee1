"""The networks of torchvision, timm and Hugging Face, with weights drawn at random."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

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
    """Torch, or the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        return pytest.importorskip("torch", reason=REASON)


def load_torchvision() -> Any:
    """Torchvision, or the test is skipped.

    Its compiled operators (for boxes, unused here) do not load beside a torch of another build, and
    then the whole package cannot be imported; it can when their names are declared.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    torch = load_torch()
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip(REASON)
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool"):
            library.define(f"{name}(Tensor x) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchvision
    return torchvision


def make(library: str, name: str) -> Any:
    """A library's network that is ours of that name, with its classifier, its weights as made."""
    torch = load_torch()
    torch.manual_seed(0)
    torchvision = load_torchvision()  # timm and transformers import it where it is there
    if library == "torchvision":
        if name in RESNETS:
            # Where branches start small, rounding does not grow from block to block.
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
    """The network with what is all ones or zeros moved at random, in place; itself."""
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

"""The backbones by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flax import nnx
from jax.typing import DTypeLike

from mmljax.config import choose
from mmljax.models.resnet import RESNETS, ResNet
from mmljax.models.vit import VITS, VisionTransformer

Backbone = ResNet | VisionTransformer
"""``(images, *, train) -> features``; ``output`` says whether these are a map or tokens."""

BACKBONES: Mapping[str, Callable[..., Backbone]] = {**RESNETS, **VITS}


def make_backbone(
    name: str, *, width: int, channels: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> Backbone:
    """Build a backbone by its name, with random parameters.

    Convolutions of a ResNet start as He et al. (1502.01852, fan-out), linear layers and position
    embeddings of a ViT from a normal distribution of deviation 0.02.

    Args:
      name: a key of ``BACKBONES``.
      width: channels of a ResNet's stem and of its first stage's 3 x 3 convolutions, or of an
        attention head of a ViT; 64 is the published size of both.
      channels: of the images.
      dtype: of the computation; parameters, BatchNorm's statistics, layer norms and softmax are
        float32.
      rngs: for the parameters; no random state stays in the network.

    Raises:
      UserError: on an unknown name.
    """
    build = choose(BACKBONES, name, key="config.model.backbone")
    return build(width=width, channels=channels, dtype=dtype, rngs=rngs)

"""The table of backbones by name, and their construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flax import nnx
from jax.typing import DTypeLike

from mmljax.config import choose
from mmljax.models.architectures import VITS
from mmljax.models.drop_path import set_drop_path
from mmljax.models.efficientnet import EFFICIENTNETS, EfficientNetLite
from mmljax.models.resnet import RESNETS, ResNet
from mmljax.models.vit import VisionTransformer

Backbone = ResNet | EfficientNetLite | VisionTransformer
"""``(images, *, train, keys=None) -> features``, a map, tokens or a vector as ``output``
says.

``layers()`` has the names of the modules of each layer, from the stem to the last.
"""

BACKBONES: Mapping[str, Callable[..., Backbone]] = {**RESNETS, **EFFICIENTNETS, **VITS}


def make_backbone(
    name: str,
    *,
    width: int,
    channels: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
    remat: bool = False,
) -> Backbone:
    """Build a backbone by its name, with random parameters.

    Convolutions of a ResNet or EfficientNet are initialised as He et al. (1502.01852, fan-out),
    linear layers and position embeddings of a ViT from a normal distribution of deviation 0.02.

    Args:
      name: a key of ``BACKBONES``.
      width: 64 gives the published network. It is the channels of a ResNet's stem and first stage;
        those of an EfficientNet, and of a ViT's heads, are in proportion to it.
      channels: of the images.
      dtype: of the computation; layer norms and the softmax use float32 at least, and
        parameters and BatchNorm's statistics are float32.
      rngs: for the parameters; the network keeps no random state.
      drop_path: rate at which the last block's branch is dropped in training; that of the others
        is in proportion to their depth.
      remat: whether the backward pass computes the activations of each block again.

    Raises:
      UserError: on an unknown name.
    """
    build = choose(BACKBONES, name, key="config.model.backbone")
    backbone = build(width=width, channels=channels, dtype=dtype, rngs=rngs)
    set_drop_path(backbone.blocks, drop_path)
    for block in backbone.blocks:
        block.remat = remat
    return backbone

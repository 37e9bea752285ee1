"""The table of backbones by name, and their construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flax import nnx
from jax.typing import DTypeLike

from mmljax.config import choose
from mmljax.models.efficientnet import EFFICIENTNETS, EfficientNetLite
from mmljax.models.resnet import RESNETS, ResNet
from mmljax.models.vit import VITS, VisionTransformer

Backbone = ResNet | EfficientNetLite | VisionTransformer
"""``(images, *, train) -> features``; ``output`` says whether these are a map or tokens.

``layers()`` has the names of the modules of each layer, from the stem to the last.
"""

BACKBONES: Mapping[str, Callable[..., Backbone]] = {**RESNETS, **EFFICIENTNETS, **VITS}


def make_backbone(
    name: str, *, width: int, channels: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> Backbone:
    """Build a backbone by its name, with random parameters.

    Convolutions of a ResNet or EfficientNet are initialised as He et al. (1502.01852, fan-out),
    linear layers and position embeddings of a ViT from a normal distribution of deviation 0.02.

    Args:
      name: a key of ``BACKBONES``.
      width: 64 gives the published network. It is the channels of a ResNet's stem and first stage,
        or of an attention head of a ViT; an EfficientNet's channels are in proportion to it.
      channels: of the images.
      dtype: of the computation; parameters, BatchNorm's statistics, layer norms and softmax are
        float32.
      rngs: for the parameters; the network keeps no random state.

    Raises:
      UserError: on an unknown name.
    """
    build = choose(BACKBONES, name, key="config.model.backbone")
    return build(width=width, channels=channels, dtype=dtype, rngs=rngs)

"""The embedder: pixels to unit vectors through a backbone, a pooling and a projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from mmljax.config import ModelConfig, choose
from mmljax.models.resnet import ResNet, make_backbone
from mmljax.numerics import l2_normalize

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], red, green and blue
_DEVIATION = (0.229, 0.224, 0.225)


def _average(x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
    return jnp.mean(x, axis=(1, 2))


def _maximum(x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
    return jnp.max(x, axis=(1, 2))


def _average_and_maximum(x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
    return _average(x) + _maximum(x)


POOLINGS: Mapping[str, Callable[[Array], Array]] = {
    "average": _average,
    "max": _maximum,
    "average+max": _average_and_maximum,
}
LAYER_NORMS = {name: name for name in ("none", "before", "after")}
BATCH_NORMS = {"global": False, "frozen": True}
COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


class Head(nnx.Module):
    """Pooling, projection and unit length, with a layer norm without parameters if asked.

    Computes in float32 whatever the feature map's dtype (in float64 for a float64 map).
    """

    def __init__(
        self, features: int, size: int, *, pooling: str, layer_norm: str, rngs: nnx.Rngs
    ) -> None:
        self.pool = choose(POOLINGS, pooling, key="config.model.pooling")
        self.layer_norm = choose(LAYER_NORMS, layer_norm, key="config.model.layer_norm")
        self.projection = nnx.Linear(features, size, precision="highest", rngs=rngs)

    def __call__(self, x: Float[Array, "b h w f"]) -> Float[Array, "b d"]:
        """Unit vectors of a feature map."""
        x = self.pool(x.astype(_at_least_float32(x.dtype)))
        if self.layer_norm == "before":
            x = jax.nn.standardize(x)
        x = self.projection(x)
        if self.layer_norm == "after":
            x = jax.nn.standardize(x)
        return l2_normalize(x)


class Embedder(nnx.Module):
    """``backbone`` and ``head``: optimiser groups are told by these names."""

    def __init__(
        self, backbone: ResNet, head: Head, *, frozen_batch_norm: bool, dtype: DTypeLike
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.frozen_batch_norm = frozen_batch_norm
        self.dtype = dtype

    def __call__(
        self, images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b d"]:
        """Unit vectors of images.

        Args:
          images: pixels from 0 to 255; three channels are red, green and blue.
          train: whether BatchNorm uses the global batch's statistics and moves its running ones,
            which needs a ``shard_map`` over the mesh axis ``data``; of no effect if it is frozen.
        """
        x = normalize_pixels(images, dtype=_at_least_float32(self.dtype))
        return self.head(self.backbone(x, train=train and not self.frozen_batch_norm))


def make_embedder(config: ModelConfig, *, channels: int, rngs: nnx.Rngs) -> Embedder:
    """Build the embedder that a config describes.

    Parameters and BatchNorm's statistics are float32 (float64 if that is the compute dtype). No
    random state stays in the network.

    Args:
      config: of the model.
      channels: of the images.
      rngs: for the parameters.

    Raises:
      UserError: on an unknown backbone, pooling, layer norm, batch norm or compute dtype.
    """
    dtype = choose(COMPUTE_DTYPES, config.compute_dtype, key="config.model.compute_dtype")
    frozen = choose(BATCH_NORMS, config.batch_norm, key="config.model.batch_norm")
    backbone = make_backbone(
        config.backbone, width=config.width, channels=channels, dtype=dtype, rngs=rngs
    )
    head = Head(
        backbone.features,
        config.embedding_size,
        pooling=config.pooling,
        layer_norm=config.layer_norm,
        rngs=rngs,
    )
    model = Embedder(backbone, head, frozen_batch_norm=frozen, dtype=dtype)
    kind = _at_least_float32(dtype)
    nnx.update(model, jax.tree.map(lambda x: x.astype(kind), nnx.state(model)))
    return model


def normalize_pixels(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"], *, dtype: DTypeLike
) -> Float[Array, "b h w c"]:
    """Pixels from 0 to 255, standardised.

    Three channels by ImageNet's mean and deviation; any other number to the range from -1 to 1.
    """
    mean, deviation = (_MEAN, _DEVIATION) if images.shape[-1] == 3 else (0.5, 0.5)
    return (images.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(deviation, dtype)


def _at_least_float32(dtype: DTypeLike) -> DTypeLike:
    return jnp.promote_types(dtype, jnp.float32)

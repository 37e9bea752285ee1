"""The embedder: a backbone, a pooling and a projection from pixels to unit vectors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from mmljax.config import ModelConfig, choose
from mmljax.errors import UserError
from mmljax.models.backbones import Backbone, make_backbone
from mmljax.models.head import Head
from mmljax.models.lora import add_adapters
from mmljax.models.pooling import POOLINGS
from mmljax.models.remat import REMATS, rematerialized
from mmljax.models.vit import VisionTransformer
from mmljax.models.weight_files import PACKAGED_WEIGHTS
from mmljax.numerics import at_least_float32
from mmljax.preprocessing import preprocessing

PIXEL_NORMS = {  # mean and deviation of pixels in [0, 1], red, green and blue
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    # (pixel - 127) / 128, as the published EfficientNet-Lite networks were trained
    "efficientnet_lite": ((127 / 255,) * 3, (128 / 255,) * 3),
}
AUTO = "auto"
_BACKBONE = 2  # the stream of the backbone's keys; the head's layers use 0 and 1
BATCH_NORMS = {"global": False, "frozen": True}
COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


class Embedder(nnx.Module):
    """``backbone`` and ``head``, the names by which optimiser groups are selected."""

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        frozen_batch_norm: bool,
        pixel_norm: str,
        dtype: DTypeLike,
        remat: bool = False,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.frozen_batch_norm = frozen_batch_norm
        self.pixel_norm = pixel_norm
        self.dtype = dtype
        self.remat = remat  # of the backbone as a whole

    def __call__(
        self,
        images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"] | Float[Array, "b f"],
        *,
        train: bool,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "b d"]:
        """Return unit vectors of images.

        Args:
          images: pixels from 0 to 255, three channels being red, green and blue; or pooled
            features ``[b f]`` in their place.
          train: whether dropout and stochastic depth are active, and BatchNorm uses the global
            batch's statistics and updates its running ones, which needs a ``shard_map`` over the
            mesh axis ``data``. A frozen BatchNorm of the backbone always uses its running
            statistics.
          keys: one per image, for what is random in training; without them nothing is.
        """
        features = images
        if images.ndim > 2:
            features = self._backbone_of(images, train=train, keys=keys)
        return self.head(features, train=train, keys=keys)

    def pooled(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b f"]:
        """Return the pooled features of images in evaluation, which ``__call__`` takes as well."""
        return self.head.pooled(self._backbone_of(images, train=False))

    def without_backbone(self, features: int) -> FeatureEmbedder:
        """Return the head alone, as an embedder of pooled features.

        Raises:
          UserError: if the backbone gives another number of channels than ``features``.
        """
        if features != self.backbone.features:
            raise UserError(
                f"--config.data.directory has features of {features} channels, but the backbone "
                f"gives {self.backbone.features}; make the features with this config's model"
            )
        return FeatureEmbedder(self.head)

    def _backbone_of(
        self, images: Array, *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b *n f"]:
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _BACKBONE) if train else None

        def apply(backbone: Any, inputs: Any) -> Array:
            images, keys = inputs
            dtype = at_least_float32(self.dtype)
            x = normalize_pixels(images, norm=PIXEL_NORMS[self.pixel_norm], dtype=dtype)
            return backbone(x, train=train and not self.frozen_batch_norm, keys=keys)

        inputs = (images, keys)
        if self.remat:
            return rematerialized(apply, self.backbone, inputs)
        return apply(self.backbone, inputs)


class FeatureEmbedder(nnx.Module):
    """The ``head`` of an embedder, on features that its backbone gave before."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def __call__(
        self, features: Float[Array, "b f"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b d"]:
        """Return unit vectors of pooled features; ``train`` and ``keys`` as in ``Embedder``."""
        return self.head(features, train=train, keys=keys)

    def pooled(self, features: Float[Array, "b f"]) -> Float[Array, "b f"]:
        """Return the features, in float32 at least."""
        return self.head.pooled(features)


def make_embedder(config: ModelConfig, *, channels: int, rngs: nnx.Rngs) -> Embedder:
    """Build the embedder that a config describes.

    Parameters and BatchNorm's statistics are float32 (float64 if that is the compute dtype). The
    network keeps no random state.

    Args:
      config: of the model.
      channels: of the images.
      rngs: for the parameters.

    Raises:
      UserError: on an unknown backbone, pooling, layer norm, batch norm, pixel norm, compute dtype
        or remat, a pooling, adapters or patch dropout that do not fit the backbone, or a pixel norm
        that does not fit the weights.
    """
    dtype = choose(COMPUTE_DTYPES, config.compute_dtype, key="config.model.compute_dtype")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UserError(
            "--config.model.compute_dtype=float64 would be computed in float32: set the "
            "environment variable JAX_ENABLE_X64=1, or use float32"
        )
    frozen = choose(BATCH_NORMS, config.batch_norm, key="config.model.batch_norm")
    blocks, whole = choose(REMATS, config.remat, key="config.model.remat")
    backbone = make_backbone(
        config.backbone,
        width=config.width,
        channels=channels,
        dtype=dtype,
        rngs=rngs,
        drop_path=config.drop_path,
        remat=blocks,
    )
    _set_patch_keep(backbone, config)
    fitting = POOLINGS[backbone.output]
    known = {name for names in POOLINGS.values() for name in names}
    if config.pooling in known - fitting.keys():
        raise UserError(
            f"--config.model.pooling={config.pooling!r} does not fit --config.model.backbone="
            f"{config.backbone!r}; use one of: {', '.join(fitting)}"
        )
    head = Head(
        backbone.features,
        config.embedding_size,
        config=config,
        rngs=rngs,
        output=backbone.output,
    )
    model = Embedder(
        backbone,
        head,
        frozen_batch_norm=frozen,
        pixel_norm=choose_pixel_norm(
            config.pixel_norm, pretrained=config.pretrained, backbone=config.backbone
        ),
        dtype=dtype,
        remat=whole,
    )
    # The last to draw from rngs, so that all other parameters are those without adapters.
    add_adapters(backbone, config.lora, name=config.backbone, rngs=rngs)
    kind = at_least_float32(dtype)
    nnx.update(model, jax.tree.map(lambda x: x.astype(kind), nnx.state(model)))
    return model


def _set_patch_keep(backbone: Backbone, config: ModelConfig) -> None:
    if config.patch_keep == 1:
        return
    if not isinstance(backbone, VisionTransformer) or backbone.output != "tokens":
        raise UserError(
            f"--config.model.patch_keep={config.patch_keep:g}: --config.model.backbone="
            f"{config.backbone!r} cannot do without a part of its patches; use a vision "
            "transformer other than Unicom's, or --config.model.patch_keep=1"
        )
    backbone.patch_keep = config.patch_keep


def choose_pixel_norm(name: str, *, pretrained: str, backbone: str) -> str:
    """Return the key of ``PIXEL_NORMS`` for a config.

    Args:
      name: a key of ``PIXEL_NORMS``; or ``auto`` for that of the weights where they are a package,
        that of the backbone's family of ViTs otherwise, and ``imagenet`` for any other backbone.
      pretrained: ``config.model.pretrained``.
      backbone: ``config.model.backbone``.

    Raises:
      UserError: if the name is unknown, or is not that of the packaged weights.
    """
    packaged = PACKAGED_WEIGHTS.get(pretrained)
    own = packaged.pixel_norm if packaged else None
    if name == AUTO:
        return own or preprocessing(backbone).pixel_norm
    choose({**PIXEL_NORMS, AUTO: None}, name, key="config.model.pixel_norm")
    if own and name != own:
        raise UserError(
            f"--config.model.pixel_norm={name!r} does not fit --config.model.pretrained="
            f"{pretrained!r}, which was trained with {own!r}; use {AUTO!r}"
        )
    return name


def normalize_pixels(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    *,
    norm: tuple[tuple[float, ...], tuple[float, ...]],
    dtype: DTypeLike,
) -> Float[Array, "b h w c"]:
    """Return pixels from 0 to 255, standardised.

    Args:
      images: the pixels.
      norm: mean and deviation of three channels in [0, 1], a value of ``PIXEL_NORMS``; with any
        other number of channels, pixels are mapped to the range from -1 to 1.
      dtype: of the result.
    """
    mean, deviation = norm if images.shape[-1] == 3 else (0.5, 0.5)
    return (images.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(deviation, dtype)

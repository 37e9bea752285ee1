"""Low-rank adapters of vision transformers (LoRA: Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmljax.config import LoraConfig, choose
from mmljax.errors import UserError
from mmljax.models.backbones import Backbone
from mmljax.models.vit import VisionTransformer

TARGETS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "attention": (("attn", "qkv"), ("attn", "proj")),
    "mlp": (("mlp", "fc1"), ("mlp", "fc2")),
}
"""The linear layers of a block, by the names of ``config.model.lora.targets``."""

_ADAPTER = "lora"  # what flax.nnx.LoRALinear calls its adapter


class AdaptedLinear(nnx.LoRALinear):
    """A linear layer with an adapter: ``W x + b + (alpha / rank) B A x`` (equation 3).

    ``A`` starts from a normal distribution of variance ``1 / inputs``, ``B`` as 0, so the layer
    starts as its base. The base's arrays keep their names.
    """

    def __init__(self, base: nnx.Linear, *, rank: int, alpha: float, rngs: nnx.Rngs) -> None:
        super().__init__(
            base.in_features,
            base.out_features,
            lora_rank=rank,
            lora_dtype=base.dtype,
            a_initializer=nnx.initializers.lecun_normal(),
            use_bias=base.use_bias,
            kernel_init=nnx.initializers.zeros,  # replaced
            dtype=base.dtype,
            rngs=rngs,
        )
        self.kernel, self.bias = base.kernel, base.bias
        self.scale = alpha / rank

    def __call__(
        self, x: Float[Array, "*b inputs"], out_sharding: Any = None
    ) -> Float[Array, "*b outputs"]:
        """Return the base's output and the adapter's."""
        y = nnx.Linear.__call__(self, x, out_sharding=out_sharding)
        return y + self.scale * self.lora(x)


def add_adapters(backbone: Backbone, config: LoraConfig, *, name: str, rngs: nnx.Rngs) -> None:
    """Replace the layers that the config names by adapted ones; none where its rank is 0.

    One adapter serves queries, keys and values, which are one layer here. The paper adapts each
    matrix separately.

    Args:
      backbone: whose blocks are changed.
      config: of the adapters.
      name: of the backbone, for errors.
      rngs: for the adapters.

    Raises:
      UserError: if the backbone has no attention or not so many blocks, the rank is above a token's
        channels, or a target is unknown.
    """
    if not config.rank:
        return
    found = f"--config.model.lora.rank={config.rank}"
    if not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{found}: --config.model.backbone={name!r} has no attention to adapt; use a vision "
            "transformer such as 'vit_b16', or --config.model.lora.rank=0"
        )
    channels, depth = backbone.kind.embed_dim, len(backbone.blocks)
    if config.rank > channels:
        raise UserError(
            f"{found} is above the {channels} channels of {name!r}, and its adapters would be "
            f"larger than the layers; use at most {channels}, such as 8"
        )
    if config.blocks > depth:
        raise UserError(
            f"--config.model.lora.blocks={config.blocks}: {name!r} has {depth} blocks; use at most "
            f"{depth}, or 0 for all"
        )
    layers = [
        layer
        for target in dict.fromkeys(config.targets)
        for layer in choose(TARGETS, target, key="config.model.lora.targets")
    ]
    for block in list(backbone.blocks)[-config.blocks :]:
        for part, layer in layers:
            owner = getattr(block, part)
            base = getattr(owner, layer)
            adapted = AdaptedLinear(base, rank=config.rank, alpha=config.alpha, rngs=rngs)
            setattr(owner, layer, adapted)


def refuse_on_features(config: LoraConfig) -> None:
    """Refuse adapters where the backbone's features are cached.

    Raises:
      UserError: if the rank is not 0.
    """
    if config.rank:
        raise UserError(
            f"--config.model.lora.rank={config.rank} does not go with cached features, which are "
            "of the backbone without adapters; set --config.model.lora.rank=0"
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter with this path is an adapter's, such as ``attn.qkv.lora.lora_a``."""
    return _ADAPTER in name.split(".")


def merge_adapters(network: Any, config: LoraConfig) -> Any:
    """Return a network's parameters with each adapter added to its layer's kernel.

    ``W + (alpha / rank) B A``, at the highest precision: the network without adapters then computes
    what the adapted one does, to rounding.

    Args:
      network: nested mappings of arrays.
      config: with which it was made.
    """
    if not isinstance(network, Mapping):
        return network
    merged = {k: merge_adapters(v, config) for k, v in network.items() if k != _ADAPTER}
    if _ADAPTER in network:
        a, b = network[_ADAPTER]["lora_a"], network[_ADAPTER]["lora_b"]
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        merged["kernel"] = network["kernel"] + config.alpha / config.rank * update
    return merged

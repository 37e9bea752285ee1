"""The vision transformer (ViT) of all families (Dosovitskiy et al. 2020, 2010.11929).

``architectures`` has the families as data. Modules have timm's names (``patch_embed``,
``blocks.0.attn.qkv``, ``norm``, ...).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from mmljax.errors import UserError
from mmljax.mesh import AXIS
from mmljax.models.attention import Attention, AttentionPool, Bias, Mlp, layer_norm
from mmljax.models.convolution import conv
from mmljax.models.drop_path import ResidualBlock
from mmljax.models.patch_dropout import draw_patches, keep_patches
from mmljax.models.positions import (
    Filter,
    Rotary,
    RotaryKind,
    resample_positions,
    rotary_table,
)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Hyperparameters of a vision transformer."""

    depth: int  # blocks
    heads: int
    head_dim: int  # channels of a head
    mlp_dim: int  # channels between the two layers of an MLP
    patch_size: int  # pixels, the side of a patch
    grid_size: int  # patches along a side of its pretraining images
    activation: str = "gelu"  # a key of attention.ACTIVATIONS
    epsilon: float = 1e-6  # of layer norms
    class_token: bool = True
    registers: int = 0  # register tokens (Darcet et al. 2023, 2309.16588)
    learned_positions: bool = True  # position embeddings of class token and patches
    resampling: Filter = "bicubic_antialias"  # of position embeddings, for other image sizes
    rotary: RotaryKind = "none"  # rotary position embeddings in the attention
    bias: Bias = "all"  # which of the query, key and value projections have one
    layer_scale: float = 0.0  # initial LayerScale (2103.17239); 0: no LayerScale
    pre_norm: bool = False  # a layer norm before the first block; the patch embedding has no bias
    pool: Literal["class", "attention", "flat"] = "class"
    pool_heads: int = 0  # of the attention pool
    pool_mlp_dim: int = 0  # of its MLP
    output_dim: int = 0  # channels of the flat pool's output

    @property
    def embed_dim(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def of_width(self, width: int) -> Architecture:
        """Return a copy with ``width / 64`` times the channels; heads and depth are unchanged.

        With rotary positions the channels of a head are a multiple of 4.
        """
        step = 1 if self.rotary == "none" else 4
        head_dim = max(1, self.head_dim * width // 64 // step) * step

        def scaled(channels: int) -> int:
            return -(-channels * head_dim // self.head_dim)

        return dataclasses.replace(
            self,
            head_dim=head_dim,
            mlp_dim=scaled(self.mlp_dim),
            pool_mlp_dim=scaled(self.pool_mlp_dim),
            output_dim=scaled(self.output_dim),
        )


class Block(ResidualBlock):
    """A pre-norm transformer block: attention and MLP, each on normalised input, both residual."""

    def __init__(self, kind: Architecture, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size = kind.embed_dim
        self.norm1 = layer_norm(size, epsilon=kind.epsilon, dtype=dtype, rngs=rngs)
        self.attn = Attention(size, kind.heads, bias=kind.bias, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(size, epsilon=kind.epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(size, kind.mlp_dim, activation=kind.activation, dtype=dtype, rngs=rngs)
        self.gamma1, self.gamma2 = (
            nnx.Param(jnp.full(size, kind.layer_scale)) if kind.layer_scale else None
            for _ in range(2)
        )

    def __call__(
        self,
        x: Float[Array, "b n f"],
        *,
        keys: PRNGKeyArray | None = None,
        rotary: Rotary | None = None,
    ) -> Float[Array, "b n f"]:
        """Return the sum of the input, the attention's output and the MLP's output.

        With ``keys`` each of the two outputs may be dropped.
        """
        x = x + self.drop(_scale(self.attn(self.norm1(x), rotary=rotary), self.gamma1), keys)
        return x + self.drop(_scale(self.mlp(self.norm2(x)), self.gamma2), keys, place=1)


def _scale(x: Float[Array, "b n f"], gamma: nnx.Param[Array] | None) -> Float[Array, "b n f"]:
    return x if gamma is None else x * gamma[...].astype(x.dtype)


class FlatPool(nnx.Module):
    """Two linear layers with BatchNorm on the concatenated tokens (Unicom, 2304.05884)."""

    def __init__(self, inputs: int, kind: Architecture, *, rngs: nnx.Rngs) -> None:
        def norm(channels: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(
                channels,
                momentum=0.9,
                epsilon=2e-5,
                axis_name=AXIS,
                use_fast_variance=False,
                rngs=rngs,
            )

        self.linear1 = nnx.Linear(
            inputs, kind.embed_dim, use_bias=False, precision="highest", rngs=rngs
        )
        self.norm1 = norm(kind.embed_dim)
        self.linear2 = nnx.Linear(
            kind.embed_dim, kind.output_dim, use_bias=False, precision="highest", rngs=rngs
        )
        self.norm2 = norm(kind.output_dim)

    def __call__(self, x: Float[Array, "b n f"], *, train: bool) -> Float[Array, "b d"]:
        """Return one vector per image; BatchNorm uses the batch's statistics in training."""
        x = self.norm1(self.linear1(x.reshape(x.shape[0], -1)), use_running_average=not train)
        return self.norm2(self.linear2(x), use_running_average=not train)


class VisionTransformer(nnx.Module):
    """Patch embedding, class and register tokens, blocks, a layer norm, the network's own pooling.

    Position embeddings are learned for ``grid_size`` patches a side. For any other image size the
    forward pass interpolates them with the filter of ``Architecture.resampling``; timm and OpenCLIP
    interpolate once, when they load weights, and then train the result. There is no dropout.
    ``features`` is the channels of a token, or of the vector where ``output`` is ``vector``.
    """

    patch_keep = 1.0  # share of the patches that are kept in training

    def __init__(
        self, kind: Architecture, *, channels: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        size = kind.embed_dim
        self.kind = kind
        self.output = "vector" if kind.pool == "flat" else "tokens"
        self.features = kind.output_dim if kind.pool == "flat" else size
        self.patch_embed = nnx.Conv(
            channels,
            size,
            (kind.patch_size, kind.patch_size),
            strides=kind.patch_size,
            padding="VALID",
            use_bias=not kind.pre_norm,
            dtype=dtype,
            rngs=rngs,
        )
        if kind.class_token:
            self.cls_token = nnx.Param(jnp.zeros((1, 1, size)))
        if kind.registers:
            self.reg_token = nnx.Param(jnp.zeros((1, kind.registers, size)))
        if kind.learned_positions:
            positions = (1, kind.class_token + kind.grid_size**2, size)
            self.pos_embed = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), positions))
        if kind.pre_norm:
            self.norm_pre = layer_norm(size, epsilon=kind.epsilon, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(kind, dtype=dtype, rngs=rngs) for _ in range(kind.depth)])
        self.norm = layer_norm(size, epsilon=kind.epsilon, dtype=dtype, rngs=rngs)
        if kind.pool == "attention":
            self.attn_pool = AttentionPool(
                size,
                kind.pool_heads,
                kind.pool_mlp_dim,
                activation=kind.activation,
                epsilon=kind.epsilon,
                dtype=dtype,
                rngs=rngs,
            )
        if kind.pool == "flat":
            self.feature = FlatPool(kind.grid_size**2 * size, kind, rngs=rngs)

    def layers(self) -> list[tuple[str, ...]]:
        """Names of the modules of each layer: the tokens' embedding, each block, norm and pool."""

        def present(*names: str) -> tuple[str, ...]:
            return tuple(name for name in names if hasattr(self, name))

        first = present("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre")
        blocks = [(f"blocks.{i}",) for i in range(len(self.blocks))]
        return [first, *blocks, present("norm", "attn_pool", "feature")]

    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b *n features"]:
        """Return the network's own summary of an image, then the patches by rows.

        The dtype is float32 at least. The summary is the class token, or the attention pool's
        output; registers are left out. A network with a flat pool returns its vector alone.
        Training and evaluation are the same, but for the BatchNorm of a flat pool, and with
        ``keys``, one per example, for patches that are left out (``patch_keep``) and residual
        branches that are dropped at the blocks' rates.

        Raises:
          UserError: if the image's height or width is not a multiple of the patch's, or a flat
            pool gets another number of patches than its own.
        """
        kind = self.kind
        tokens = self.tokens(x, keys=keys)
        if kind.pool == "flat":
            return self.feature(tokens, train=train)
        patches = tokens[:, kind.class_token + kind.registers :]
        if kind.pool == "attention":
            summary = self.attn_pool(tokens)[:, None].astype(tokens.dtype)
        else:
            summary = tokens[:, :1]
        return jnp.concatenate([summary, patches], axis=1)

    def tokens(
        self, x: Float[Array, "b h w channels"], *, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b n f"]:
        """Return class token, registers and patches by rows, after the last layer norm."""
        kind = self.kind
        self._check_size(x.shape[1], x.shape[2])
        x = self._embed_patches(x)
        b, rows, columns, size = x.shape
        x = x.reshape(b, rows * columns, size)
        if kind.class_token:
            x = jnp.concatenate([_expand(self.cls_token, x), x], axis=1)
        if kind.learned_positions:
            positions = resample_positions(
                self.pos_embed[...], kind.grid_size, rows, columns, kind=kind.resampling
            )
            x = x + positions.astype(x.dtype)
        if kind.registers:
            parts = [x[:, : kind.class_token], _expand(self.reg_token, x), x[:, kind.class_token :]]
            x = jnp.concatenate(parts, axis=1)
        if kind.pre_norm:
            x = self.norm_pre(x).astype(x.dtype)
        rotary = rotary_table(kind.rotary, rows, columns, kind.head_dim, int(kind.class_token))
        if keys is not None and self.patch_keep < 1:
            numbers = draw_patches(keys, patches=rows * columns, share=self.patch_keep)
            x, rotary = keep_patches(x, rotary, numbers, first=kind.class_token + kind.registers)
        for block in self.blocks:
            x = block.run(x, keys=keys, rotary=rotary)
        return self.norm(x)

    def _check_size(self, height: int, width: int) -> None:
        patch, side = self.kind.patch_size, self.kind.grid_size * self.kind.patch_size
        if height % patch or width % patch:
            raise UserError(
                f"--config.data.image_size: this ViT takes multiples of {patch} pixels, "
                f"found an image of {height} x {width}"
            )
        if self.kind.pool == "flat" and (height, width) != (side, side):
            raise UserError(
                f"--config.data.image_size: this ViT takes {side} x {side} pixels alone, since its "
                f"pooling is a layer of all patches; found an image of {height} x {width}"
            )

    def _embed_patches(self, x: Array) -> Array:
        dtype = self.patch_embed.dtype
        kernel = self.patch_embed.kernel[...].astype(dtype)
        y = conv(x.astype(dtype), kernel, strides=self.kind.patch_size)
        bias = self.patch_embed.bias
        return y if bias is None else y + bias[...].astype(dtype)


def _expand(tokens: nnx.Param[Array], x: Float[Array, "b n f"]) -> Float[Array, "b k f"]:
    return jnp.broadcast_to(tokens[...].astype(x.dtype), (x.shape[0], *tokens[...].shape[1:]))

"""Vision transformers: ViT-S/16 and ViT-B/16 (Dosovitskiy et al. 2020, 2010.11929).

Modules have timm's names (``patch_embed``, ``blocks.0.attn.qkv``, ``norm``, ...).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from mmljax.errors import UserError
from mmljax.models.convolution import conv
from mmljax.models.drop_path import ResidualBlock
from mmljax.numerics import at_least_float32

PATCH = 16  # pixels, the side of a patch
GRID = 14  # patches along a side of the image for which position embeddings are kept: 224 pixels


class Attention(nnx.Module):
    """Self-attention with several heads; one projection computes queries, keys and values."""

    def __init__(self, size: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.qkv = _linear(size, 3 * size, dtype=dtype, rngs=rngs)
        self.proj = _linear(size, size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n f"]) -> Float[Array, "b n f"]:
        """The softmax is computed in float32 (at least)."""
        b, n, size = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, size // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        logits = jnp.einsum(
            "bqhd,bkhd->bhqk", query, key, preferred_element_type=at_least_float32(qkv.dtype)
        )
        weights = jax.nn.softmax(logits / (size // self.heads) ** 0.5).astype(value.dtype)
        return self.proj(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(b, n, size))


class Mlp(nnx.Module):
    """Two layers, the inner one four times as wide, with an exact GELU."""

    def __init__(self, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.fc1 = _linear(size, 4 * size, dtype=dtype, rngs=rngs)
        self.fc2 = _linear(4 * size, size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n f"]) -> Float[Array, "b n f"]:
        """Transform each token separately."""
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Block(ResidualBlock):
    """Attention and MLP, each on a layer norm of its input and added to it (pre-norm)."""

    def __init__(self, size: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm1 = _layer_norm(size, dtype=dtype, rngs=rngs)
        self.attn = Attention(size, heads, dtype=dtype, rngs=rngs)
        self.norm2 = _layer_norm(size, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(size, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n f"], *, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b n f"]:
        """Return the sum of the input, the attention's output and the MLP's output.

        With ``keys`` each of the two outputs may be dropped.
        """
        x = x + self.drop(self.attn(self.norm1(x)), keys)
        return x + self.drop(self.mlp(self.norm2(x)), keys, place=1)


class VisionTransformer(nnx.Module):
    """Patches of 16 x 16 pixels and a class token, ``depth`` blocks and a layer norm.

    Position embeddings are those of a 224 px image; for any other size they are resampled in the
    forward pass, by a bicubic filter with antialiasing (a = -0.5): timm's numbers, though timm
    resamples once, when it loads weights, and then trains the result. Layer norms have epsilon
    1e-6, as torchvision's and timm's (Hugging Face: 1e-12). There is no dropout.
    ``features`` is the length of a token.
    """

    output = "tokens"

    def __init__(
        self,
        depth: int,
        heads: int,
        *,
        width: int,
        channels: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        size = self.features = heads * width
        self.patch_embed = nnx.Conv(
            channels, size, (PATCH, PATCH), strides=PATCH, padding="VALID", dtype=dtype, rngs=rngs
        )
        self.cls_token = nnx.Param(jnp.zeros((1, 1, size)))
        positions = (1, 1 + GRID * GRID, size)
        self.pos_embed = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), positions))
        self.blocks = nnx.List([Block(size, heads, dtype=dtype, rngs=rngs) for _ in range(depth)])
        self.norm = _layer_norm(size, dtype=dtype, rngs=rngs)

    def layers(self) -> list[tuple[str, ...]]:
        """Names of the modules of each layer: the tokens' embedding, each block, the last norm."""
        blocks = [(f"blocks.{i}",) for i in range(len(self.blocks))]
        return [("patch_embed", "cls_token", "pos_embed"), *blocks, ("norm",)]

    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b n features"]:
        """Return the class token, then the patches by rows, in float32 (at least).

        Training and evaluation are the same, but for residual branches that are dropped at the
        blocks' rates with ``keys``, one per example.

        Raises:
          UserError: if the image's height or width is not a multiple of 16 pixels.
        """
        del train
        if x.shape[1] % PATCH or x.shape[2] % PATCH:
            raise UserError(
                f"--config.data.image_size: a ViT takes multiples of {PATCH} pixels, "
                f"found an image of {x.shape[1]} x {x.shape[2]}"
            )
        x = self._embed_patches(x)
        b, rows, columns, size = x.shape
        first = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (b, 1, size))
        x = jnp.concatenate([first, x.reshape(b, rows * columns, size)], axis=1)
        x = x + resample_positions(self.pos_embed[...], rows, columns).astype(x.dtype)
        for block in self.blocks:
            x = block.run(x, keys=keys)
        return self.norm(x)

    def _embed_patches(self, x: Array) -> Array:
        assert self.patch_embed.bias is not None
        kernel, bias = self.patch_embed.kernel[...], self.patch_embed.bias[...]
        dtype = self.patch_embed.dtype
        y = conv(x.astype(dtype), kernel.astype(dtype), strides=PATCH)
        return y + bias.astype(dtype)


def resample_positions(
    positions: Float[Array, "1 m f"], rows: int, columns: int
) -> Float[Array, "1 n f"]:
    """Return position embeddings of the class token and of a grid of another size.

    Args:
      positions: of the class token and of ``GRID * GRID`` patches by rows.
      rows: patches from top to bottom, of the result.
      columns: patches from left to right.

    Returns:
      ``[1, 1 + rows * columns, f]``; as given where the grid is the same.
    """
    if (rows, columns) == (GRID, GRID):
        return positions
    size = positions.shape[-1]
    grid = positions[:, 1:].reshape(1, GRID, GRID, size)
    grid = jax.image.resize(grid, (1, rows, columns, size), method="cubic", antialias=True)
    return jnp.concatenate([positions[:, :1], grid.reshape(1, rows * columns, size)], axis=1)


VITS: Mapping[str, Callable[..., VisionTransformer]] = {
    "vit_s16": functools.partial(VisionTransformer, 12, 6),
    "vit_b16": functools.partial(VisionTransformer, 12, 12),
}
"""Constructors ``(*, width, channels, dtype, rngs)``; the width is that of a head, published: 64.

Touvron et al. (2020, 2012.12877) gave the S its 6 heads.
"""


def _linear(inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, kernel_init=nnx.initializers.normal(0.02), dtype=dtype, rngs=rngs
    )


def _layer_norm(size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        size, epsilon=1e-6, use_fast_variance=False, dtype=at_least_float32(dtype), rngs=rngs
    )

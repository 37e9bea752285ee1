"""Multi-head attention, MLP and attention pooling of vision transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.export import is_symbolic_dim
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mmljax.models.positions import Rotary
from mmljax.numerics import at_least_float32

Bias = Literal["all", "query_value", "none"]
_CUDNN_HEAD_DIM = 128  # largest head that cuDNN supports on every GPU; a multiple of 8


def attend(
    query: Float[Array, "b n h d"], key: Float[Array, "b m h d"], value: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """``softmax(query . key / sqrt(d)) . value`` of each head; the softmax in float32 at least.

    On an NVIDIA GPU, half-precision heads of up to 128 channels, a multiple of 8, use cuDNN's
    fused attention, which keeps no ``n`` by ``m`` matrix. Everything else uses XLA's form, but
    float64, whose softmax JAX's function computes in float32. The form is chosen when the program
    is lowered, so a program that is compiled on a GPU machine for another platform uses XLA's. So
    does a program that is exported with a symbolic batch: cuDNN's form cannot be exported.
    """
    if query.dtype == jnp.float64:
        logits = jnp.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), value)
    plain = partial(jax.nn.dot_product_attention, implementation="xla")
    if not (jax.default_backend() == "gpu" and fits_cudnn(query)):
        return plain(query, key, value)
    fused = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return lax.platform_dependent(query, key, value, cuda=fused, default=plain)


def fits_cudnn(query: Float[Array, "b n h d"]) -> bool:
    """Whether cuDNN's fused attention takes queries of this dtype and shape."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or any(map(is_symbolic_dim, query.shape)):
        return False
    return query.shape[-1] <= _CUDNN_HEAD_DIM and query.shape[-1] % 8 == 0


def rotate(x: Float[Array, "b n h d"], rotary: Rotary) -> Float[Array, "b n h d"]:
    """Apply rotary positions to the patches; class token and registers before them are unchanged.

    Computes in float32 at least and returns the input's dtype.
    """
    first = x.shape[1] - rotary.cosines.shape[-2]
    patches = x[:, first:].astype(at_least_float32(x.dtype))
    if rotary.interleaved:
        a, b = patches[..., ::2], patches[..., 1::2]
    else:
        a, b = jnp.split(patches, 2, axis=-1)
    cosines, sines = rotary.cosines[..., None, :], rotary.sines[..., None, :]
    rotated = [a * cosines - b * sines, b * cosines + a * sines]
    if rotary.interleaved:
        patches = jnp.stack(rotated, axis=-1).reshape(patches.shape)
    else:
        patches = jnp.concatenate(rotated, axis=-1)
    return jnp.concatenate([x[:, :first], patches.astype(x.dtype)], axis=1)


class Attention(nnx.Module):
    """Multi-head self-attention; one linear layer computes queries, keys and values."""

    def __init__(
        self, size: int, heads: int, *, bias: Bias = "all", dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.heads = heads
        self.qkv = linear(size, 3 * size, use_bias=bias == "all", dtype=dtype, rngs=rngs)
        self.qkv_bias = nnx.Param(jnp.zeros(2 * size)) if bias == "query_value" else None
        self.proj = linear(size, size, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n f"], *, rotary: Rotary | None = None
    ) -> Float[Array, "b n f"]:
        """Return the attention output of each token, with rotary positions if given."""
        b, n, size = x.shape
        qkv = self.qkv(x)
        if self.qkv_bias is not None:
            query, value = jnp.split(self.qkv_bias[...].astype(qkv.dtype), 2)
            qkv = qkv + jnp.concatenate([query, jnp.zeros_like(query), value])
        qkv = qkv.reshape(b, n, 3, self.heads, size // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return self.proj(attend(query, key, value).reshape(b, n, size))


class Mlp(nnx.Module):
    """Two linear layers with one of ``ACTIVATIONS`` between them."""

    def __init__(
        self, size: int, hidden: int, *, activation: str, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.activation = activation
        inner = 2 * hidden if activation == "swiglu" else hidden
        self.fc1 = linear(size, inner, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n f"]) -> Float[Array, "b n f"]:
        """Transform each token separately."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class AttentionPool(nnx.Module):
    """Attention pooling with a trained query and a residual MLP (Zhai et al. 2021, 2106.04560)."""

    def __init__(
        self,
        size: int,
        heads: int,
        hidden: int,
        *,
        activation: str,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads = heads
        self.latent = nnx.Param(nnx.initializers.normal(size**-0.5)(rngs.params(), (1, 1, size)))
        self.qkv = linear(size, 3 * size, dtype=dtype, rngs=rngs)
        self.proj = linear(size, size, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(size, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(size, hidden, activation=activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n f"]) -> Float[Array, "b f"]:
        """Pool all tokens."""
        b, n, size = x.shape
        head_dim = size // self.heads
        query = self.qkv(self.latent[...])[..., :size]
        key_value = self.qkv(x)[..., size:].reshape(b, n, 2, self.heads, head_dim)
        query = jnp.broadcast_to(
            query.reshape(1, 1, self.heads, head_dim), (b, 1, self.heads, head_dim)
        )
        y = self.proj(attend(query, key_value[:, :, 0], key_value[:, :, 1]).reshape(b, 1, size))
        return (y + self.mlp(self.norm(y)))[:, 0]


def _swiglu(x: Float[Array, "b n f"]) -> Float[Array, "b n f2"]:
    gate, value = jnp.split(x, 2, axis=-1)
    return nnx.silu(gate) * value


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": partial(nnx.gelu, approximate=False),
    "gelu_tanh": partial(nnx.gelu, approximate=True),
    "gelu_quick": lambda x: x * nnx.sigmoid(1.702 * x),
    "relu6": nnx.relu6,
    "swiglu": _swiglu,  # Shazeer (2020, 2002.05202); the first half is the gate
}


def linear(
    inputs: int, outputs: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """Return a linear layer with a normal initial kernel of standard deviation 0.02."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        kernel_init=nnx.initializers.normal(0.02),
        dtype=dtype,
        rngs=rngs,
    )


def layer_norm(size: int, *, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a layer norm that computes in float32 at least."""
    return nnx.LayerNorm(
        size, epsilon=epsilon, use_fast_variance=False, dtype=at_least_float32(dtype), rngs=rngs
    )

"""Pooling of a feature map or of tokens to one vector per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

GEM_START = 3.0  # the exponent before training
GEM_LEAST = 1e-6  # smaller features count as this


def generalized_mean(
    x: Float[Array, "b n f"], exponent: Float[Array, ""], *, least: float = GEM_LEAST
) -> Float[Array, "b f"]:
    """``(mean of max(x, least)^p)^(1/p)`` over the axis ``n``.

    Radenovic et al. (2018, arXiv 1711.02512), equation 3, with one exponent for all channels:
    1 gives the average, and the maximum is the limit of large ones. Powers are those of the ratio
    to the largest feature, so they do not overflow, and the mean is at least ``1 / n``.

    Args:
      x: features of ``n`` positions.
      exponent: ``p``, not 0.
      least: smaller features count as this, and get no gradient.
    """
    x = jnp.maximum(x, least)
    peak = jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True))  # cancels in the derivative
    powers = jnp.exp(exponent * jnp.log(x / peak))
    return peak[:, 0] * jnp.exp(jnp.log(jnp.mean(powers, axis=1)) / exponent)


class GeM(nnx.Module):
    """Generalised-mean pooling with a trainable exponent ``p``, which starts at 3."""

    def __init__(self, positions: Callable[[Array], Array]) -> None:
        self.positions = positions
        self.p = nnx.Param(jnp.full((), GEM_START))

    def __call__(self, x: Float[Array, "b *n f"]) -> Float[Array, "b f"]:
        """Pool the positions of a map, or the patches of tokens."""
        return generalized_mean(self.positions(x), self.p[...].astype(x.dtype))


def _average(x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
    return jnp.mean(x, axis=(1, 2))


def _maximum(x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
    return jnp.max(x, axis=(1, 2))


def _average_and_maximum(x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
    return _average(x) + _maximum(x)


def _flatten(x: Float[Array, "b h w f"]) -> Float[Array, "b n f"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _token(x: Float[Array, "b n f"]) -> Float[Array, "b f"]:
    return x[:, 0]


def _patches(x: Float[Array, "b n f"]) -> Float[Array, "b n f"]:
    return x[:, 1:]


def _identity(x: Float[Array, "b f"]) -> Float[Array, "b f"]:
    return x


def _average_of_patches(x: Float[Array, "b n f"]) -> Float[Array, "b f"]:
    return jnp.mean(_patches(x), axis=1)


POOLINGS: Mapping[str, Mapping[str, Callable[[], Callable[[Array], Array]]]] = {
    "map": {
        "average": lambda: _average,
        "max": lambda: _maximum,
        "average+max": lambda: _average_and_maximum,
        "gem": lambda: GeM(_flatten),
    },
    "tokens": {
        "token": lambda: _token,
        "average": lambda: _average_of_patches,
        "gem": lambda: GeM(_patches),
    },
    "vector": {"token": lambda: _identity},
}
"""Constructors by the backbone's ``output``; ``token`` is the network's own summary of an image.

timm averages the patches before the last layer norm; here it is after.
"""

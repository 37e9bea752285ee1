"""A convolution and the BatchNorm after it, as one function; the networks are built from these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mmljax.mesh import AXIS
from mmljax.models import convolution

_Arrays = TypeVar("_Arrays", bound=tuple[Any, ...])


def conv_norm_layers(
    *, dtype: DTypeLike, rngs: nnx.Rngs, momentum: float, epsilon: float
) -> tuple[Callable[..., nnx.Conv], Callable[..., nnx.BatchNorm]]:
    """Constructors of convolutions and BatchNorms that share a dtype and a source of keys.

    Args:
      dtype: of the computation.
      rngs: for the parameters.
      momentum: the share of the running statistics that a training step keeps.
      epsilon: added to the variance.

    Returns:
      ``conv(inputs, outputs, *, kernel, stride, padding, groups)``, initialised as He et al.
      (1502.01852, by the outputs of a group), without a bias; and ``norm(channels)``, whose
      statistics are over the global batch.
    """

    def conv(
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int = 1,
        padding: int | str = 0,
        groups: int = 1,
    ) -> nnx.Conv:
        return nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=stride,
            padding=padding,
            feature_group_count=groups,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0 * groups, "fan_out", "normal"),
            dtype=dtype,
            rngs=rngs,
        )

    norm = functools.partial(
        nnx.BatchNorm,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=AXIS,
        promote_dtype=_keep_dtypes,
        dtype=dtype,
        rngs=rngs,
    )
    return conv, norm


def conv_norm(
    conv: Any, norm: Any, x: Float[Array, "b h w i"], *, train: bool
) -> Float[Array, "b h2 w2 o"]:
    """Convolution and BatchNorm, by the batch's statistics in training, else by the running ones.

    With running statistics BatchNorm is one factor and one summand per channel. The factor is
    multiplied into the kernel, as a function of kernel and scale, so the gradients are those of the
    two layers; the gradient at the scale is then a sum over the kernel instead of over all pixels.
    """
    if train:
        return norm(_convolve(conv, conv.kernel[...], x))
    factor = norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    y = _convolve(conv, conv.kernel[...] * factor, x)
    return (y + (norm.bias[...] - norm.mean[...] * factor)).astype(y.dtype)


def _convolve(conv: Any, kernel: Array, x: Array) -> Array:
    return convolution.conv(
        x.astype(conv.dtype),
        kernel.astype(conv.dtype),
        strides=conv.strides,
        padding=conv.padding,
        groups=conv.feature_group_count,
    )


def _keep_dtypes(arrays: _Arrays, /, *, dtype: Any = None, inexact: bool = True) -> _Arrays:
    """Promote nothing: statistics, scale and shift stay float32, the result alone is cast."""
    del dtype, inexact
    return arrays

"""Residual networks: torchvision's ResNets (v1.5) and a small one that a CPU can train.

Modules bear torchvision's names (``conv1``, ``bn1``, ``layer1.0.downsample.1``, ...), so its
weights map onto these by a renaming and a transposition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mmljax.mesh import AXIS

FOLD = True
"""Whether BatchNorm by running statistics becomes part of the convolution before it.

Looked at when a network is traced. ``benchmarks/train_step.py`` times both forms.
"""


class Stem(NamedTuple):
    """How pixels become the first stage's input."""

    kernel: int
    stride: int
    max_pool: bool  # 3 x 3 with stride 2, after the convolution


class BasicBlock(nnx.Module):
    """Two 3 x 3 convolutions, the first with the stride (He et al. 2015, 1512.03385, figure 5)."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        convolution, norm = _layers(dtype=dtype, rngs=rngs)
        self.conv1 = convolution(inputs, width, kernel=3, stride=stride)
        self.bn1 = norm(width)
        self.conv2 = convolution(width, width, kernel=3)
        self.bn2 = norm(width)
        self.downsample = _shortcut(inputs, width, stride=stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"], *, train: bool) -> Float[Array, "b h2 w2 o"]:
        """Residual sum; ``h2 = ceil(h / stride)``."""
        y = nnx.relu(_convolve(self.conv1, self.bn1, x, train=train))
        y = _convolve(self.conv2, self.bn2, y, train=train)
        return nnx.relu(y + _skip(self.downsample, x, train=train))


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with the stride on the 3 x 3.

    He et al. (2015, 1512.03385) put the stride on the first 1 x 1; torchvision's place for it,
    kept here, is known as v1.5.
    """

    expansion = 4

    def __init__(
        self, inputs: int, width: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        convolution, norm = _layers(dtype=dtype, rngs=rngs)
        outputs = width * self.expansion
        self.conv1 = convolution(inputs, width, kernel=1)
        self.bn1 = norm(width)
        self.conv2 = convolution(width, width, kernel=3, stride=stride)
        self.bn2 = norm(width)
        self.conv3 = convolution(width, outputs, kernel=1)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride=stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"], *, train: bool) -> Float[Array, "b h2 w2 o"]:
        """Residual sum; ``h2 = ceil(h / stride)``."""
        y = nnx.relu(_convolve(self.conv1, self.bn1, x, train=train))
        y = nnx.relu(_convolve(self.conv2, self.bn2, y, train=train))
        y = _convolve(self.conv3, self.bn3, y, train=train)
        return nnx.relu(y + _skip(self.downsample, x, train=train))


class ResNet(nnx.Module):
    """Stem and stages ``layer1``, ``layer2``, ...; each later stage halves the map and doubles
    the width. ``features`` is the number of output channels.

    In training BatchNorm takes its statistics over the global batch, by a mean over the mesh axis
    ``data``, and so must be traced inside a ``shard_map`` over that axis. Its running variance is
    that of the biased estimate (torch's is of the unbiased one).
    """

    output = "map"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        stem: Stem,
        width: int,
        channels: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        convolution, norm = _layers(**kind)
        self.max_pool = stem.max_pool
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        self.conv1 = convolution(channels, width, kernel=stem.kernel, stride=stem.stride)
        self.bn1 = norm(width)
        self.features = width
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(self.features, width * 2**i, stride=stride, **kind))
                self.features = width * 2**i * block.expansion
            setattr(self, name, nnx.List(blocks))

    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool
    ) -> Float[Array, "b h2 w2 features"]:
        """Feature map; ``train`` uses the batch's statistics and moves the running ones."""
        return self.maps(x, train=train)[-1]

    def maps(self, x: Float[Array, "b h w channels"], *, train: bool) -> list[Array]:
        """The feature map after the stem and after each stage."""
        x = nnx.relu(_convolve(self.conv1, self.bn1, x, train=train))
        if self.max_pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        found = [x]
        for name in self.stages:
            for block in getattr(self, name):
                x = block(x, train=train)
            found.append(x)
        return found


_IMAGENET = Stem(kernel=7, stride=2, max_pool=True)
_FINE = Stem(kernel=3, stride=2, max_pool=False)
_COARSE = Stem(kernel=7, stride=4, max_pool=False)

RESNETS: Mapping[str, Callable[..., ResNet]] = {
    "small": functools.partial(ResNet, BasicBlock, (1, 1, 1), stem=_FINE),
    "small_stride4": functools.partial(ResNet, BasicBlock, (1, 1, 1), stem=_COARSE),
    "resnet18": functools.partial(ResNet, BasicBlock, (2, 2, 2, 2), stem=_IMAGENET),
    "resnet34": functools.partial(ResNet, BasicBlock, (3, 4, 6, 3), stem=_IMAGENET),
    "resnet50": functools.partial(ResNet, Bottleneck, (3, 4, 6, 3), stem=_IMAGENET),
    "resnet101": functools.partial(ResNet, Bottleneck, (3, 4, 23, 3), stem=_IMAGENET),
}
"""Constructors ``(*, width, channels, dtype, rngs)``; torchvision's width is 64.

``small`` is for images of 17 to 40 pixels, ``small_stride4`` for 33 and more: the last map of a
small network is to stay above 2 x 2, where a 3 x 3 convolution is ten times slower on a CPU.
"""


def _layers(
    *, dtype: DTypeLike, rngs: nnx.Rngs
) -> tuple[Callable[..., nnx.Conv], Callable[..., nnx.BatchNorm]]:
    """Constructors of convolutions and BatchNorms that share a dtype and a source of keys."""

    def convolution(inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> nnx.Conv:
        return nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,  # SAME would pad a strided convolution on one side only
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=dtype,
            rngs=rngs,
        )

    norm = functools.partial(
        nnx.BatchNorm,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=AXIS,
        promote_dtype=_as_they_are,
        dtype=dtype,
        rngs=rngs,
    )
    return convolution, norm


_Arrays = TypeVar("_Arrays", bound=tuple[Any, ...])


def _as_they_are(arrays: _Arrays, /, *, dtype: Any = None, inexact: bool = True) -> _Arrays:
    """Promote nothing: statistics, scale and shift stay float32, the result alone is cast."""
    del dtype, inexact
    return arrays


def _shortcut(
    inputs: int, outputs: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.List[Any]:
    """Convolution and BatchNorm of the skip; empty where the skip is the identity."""
    if stride == 1 and inputs == outputs:
        return nnx.List([])
    convolution, norm = _layers(dtype=dtype, rngs=rngs)
    return nnx.List([convolution(inputs, outputs, kernel=1, stride=stride), norm(outputs)])


def _skip(shortcut: nnx.List[Any], x: Array, *, train: bool) -> Array:
    if not shortcut:
        return x
    convolution, norm = shortcut
    return _convolve(convolution, norm, x, train=train)


def _convolve(convolution: Any, norm: Any, x: Array, *, train: bool) -> Array:
    """Convolution and BatchNorm, in training by the batch's statistics, else by the running ones.

    With running statistics BatchNorm is one factor and one summand per channel. The factor goes
    into the kernel, as a function of kernel and scale, so the gradients are those of the two
    layers; the one of the scale is then a sum over the kernel instead of over all pixels.
    """
    if train or not FOLD:
        return norm(convolution(x), use_running_average=not train)
    factor = norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    y = jax.lax.conv_general_dilated(
        x.astype(convolution.dtype),
        (convolution.kernel[...] * factor).astype(convolution.dtype),
        window_strides=(convolution.strides,) * 2,
        padding=((convolution.padding,) * 2,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (y + (norm.bias[...] - norm.mean[...] * factor)).astype(convolution.dtype)

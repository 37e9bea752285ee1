"""Residual networks: torchvision's ResNets (v1.5) and a small one that a CPU can train.

Modules bear torchvision's names (``conv1``, ``bn1``, ``layer1.0.downsample.1``, ...), so its
weights map onto these by a renaming and a transposition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mmljax.config import choose
from mmljax.mesh import AXIS


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
        running = not train
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=running))
        y = self.bn2(self.conv2(y), use_running_average=running)
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
        running = not train
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=running))
        y = nnx.relu(self.bn2(self.conv2(y), use_running_average=running))
        y = self.bn3(self.conv3(y), use_running_average=running)
        return nnx.relu(y + _skip(self.downsample, x, train=train))


class ResNet(nnx.Module):
    """Stem and stages ``layer1``, ``layer2``, ...; each later stage halves the map and doubles
    the width. ``features`` is the number of output channels.

    In training BatchNorm takes its statistics over the global batch, by a mean over the mesh axis
    ``data``, and so must be traced inside a ``shard_map`` over that axis. Its running variance is
    that of the biased estimate (torch's is of the unbiased one).
    """

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
        """Feature map; ``train`` uses, and folds into the running ones, the batch's statistics."""
        x = nnx.relu(self.bn1(self.conv1(x), use_running_average=not train))
        if self.max_pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for name in self.stages:
            for block in getattr(self, name):
                x = block(x, train=train)
        return x


_IMAGENET = Stem(kernel=7, stride=2, max_pool=True)
_FINE = Stem(kernel=3, stride=2, max_pool=False)
_COARSE = Stem(kernel=7, stride=4, max_pool=False)

BACKBONES: Mapping[str, Callable[..., ResNet]] = {
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


def make_backbone(
    name: str, *, width: int, channels: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> ResNet:
    """Build a backbone by its name, with He et al.'s initialisation (1502.01852, fan-out).

    Args:
      name: a key of ``BACKBONES``.
      width: channels of the stem and of the first stage's 3 x 3 convolutions.
      channels: of the images.
      dtype: of the computation; parameters and BatchNorm's statistics are float32.
      rngs: for the parameters; no random state stays in the network.

    Raises:
      UserError: on an unknown name.
    """
    build = choose(BACKBONES, name, key="config.model.backbone")
    return build(width=width, channels=channels, dtype=dtype, rngs=rngs)


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
    return norm(convolution(x), use_running_average=not train)

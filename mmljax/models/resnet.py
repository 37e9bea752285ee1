"""Residual networks: torchvision's ResNets (v1.5) and a small one that a CPU can train.

Modules have torchvision's names (``conv1``, ``bn1``, ``layer1.0.downsample.1``, ...), so its
weights need only renamed endings and transposed kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from mmljax.models.conv_norm import conv_norm, conv_norm_layers
from mmljax.models.convolution import max_pool
from mmljax.models.drop_path import ResidualBlock

_layers = functools.partial(conv_norm_layers, momentum=0.9, epsilon=1e-5)


class Stem(NamedTuple):
    """The first convolution."""

    kernel: int
    stride: int
    max_pool: bool  # 3 x 3 with stride 2, after the convolution


class BasicBlock(ResidualBlock):
    """Two 3 x 3 convolutions, the first with the stride (He et al. 2015, 1512.03385, figure 5)."""

    expansion = 1

    def __init__(
        self, inputs: int, width: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        conv, norm = _layers(dtype=dtype, rngs=rngs)
        self.conv1 = conv(inputs, width, kernel=3, stride=stride, padding=1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, kernel=3, padding=1)
        self.bn2 = norm(width)
        self.downsample = _shortcut(inputs, width, stride=stride, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w i"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """Residual sum; ``h2 = ceil(h / stride)``. With ``keys`` the branch may be dropped."""
        y = nnx.relu(conv_norm(self.conv1, self.bn1, x, train=train))
        y = conv_norm(self.conv2, self.bn2, y, train=train)
        return nnx.relu(self.drop(y, keys) + _skip(self.downsample, x, train=train))


class Bottleneck(ResidualBlock):
    """1 x 1, 3 x 3 and 1 x 1 convolutions with the stride on the 3 x 3.

    He et al. (2015, 1512.03385) have the stride on the first 1 x 1 convolution; torchvision's form,
    used here, is known as v1.5.
    """

    expansion = 4

    def __init__(
        self, inputs: int, width: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        conv, norm = _layers(dtype=dtype, rngs=rngs)
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, kernel=1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, kernel=3, stride=stride, padding=1)
        self.bn2 = norm(width)
        self.conv3 = conv(width, outputs, kernel=1)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride=stride, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w i"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """Residual sum; ``h2 = ceil(h / stride)``. With ``keys`` the branch may be dropped."""
        y = nnx.relu(conv_norm(self.conv1, self.bn1, x, train=train))
        y = nnx.relu(conv_norm(self.conv2, self.bn2, y, train=train))
        y = conv_norm(self.conv3, self.bn3, y, train=train)
        return nnx.relu(self.drop(y, keys) + _skip(self.downsample, x, train=train))


class ResNet(nnx.Module):
    """Stem and stages ``layer1``, ``layer2``, ...

    Each stage after the first halves the map and doubles the width. ``features`` is the number of
    output channels. In training, BatchNorm uses the statistics of the global batch, a mean over the
    mesh axis ``data``; the network must then be traced inside a ``shard_map`` over that axis. Its
    running variance averages the biased estimate (torch: the unbiased one).
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
        conv, norm = _layers(**kind)
        self.max_pool = stem.max_pool
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        self.conv1 = conv(
            channels, width, kernel=stem.kernel, stride=stem.stride, padding=stem.kernel // 2
        )
        self.bn1 = norm(width)
        self.features = width
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(self.features, width * 2**i, stride=stride, **kind))
                self.features = width * 2**i * block.expansion
            setattr(self, name, nnx.List(blocks))

    def layers(self) -> list[tuple[str, ...]]:
        """Names of the modules of each layer: the stem, then each block."""
        depths = {name: len(getattr(self, name)) for name in self.stages}
        blocks = [(f"{name}.{i}",) for name, depth in depths.items() for i in range(depth)]
        return [("conv1", "bn1"), *blocks]

    @property
    def blocks(self) -> list[BasicBlock | Bottleneck]:
        """Those of all stages, from the images on."""
        return [block for name in self.stages for block in getattr(self, name)]

    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b h2 w2 features"]:
        """Feature map; ``train`` uses the batch's statistics and moves the running ones.

        With ``keys``, one per example, residual branches are dropped at the blocks' rates.
        """
        return self.maps(x, train=train, keys=keys)[-1]

    def maps(
        self, x: Float[Array, "b h w channels"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> list[Array]:
        """The feature map after the stem and after each stage."""
        x = nnx.relu(conv_norm(self.conv1, self.bn1, x, train=train))
        if self.max_pool:
            x = max_pool(x, 3, strides=2, padding=1)
        found = [x]
        for name in self.stages:
            for block in getattr(self, name):
                x = block.run(x, train=train, keys=keys)
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

``small`` is for images of 17 to 40 pixels, ``small_stride4`` for 33 and more.
"""


def _shortcut(
    inputs: int, outputs: int, *, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.List[Any]:
    """Convolution and BatchNorm of the skip connection; empty where it is the identity."""
    if stride == 1 and inputs == outputs:
        return nnx.List([])
    conv, norm = _layers(dtype=dtype, rngs=rngs)
    return nnx.List([conv(inputs, outputs, kernel=1, stride=stride), norm(outputs)])


def _skip(shortcut: nnx.List[Any], x: Array, *, train: bool) -> Array:
    if not shortcut:
        return x
    conv, norm = shortcut
    return conv_norm(conv, norm, x, train=train)

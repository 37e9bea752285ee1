"""EfficientNet-Lite 0, 1 and 2: networks of depthwise convolutions for small devices.

Tan and Le (1905.11946), in the variants that the same authors published in 2020 for devices: ReLU6
in place of swish, no squeeze-and-excitation, and a stem and a head that are not scaled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from mmljax.models.conv_norm import conv_norm, conv_norm_layers
from mmljax.models.drop_path import ResidualBlock

PUBLISHED_WIDTH = 64  # the value of ``width`` that gives the published numbers of channels
_STEM, _HEAD = 32, 1280

# As the published weights: zeros are added as TensorFlow's SAME does (more of them below and to
# the right), the running statistics keep 0.99, and 0.001 is added to the variance.
_layers = functools.partial(conv_norm_layers, momentum=0.99, epsilon=1e-3)


class Stage(NamedTuple):
    """A row of table 1 of the paper."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class InvertedBottleneck(ResidualBlock):
    """A wide 1 x 1 convolution, a depthwise one and a narrow 1 x 1 one, which is linear.

    Sandler et al. (1801.04381). Without an expansion the first convolution is absent.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int,
        expansion: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        conv, norm = _layers(dtype=dtype, rngs=rngs)
        wide = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = expansion > 1
        if self.expand:
            self.expand_conv = conv(inputs, wide, kernel=1)
            self.bn0 = norm(wide)
        self.depthwise_conv = conv(
            wide, wide, kernel=kernel, stride=stride, padding="SAME", groups=wide
        )
        self.bn1 = norm(wide)
        self.project_conv = conv(wide, outputs, kernel=1)
        self.bn2 = norm(outputs)

    def __call__(
        self, x: Float[Array, "b h w i"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        """The input is added where the shapes agree; ``h2 = ceil(h / stride)``.

        With ``keys`` what is added to it may be dropped.
        """
        y = x
        if self.expand:
            y = nnx.relu6(conv_norm(self.expand_conv, self.bn0, y, train=train))
        y = nnx.relu6(conv_norm(self.depthwise_conv, self.bn1, y, train=train))
        y = conv_norm(self.project_conv, self.bn2, y, train=train)
        return x + self.drop(y, keys) if self.residual else y


class EfficientNetLite(nnx.Module):
    """Stem, seven stages of ``InvertedBottleneck`` and a 1 x 1 convolution.

    ``features`` is the number of output channels, published: 1280. The original was trained with
    stochastic depth, at most 20 %; here it is off by default.
    BatchNorm works as in ``ResNet``: training must be traced inside a ``shard_map``.

    Args:
      width_coefficient: multiplies the channels of the stages; results are multiples of 8.
      depth_coefficient: multiplies the blocks of a stage, but those of the first and the last.
      width: 64 for the published channels; all, stem and head included, are in proportion to it.
      channels: of the images.
      dtype: of the computation.
      rngs: for the parameters.
    """

    output = "map"

    def __init__(
        self,
        width_coefficient: float,
        depth_coefficient: float,
        *,
        width: int,
        channels: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        conv, norm = _layers(**kind)
        scale = width / PUBLISHED_WIDTH
        last = round_channels(_STEM * scale)
        self.conv_stem = conv(channels, last, kernel=3, stride=2, padding="SAME")
        self.bn0 = norm(last)
        blocks = []
        for stage in STAGES:
            fixed = stage in (STAGES[0], STAGES[-1])
            depth = stage.blocks if fixed else math.ceil(stage.blocks * depth_coefficient)
            outputs = round_channels(stage.channels * width_coefficient * scale)
            for i in range(depth):
                block = InvertedBottleneck(
                    last,
                    outputs,
                    kernel=stage.kernel,
                    stride=stage.stride if i == 0 else 1,
                    expansion=stage.expansion,
                    **kind,
                )
                blocks.append(block)
                last = outputs
        self.blocks = nnx.List(blocks)
        self.features = round_channels(_HEAD * scale)
        self.conv_head = conv(last, self.features, kernel=1)
        self.bn1 = norm(self.features)

    def layers(self) -> list[tuple[str, ...]]:
        """Names of the modules of each layer: the stem, each block, the last convolution."""
        blocks = [(f"blocks.{i}",) for i in range(len(self.blocks))]
        return [("conv_stem", "bn0"), *blocks, ("conv_head", "bn1")]

    def __call__(
        self, x: Float[Array, "b h w channels"], *, train: bool, keys: PRNGKeyArray | None = None
    ) -> Float[Array, "b h2 w2 features"]:
        """Feature map, a 32nd of the image high and wide (rounded up at each stride).

        With ``keys``, one per example, residual branches are dropped at the blocks' rates.
        """
        x = nnx.relu6(conv_norm(self.conv_stem, self.bn0, x, train=train))
        for block in self.blocks:
            x = block.run(x, train=train, keys=keys)
        return nnx.relu6(conv_norm(self.conv_head, self.bn1, x, train=train))


def round_channels(channels: float, *, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, at least one of it and at least 90 % of ``channels``."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


EFFICIENTNETS: Mapping[str, Callable[..., EfficientNetLite]] = {
    "efficientnet_lite0": functools.partial(EfficientNetLite, 1.0, 1.0),
    "efficientnet_lite1": functools.partial(EfficientNetLite, 1.0, 1.1),
    "efficientnet_lite2": functools.partial(EfficientNetLite, 1.1, 1.2),
}
"""Constructors ``(*, width, channels, dtype, rngs)``; published for 224, 240 and 260 pixels."""

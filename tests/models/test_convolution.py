"""Convolution and max pooling in their forms for CPU against lax, in values and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import PartitionSpec

from mmljax.mesh import AXIS, make_mesh
from mmljax.models import convolution

CASES = [  # height, width, inputs, outputs, kernel, strides, padding, groups, form
    (7, 5, 6, 4, (1, 1), (1, 1), 0, 1, convolution._pointwise),
    (7, 6, 6, 4, (1, 1), (2, 2), 0, 1, convolution._pointwise),
    (8, 7, 6, 4, (1, 1), (2, 3), "SAME", 1, convolution._pointwise),
    (2, 2, 6, 5, (3, 3), (1, 1), 1, 1, convolution._patches),
    (4, 5, 6, 5, (3, 3), (2, 2), 1, 1, convolution._patches),
    (1, 3, 6, 5, (3, 3), (1, 1), "SAME", 1, convolution._patches),
    (4, 9, 3, 5, (5, 3), (2, 1), ((2, 1), (0, 1)), 1, convolution._patches),
    (12, 8, 3, 5, (4, 4), (4, 4), 0, 1, convolution._tiles),
    (6, 8, 3, 5, (2, 4), (2, 4), "VALID", 1, convolution._tiles),
    (9, 7, 6, 6, (3, 3), (1, 1), 1, 6, convolution._depthwise),
    (9, 8, 6, 6, (3, 3), (2, 2), "SAME", 6, convolution._depthwise),
    (8, 9, 6, 6, (5, 5), (2, 2), "SAME", 6, convolution._depthwise),
    (2, 3, 6, 6, (5, 5), (1, 1), "SAME", 6, convolution._depthwise),
    (7, 11, 6, 6, (2, 3), (3, 2), ((0, 3), (4, 1)), 6, convolution._depthwise),
    (7, 8, 6, 6, (1, 1), (2, 2), 0, 6, convolution._depthwise),
    (9, 8, 6, 5, (3, 3), (1, 1), 1, 1, convolution._conv_lax),
    (6, 7, 6, 5, (3, 3), (1, 1), 1, 1, convolution._conv_lax),
    (19, 18, 3, 5, (7, 7), (2, 2), 3, 1, convolution._conv_lax),
    (9, 8, 6, 12, (3, 3), (1, 1), 1, 6, None),
]


def draw(*shape: int, seed: int = 0, dtype: Any = np.float64) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def pairs(padding: Any) -> Any:
    return ((padding, padding),) * 2 if isinstance(padding, int) else padding


def with_gradients(function: Any, *arguments: Any) -> list[Any]:
    y, backward = jax.vjp(function, *arguments)
    return [y, *backward(draw(*y.shape, seed=9, dtype=y.dtype))]


def assert_equal(found: list[Any], expected: list[Any], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (np.float32, 1e-5),
        pytest.param(np.float64, 1e-12, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_convolution_equals_lax(case: Any, dtype: Any, tolerance: float) -> None:
    height, width, inputs, outputs, size, strides, padding, groups, form = case
    with jax.enable_x64(dtype is np.float64):
        x = draw(3, height, width, inputs, dtype=dtype)
        kernel = draw(*size, inputs // groups, outputs, seed=1, dtype=dtype)

        def ours(x: Any, kernel: Any) -> Any:
            return convolution.conv(x, kernel, strides=strides, padding=padding, groups=groups)

        def by_lax(x: Any, kernel: Any) -> Any:
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x, kernel, strides, pairs(padding), None, None, numbers, groups
            )

        window = convolution._window(x, size, strides, padding, groups)
        chosen = convolution._choose_form(x, kernel, window)
        assert (chosen and chosen[0]) == form
        expected = with_gradients(by_lax, x, kernel)
        assert_equal(with_gradients(jax.jit(ours), x, kernel), expected, tolerance)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("height", "width", "size", "strides", "padding"),
    [(8, 7, 3, 2, 1), (9, 6, 2, 2, 0), (5, 8, 3, 1, "SAME"), (7, 7, 2, 3, "VALID")],
)
def test_max_pool_equals_lax_and_the_first_of_equals_gets_the_gradient(
    height: int, width: int, size: int, strides: int, padding: Any, dtype: Any
) -> None:
    with jax.enable_x64(dtype is np.float64):
        integers = np.random.default_rng(0).integers(-2, 2, (3, height, width, 5))
        x = jnp.asarray(integers, dtype)  # full of ties, and of windows without a positive value

        def by_lax(x: Any) -> Any:
            pads = pairs(padding)
            pads = pads if isinstance(pads, str) else ((0, 0), *pads, (0, 0))
            sizes = ((1, size, size, 1), (1, strides, strides, 1))
            return lax.reduce_window(x, -jnp.inf, lax.max, *sizes, pads)

        def ours(x: Any) -> Any:
            return convolution.max_pool(x, size, strides=strides, padding=padding)

        assert_equal(with_gradients(jax.jit(ours), x), with_gradients(by_lax, x), 1e-6)


def test_gradients_are_summed_over_devices() -> None:
    """A kernel that all devices share gets the whole batch's gradient."""
    with jax.enable_x64(True):
        x, kernel = draw(8, 6, 6, 4), draw(3, 3, 1, 4, seed=1)

        def loss(kernel: Any, x: Any) -> Any:
            y = convolution.max_pool(convolution.conv(x, kernel, groups=4), 2, strides=2)
            return jnp.sum(jnp.sin(y))

        spread = jax.shard_map(
            lambda kernel, x: lax.psum(loss(kernel, x), AXIS),
            mesh=make_mesh(jax.devices()[:4]),
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(),
        )
        found, expected = (jax.jit(jax.grad(f, (0, 1)))(kernel, x) for f in (spread, loss))
        assert_equal(list(found), list(expected), 1e-12)


def test_bfloat16_sums_in_float32() -> None:
    """Eight small summands that bfloat16 would each lose beside the first one."""
    kernel = jnp.full((3, 3, 1, 2), 2.0**-9, jnp.bfloat16).at[0, 0].set(1)
    y = convolution.conv(jnp.ones((1, 3, 3, 2), jnp.bfloat16), kernel, groups=2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), 1 + 2.0**-6)


def test_each_platform_gets_its_own_form() -> None:
    """A program lowered on this machine for a TPU or a GPU holds convolutions; for CPU dots."""

    def gradients(x: Any, kernel: Any) -> Any:
        return jax.grad(lambda x, k: jnp.sum(convolution.conv(x, k) ** 2), (0, 1))(x, kernel)

    shapes = jax.ShapeDtypeStruct((2, 5, 5, 3), "float32"), jax.ShapeDtypeStruct((1, 1, 3, 4), "f")
    texts = {
        platform: export.export(jax.jit(gradients), platforms=[platform])(*shapes).mlir_module()
        for platform in ("cpu", "tpu", "cuda")
    }
    word = "stablehlo.convolution"
    convolutions = {platform: text.count(word) for platform, text in texts.items()}
    assert convolutions["cpu"] == 0
    assert convolutions["tpu"] == convolutions["cuda"] >= 3
    assert "dot_general" not in texts["tpu"]


def test_batch_of_any_size_is_exported_for_all_platforms() -> None:
    (batch,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 8, 8, 4), np.float32)

    def run(x: Any) -> Any:
        kernels = draw(3, 3, 1, 4, dtype=np.float32), draw(1, 1, 4, 4, dtype=np.float32)
        x = convolution.conv(x, kernels[0], strides=2, padding="SAME", groups=4)
        x = convolution.max_pool(convolution.conv(x, kernels[1]), 2, strides=2)
        return convolution.conv(x, draw(3, 3, 4, 2, dtype=np.float32), padding=1)

    exported = export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(x)
    images = draw(3, 8, 8, 4, dtype=np.float32)
    np.testing.assert_allclose(exported.call(images), run(images), atol=1e-5)

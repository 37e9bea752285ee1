"""Operations are counted as the published networks and hand counts state them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mmljax.config import default_config, from_mapping
from mmljax.mesh import make_mesh
from mmljax.planning.counts import Counts
from mmljax.planning.operations import Operations, operations
from mmljax.planning.programs import abstract_run, count_step


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def test_a_product_counts_once_per_round_of_a_loop() -> None:
    def f(x, y):
        def add(total, _):
            return total + jnp.einsum("bij,bjk->ik", x, y), None

        return lax.scan(add, jnp.zeros((3, 5)), None, 7)[0]

    assert operations(f, array(2, 3, 4), array(2, 4, 5), platform="tpu").number == 7 * 240


def test_passes_follow_precision_and_dtype() -> None:
    def f(x, y):
        return [jnp.dot(x, y, precision=p) for p in (None, "high", "highest")]

    assert operations(f, array(2, 3), array(3, 5), platform="tpu") == Operations(180, 600)
    half = [array(2, 3, dtype="bfloat16"), array(3, 5, dtype="bfloat16")]
    assert operations(f, *half, platform="tpu") == Operations(180, 180)


def test_what_no_result_needs_is_not_counted():
    """The value ``x @ x``, where only its gradient is used: two products."""

    def f(x):
        return jax.vjp(lambda x: x @ x, x)[1](x)[0]

    assert operations(f, array(2, 2), platform="tpu").number == 2 * 16


def test_the_branch_of_the_platform_counts() -> None:
    def f(x):
        return lax.platform_dependent(x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert operations(f, array(2, 2), platform="cpu").number == 32
    assert operations(f, array(2, 2), platform="tpu").number == 16

    def g(x):
        return lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x)

    assert operations(g, array(2, 2), platform="tpu").number == 0


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 3)])
def test_a_convolution_and_its_gradients_take_the_same_products(stride: int, groups: int) -> None:
    images, kernel = array(2, 9, 9, 6), array(3, 3, 6 // groups, 12)

    def f(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, k, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        return jnp.sum(y)

    side = len(range(0, 9, stride))
    places = itertools.product(range(2), range(side), range(side), range(12))
    by_hand = sum(2 * 3 * 3 * (6 // groups) for _ in places)
    assert operations(f, images, kernel, platform="tpu").number == by_hand
    both = operations(jax.grad(f, (0, 1)), images, kernel, platform="tpu").number
    assert both == pytest.approx(2 * by_hand, rel=0.3)  # 81 / 4 places for 5 x 5
    assert operations(jax.grad(f, 1), images, kernel, platform="tpu").number == by_hand


def test_resnet50_and_the_objectives() -> None:
    """ResNet-50 takes 4.09 G products an image (torchvision's table), its gradient twice that."""
    config = default_config()
    config.data.batch_size = 16
    devices, classes, size = 2, 300, config.model.embedding_size
    mesh = make_mesh(jax.devices()[:devices])
    run = abstract_run(from_mapping(config), Counts(classes, 3000), mesh)
    found = count_step(run, from_mapping(config), channels=3)
    images = config.data.batch_size // devices
    assert found["network"].number / images == pytest.approx(3 * 2 * 4.09e9, rel=0.02)
    # A block of similarities and its two gradients; the mined pairs once more, by their proxies.
    rows = run.state.params["proxies"].shape[0]
    blocks = images * 16 + rows // devices * 16 + rows // devices * rows
    least = 3 * 2 * blocks * size
    assert least < found["objectives"].number < 1.1 * least

"""Batches from arrays: one affine resampling, the same on any number of devices."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from mmljax.config import DataConfig, SyntheticConfig
from mmljax.data import array_pipeline as arrays
from mmljax.errors import UserError
from mmljax.types import Batch, Split

STRONG = {
    "image_size": 16,
    "crop_scale": (0.3, 0.9),
    "crop_ratio": (0.75, 4 / 3),
    "rotate": 20.0,
    "shear": 0.2,
    "flip": True,
}


def _config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "source": "arrays",
        "directory": "",
        "check_counts": True,
        "test_share": 0.5,
        "corrupt": "error",
        "resize_size": 18,
        "resampling": "bilinear",
        "batch_size": 16,
        "images_per_class": 4,
        "eval_batch_size": 16,
        "threads": 1,
        "prefetch": 1,
        "synthetic": SyntheticConfig(train_items=1, test_items=1, views=1, image_size=8, seed=0),
    }
    return DataConfig(**(values | STRONG | changes))


def _images(count: int, height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def split() -> Split:
    labels = np.repeat(np.arange(7), 6).astype(np.int32)
    return Split(_images(42, 20, 24, 3), labels, np.arange(42).astype(str))


def _on_one_device(batch: Batch) -> Batch:
    return Batch(*map(jnp.asarray, batch))


def _sharding() -> NamedSharding:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def _train(split, *, steps=range(4), rows=slice(0, 16), seed=0, place=_on_one_device, **changes):
    return list(
        arrays.train_batches(
            split, config=_config(**changes), seed=seed, steps=steps, rows=rows, place=place
        )
    )


def _eval(split, *, rows=slice(0, 16), **changes):
    return list(
        arrays.eval_batches(split, config=_config(**changes), rows=rows, place=_on_one_device)
    )


def _assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def _matrix(center, size, degrees=0.0, shear=0.0):
    center, size, angle, shear = map(jnp.float32, (center, size, math.radians(degrees), shear))
    return arrays.affine_matrix(center=center, size=size, angle=angle, shear=shear)


def _resample(images, matrix, image_size):
    matrices = jnp.broadcast_to(matrix, (len(images), 2, 3))
    return np.asarray(arrays.affine_resample(jnp.asarray(images), matrices, image_size=image_size))


def test_identity_quarter_turns_and_mirror_are_exact():
    images = _images(3, 13, 13, 2)
    half = 13 / 2
    np.testing.assert_array_equal(_resample(images, _matrix((half, half), (13, 13)), 13), images)
    for turns in (1, 2, 3):
        turned = _resample(images, _matrix((half, half), (13, 13), degrees=90 * turns), 13)
        np.testing.assert_array_equal(turned, np.rot90(images, turns, axes=(1, 2)))
    mirrored = _resample(images, _matrix((half, half), (-13, 13)), 13)
    np.testing.assert_array_equal(mirrored, images[:, :, ::-1])


def test_a_window_at_whole_pixels_is_cut_out():
    images = _images(2, 11, 17)
    window = _resample(images, _matrix((3 + 8 / 2, 2 + 8 / 2), (8, 8)), 8)
    # The source is longer than the result, so each pixel is the mean of 3 x 3 samples within it.
    plain = images.astype(float)
    kernel = np.array([1, 7, 1]) / 9  # of a bilinear image, at offsets -1/3, 0 and 1/3
    smooth = sum(k * np.roll(plain, s, axis=1) for k, s in zip(kernel, (-1, 0, 1), strict=True))
    smooth = sum(k * np.roll(smooth, s, axis=2) for k, s in zip(kernel, (-1, 0, 1), strict=True))
    np.testing.assert_allclose(window, smooth[:, 2:10, 3:11], atol=0.51)


def test_halving_averages_two_by_two():
    images = _images(2, 12, 12)
    halved = _resample(images, _matrix((6.0, 6.0), (12, 12)), 6)
    expected = images.astype(float).reshape(2, 6, 2, 6, 2, 1).mean((2, 4))
    np.testing.assert_allclose(halved, expected, atol=0.51)


def test_beyond_the_edge_an_image_goes_on_as_its_edge():
    images = _images(1, 8, 8)
    padded = np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)], mode="edge")
    np.testing.assert_array_equal(_resample(images, _matrix((4.0, 4.0), (16, 16)), 16), padded)


@pytest.mark.parametrize("seed", range(4))
def test_resampling_against_a_loop(seed):
    rng = np.random.default_rng(seed)
    height, width, size = rng.integers(5, 15, 3)
    image = _images(1, height, width, 2, seed)
    samples = math.ceil(max(height, width) / size)
    degrees, shear = rng.uniform(-60, 60), rng.uniform(-0.5, 0.5)
    cx, cy, w, h = rng.uniform(3, 9, 4)
    result = _resample(image, _matrix((cx, cy), (w, h), degrees, shear), int(size))[0]

    def read(y, x, channel):
        y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
        value = 0.0
        for row in range(height):
            for column in range(width):
                near = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
                value += near * image[0, row, column, channel]
        return value

    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    for i in range(size):
        for j in range(size):
            for channel in range(2):
                total = 0.0
                for down in range(samples):
                    for along in range(samples):
                        # Lean first, then turn: offsets from the crop's centre, y downwards.
                        y = ((i * samples + down + 0.5) / (size * samples) - 0.5) * h
                        x = ((j * samples + along + 0.5) / (size * samples) - 0.5) * w + shear * y
                        total += read(
                            cy + sin * x + cos * y - 0.5, cx + cos * x - sin * y - 0.5, channel
                        )
                assert abs(result[i, j, channel] - total / samples**2) < 0.51


def test_random_parameters_spread_over_their_ranges():
    # Every share up to 0.6 fits at every ratio, so that the tries bias nothing.
    ranges = {k: v for k, v in STRONG.items() if k != "image_size"} | {"crop_scale": (0.2, 0.6)}
    height, width = 40, 50
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(
        jax.vmap(lambda k: arrays._random_affine(k, height=height, width=width, **ranges))
    )
    matrix = np.asarray(draw(keys), np.float64)
    x, y = matrix[:, 0, 2], matrix[:, 1, 2]
    w = np.hypot(matrix[:, 0, 0], matrix[:, 1, 0])
    determinant = matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]
    h, share = np.abs(determinant) / w, np.abs(determinant) / (height * width)
    mirrored = determinant < 0
    angle = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]) - np.pi * mirrored)
    angle = (angle + 180) % 360 - 180
    along = matrix[:, 0, 1] * matrix[:, 0, 0] + matrix[:, 1, 1] * matrix[:, 1, 0]
    shear = along / (w * h) * np.where(mirrored, -1, 1)
    for name, values, low, high in [
        ("share", share, 0.2, 0.6),
        ("log ratio", np.log(w / h), math.log(0.75), math.log(4 / 3)),
        ("angle", angle, -20, 20),
        ("shear", shear, -0.2, 0.2),
        ("mirrored", mirrored, 0, 1),
    ]:
        margin = 1e-3 * (high - low)
        assert low - margin <= values.min() < low + 0.02 * (high - low), name
        assert high - 0.05 * (high - low) < values.max() <= high + margin, name
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low)), name
    for center, size, side in [(x, w, width), (y, h, height)]:
        assert (center - size / 2).min() > -1e-3
        assert (center + size / 2).max() < side + 1e-3
        assert center.mean() == pytest.approx(side / 2, rel=0.02)


def test_where_no_crop_fits_the_largest_is_cut_at_the_centre():
    matrix = arrays._random_affine(
        jax.random.key(0),
        height=10,
        width=60,
        crop_scale=(0.9, 1.0),
        crop_ratio=(0.5, 2.0),
        rotate=0.0,
        shear=0.0,
        flip=False,
    )
    np.testing.assert_allclose(matrix, [[20, 0, 30], [0, 10, 5]], atol=1e-4)


def test_each_position_step_and_seed_has_its_own_key():
    same = jnp.asarray(np.repeat(_images(1, 20, 20), 16, axis=0))

    def augmented(seed, step):
        images = arrays.augment(
            same, seed=jnp.uint32(seed), step=jnp.uint32(step), first=0, **STRONG
        )
        return [np.asarray(image).tobytes() for image in images]

    one = augmented(0, 0)
    assert len(set(one + augmented(0, 1) + augmented(1, 0))) == 48
    assert augmented(0, 0) == one


def test_restarts_and_processes_change_nothing(split):
    fresh = _train(split, steps=range(9))
    assert fresh[0].images.shape == (16, 16, 16, 3)
    assert (fresh[0].images.dtype, fresh[0].labels.dtype) == (jnp.uint8, jnp.int32)
    assert all(batch.valid.all() for batch in fresh)
    _assert_equal(_train(split, steps=range(7, 9)), fresh[7:])
    parts = [_train(split, steps=range(9), rows=rows) for rows in (slice(0, 6), slice(6, 16))]
    joined = [tuple(map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*parts)]  # noqa: B905
    _assert_equal(joined, fresh)


def test_eight_devices_give_what_one_gives(split):
    sharding = _sharding()
    sharded = _train(split, place=lambda batch: Batch(*jax.device_put(tuple(batch), sharding)))
    for batch in sharded:
        assert batch.images.sharding.is_equivalent_to(sharding, 4)
    _assert_equal(sharded, _train(split))


def test_augmentation_of_a_sharded_batch_communicates_nothing():
    images = jax.device_put(_images(16, 20, 20), _sharding())
    compiled = arrays.augment.lower(
        images, seed=jnp.uint32(0), step=jnp.uint32(0), first=0, **STRONG
    ).compile()
    text = compiled.as_text()
    assert not [
        word for word in ("all-gather", "all-reduce", "collective", "all-to-all") if word in text
    ]


@pytest.mark.parametrize("parts", [[slice(0, 16)], [slice(0, 3), slice(3, 16)]])
def test_evaluation_shows_every_image_once_in_order(split, parts):
    split = split._replace(images=_images(42, 18, 18, 3))
    steps = list(zip(*(_eval(split, rows=rows, image_size=18) for rows in parts), strict=True))
    assert len(steps) == 3
    images, labels, valid = (
        np.concatenate([np.asarray(batch[field]) for step in steps for batch in step])
        for field in range(3)
    )
    assert valid.tolist() == [True] * 42 + [False] * 6
    assert labels.tolist() == split.labels.tolist() + [-1] * 6
    np.testing.assert_array_equal(images[:42], split.images)
    assert not images[42:].any()


@pytest.mark.parametrize("shape", [(20, 36), (36, 20), (11, 12)])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_evaluation_crop_against_pillow(shape, filter):
    images = _images(1, *shape, 3) // 2 + 64  # Pillow clips between rows and columns
    short = min(shape)
    height, width = (18 * side // short for side in shape)
    resampling = Image.Resampling[filter.upper()]
    picture = Image.fromarray(images[0]).resize((width, height), resampling)
    top, left = (height - 16) // 2, (width - 16) // 2
    expected = np.asarray(picture).astype(int)[top : top + 16, left : left + 16]
    crop = arrays.resize_and_crop(
        jnp.asarray(images), resize_size=18, image_size=16, resampling=filter
    )[0]
    most = 1 if filter == "bilinear" else 2  # and rounds there
    assert np.abs(np.asarray(crop).astype(int) - expected).max() <= most


def test_mistakes_are_found_before_the_first_batch(split):
    with pytest.raises(UserError, match="asks for 8 classes"):
        arrays.train_batches(
            split, config=_config(batch_size=32), seed=0, steps=range(1), rows=slice(32), place=id
        )
    with pytest.raises(UserError, match=r"resize_size=10 is below --config.data.image_size=16"):
        arrays.eval_batches(split, config=_config(resize_size=10), rows=slice(16), place=id)


def test_one_ahead_makes_the_next_before_it_yields():
    made = []

    def make():
        for item in range(4):
            made.append(item)
            yield item

    seen = [(item, list(made)) for item in arrays.one_ahead(make())]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]


def test_no_tensorflow_is_needed():
    code = "import sys, mmljax.data.array_pipeline; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

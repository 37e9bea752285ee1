"""RandAugment, colour jitter and erasing against Pillow, colorsys, torchvision and loops."""

from __future__ import annotations

import colorsys
import functools
import hashlib
import io
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

import torch_networks
from mmljax.config import DataConfig, load_config
from mmljax.data import array_pipeline
from mmljax.data import augmentation as module
from mmljax.data.augmentation import OPERATIONS, augment_pixels
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.types import Batch, Split

ON: dict[str, Any] = {
    "randaugment": (2, 20.0),
    "color_jitter": (0.4, 0.5, 0.6, 0.2),
    "erase": 0.7,
}
OFF: dict[str, Any] = {"randaugment": (0, 9.0), "color_jitter": (0.0,) * 4, "erase": 0.0}


def picture(side: int = 24, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours from 12 to 240 with noise, other in each channel."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    shades = [80 + 120 * y * x, 200 - 140 * x, 60 + 90 * y][:channels]
    noise = random.integers(-40, 41, (side, side, channels))
    return np.clip(np.stack(shades, axis=-1) + noise, 12, 240).astype(np.uint8)


@functools.partial(jax.jit, static_argnames="magnitude")
def operated(image: Any, number: Any, sign: Any, *, magnitude: float) -> Any:
    return module.apply_operation(image.astype(jnp.float32), number, sign, magnitude=magnitude)


def operation(name: str, image: np.ndarray, *, magnitude: float, sign: int = 1) -> np.ndarray:
    number = OPERATIONS.index(name)
    return np.asarray(operated(image, number, float(sign), magnitude=magnitude))


# Each operation against an independent one


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0.0, 9.0, 30.0])
def test_enhancing_operations_against_pillow(magnitude: float, sign: int) -> None:
    image = picture()
    factor = 1 + 0.9 * sign * magnitude / 30
    for name, peer in {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "color": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }.items():
        expected = np.asarray(peer(Image.fromarray(image)).enhance(factor), float)
        found = operation(name, image, magnitude=magnitude, sign=sign)
        # Pillow rounds what it blends with, and cuts off the fraction of the result.
        np.testing.assert_allclose(found, expected, atol=1.5, err_msg=name)
        assert magnitude == 0 or np.abs(found - image).max() > 5, name


@pytest.mark.parametrize("magnitude", [0.0, 7.0, 15.0, 30.0])
def test_operations_on_values_against_pillow(magnitude: float) -> None:
    image = picture()
    peer = Image.fromarray(image)
    bits = 8 - round(4 * magnitude / 30)
    found = operation("posterize", image, magnitude=magnitude)
    np.testing.assert_array_equal(found, ImageOps.posterize(peer, bits))
    found = operation("solarize", image, magnitude=magnitude)
    np.testing.assert_array_equal(found, ImageOps.solarize(peer, 255 * (1 - magnitude / 30)))
    found = operation("equalize", image, magnitude=magnitude)
    np.testing.assert_array_equal(found, ImageOps.equalize(peer))
    found = operation("autocontrast", image, magnitude=magnitude)
    np.testing.assert_allclose(found, ImageOps.autocontrast(peer), atol=1)
    np.testing.assert_array_equal(operation("identity", image, magnitude=magnitude), image)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0.0, 11.0, 30.0])
def test_geometric_operations_against_pillow(magnitude: float, sign: int) -> None:
    image, margin = picture(20), 20
    side, amount = len(image), sign * magnitude / 30
    padded = Image.fromarray(np.pad(image, [(margin, margin), (margin, margin), (0, 0)], "edge"))
    shift, angle = round(150 / 331 * side * amount), math.radians(30) * amount
    cos, sin = math.cos(angle), math.sin(angle)
    for name, (a, b, along, c, d, down) in {
        "shear_x": (1, 0.3 * amount, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * amount, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
        "rotate": (cos, -sin, 0, sin, cos, 0),
    }.items():
        centre = margin + side / 2
        to_source = (a, b, along + centre - centre * (a + b)) + (
            c,
            d,
            down + centre - centre * (c + d),
        )
        moved = padded.transform(
            padded.size, Image.Transform.AFFINE, to_source, Image.Resampling.BILINEAR
        )
        expected = np.asarray(moved, float)[margin:-margin, margin:-margin]
        found = operation(name, image, magnitude=magnitude, sign=sign)
        np.testing.assert_allclose(found, expected, atol=1, err_msg=name)
        if magnitude == 0:
            np.testing.assert_array_equal(found, image)
        else:
            assert np.abs(found - image).mean() > 5, name


def test_constant_and_flat_channels() -> None:
    image = picture()
    image[..., 1] = 77
    for name in ("autocontrast", "equalize"):
        found = operation(name, image, magnitude=9)
        np.testing.assert_array_equal(found[..., 1], 77)
        assert np.isfinite(found).all()
        assert not np.array_equal(found[..., 0], image[..., 0])


def test_grey_images_keep_one_channel() -> None:
    image = picture(channels=1)
    for name in OPERATIONS:
        found = operation(name, image, magnitude=18)
        assert found.shape == image.shape
        assert (name in ("identity", "color")) == np.array_equal(found, image), name
    peer = np.asarray(ImageEnhance.Contrast(Image.fromarray(image[..., 0])).enhance(1.54), float)
    found = operation("contrast", image, magnitude=18)[..., 0]
    np.testing.assert_allclose(found, peer, atol=1.5)


def test_operations_and_ranges_against_torchvision() -> None:
    """The operations of its RandAugment, with its own magnitudes; it moves by nearest pixels."""
    torchvision = torch_networks.load_torchvision()
    import torch

    autoaugment = torchvision.transforms.autoaugment
    nearest = torchvision.transforms.InterpolationMode.NEAREST
    image = picture(24)
    space = autoaugment.RandAugment()._augmentation_space(31, (24, 24))
    assert len(space) == len(OPERATIONS)
    for name, (values, signed) in space.items():
        ours = "".join("_" + c.lower() if c.isupper() else c for c in name)[1:]
        ours = {"auto_contrast": "autocontrast"}.get(ours, ours)
        if ours in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
            greatest = {"shear": 0.3, "translate": 150 / 331 * 24, "rotate": 30}
            assert values[-1].item() == pytest.approx(greatest[ours.split("_")[0]])
            continue
        for level in (0, 12, 30):
            value = float(values[level]) if values.ndim else 0.0
            for sign in (1, -1) if signed else (1,):
                expected = autoaugment._apply_op(
                    torch.from_numpy(image.transpose(2, 0, 1)),
                    name,
                    value * sign,
                    interpolation=nearest,
                    fill=None,
                ).numpy()
                found = operation(ours, image, magnitude=level, sign=sign)
                # Its gray is cut to whole numbers before the blend, and so is the result.
                np.testing.assert_allclose(
                    found, expected.transpose(1, 2, 0).astype(float), atol=2, err_msg=name
                )


def by_loop(image: np.ndarray, amounts: Any, order: Any) -> np.ndarray:
    """Colour jitter in float64, pixel by pixel; colours by colorsys."""
    x = image.astype(float)
    for which in order:
        amount = float(amounts[which])
        gray = np.empty(x.shape[:2])
        for place in np.ndindex(gray.shape):
            red, green, blue = x[place]
            gray[place] = 0.299 * red + 0.587 * green + 0.114 * blue
        mean = np.mean(np.round(gray))
        for place in np.ndindex(gray.shape):
            if which == 3:
                h, s, v = colorsys.rgb_to_hsv(*(x[place] / 255))
                x[place] = np.array(colorsys.hsv_to_rgb((h + amount) % 1, s, v)) * 255
            else:
                other = (0.0, mean, gray[place])[which]
                x[place] = np.clip(amount * x[place] + (1 - amount) * other, 0, 255)
    return x


def test_colours_in_every_order_against_a_loop() -> None:
    image, adjust = picture(7), jax.jit(module.adjust_colors)
    amounts = np.array([1.3, 0.6, 1.7, -0.13])
    results = set()
    for order in itertools.permutations(range(4)):
        found = adjust(jnp.float32(image), jnp.float32(amounts), jnp.array(order))
        # A mean of rounded values moves by a step where rounding falls the other way.
        np.testing.assert_allclose(found, by_loop(image, amounts, order), atol=0.02)
        results.add(np.round(np.asarray(found)).tobytes())
    assert len(results) > 12  # the order matters


@pytest.mark.parametrize("turn", [0.0, 0.07, 0.5, -0.31])
def test_hue_against_colorsys(turn: float) -> None:
    image = picture(9)
    image[0, 0], image[0, 1], image[0, 2] = 0, 255, 90  # without colour
    image[1, :6] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 5], [7, 2, 7], [0, 3, 3]]
    found = module.turn_hue(jnp.float32(image), jnp.float32(turn))
    np.testing.assert_allclose(found, by_loop(image, [0, 0, 0, turn], [3]), atol=1e-3)


def test_colours_against_torchvision() -> None:
    torchvision = torch_networks.load_torchvision()
    import torch

    functional = torchvision.transforms.functional
    image = picture(16)
    peer = torch.from_numpy(image.transpose(2, 0, 1))
    for which, (adjust, amount) in enumerate(
        [
            (functional.adjust_brightness, 1.4),
            (functional.adjust_contrast, 0.3),
            (functional.adjust_saturation, 1.8),
            (functional.adjust_hue, 0.2),
        ]
    ):
        amounts = jnp.array([1.0, 1.0, 1.0, 0.0]).at[which].set(amount)
        found = module.adjust_colors(jnp.float32(image), amounts, jnp.array([2, 3, 0, 1]))
        expected = adjust(peer, amount).numpy().transpose(1, 2, 0).astype(float)
        np.testing.assert_allclose(found, expected, atol=1.5, err_msg=str(which))


def test_amounts_of_colour_jitter_spread_over_their_ranges(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "adjust_colors", lambda x, amounts, order, hue: (amounts, order))
    ranges = (0.4, 1.5, 0.0, 0.25)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: module.random_colors(jnp.zeros((2, 2, 3)), key, ranges=ranges))
    amounts, order = map(np.asarray, draw(keys))
    for k, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (1.0, 1.0), (-0.25, 0.25)]):
        values = amounts[:, k]
        assert low <= values.min() <= low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) <= values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.05)
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 100  # 167 each on average


# Erasing


def test_rectangles_have_the_stated_sizes() -> None:
    side, count = 100, 3000
    numbers = jax.random.uniform(jax.random.key(1), (count, 23))
    masks = np.asarray(
        jax.vmap(lambda n: module.erased_rectangle(n, side, probability=0.8))(numbers)
    )
    erased = masks.any((1, 2))
    assert erased.mean() == pytest.approx(0.8, abs=0.03)
    np.testing.assert_array_equal(erased, np.asarray(numbers[:, -1]) < 0.8)
    rows, columns = masks.any(2)[erased], masks.any(1)[erased]
    heights, widths = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(masks[erased].sum((1, 2)), heights * widths)  # rectangles
    shares, ratios = heights * widths / side**2, np.log(heights / widths)
    assert 0.018 < shares.min() < 0.03
    assert 0.38 < shares.max() < 0.42
    assert shares.mean() == pytest.approx(0.21, abs=0.02)
    assert np.abs(ratios).max() < math.log(1 / 0.3) + 0.1
    assert np.abs(ratios).max() > 1.1
    assert ratios.mean() == pytest.approx(0, abs=0.05)
    for lines in (rows, columns):
        places = np.arange(side)
        assert all(np.ptp(places[line]) + 1 == line.sum() for line in lines)  # no gap
        free = side - lines.sum(1)
        at = lines.argmax(1) / np.maximum(free, 1)
        assert at[free > 10].mean() == pytest.approx(0.5, abs=0.03)


def test_a_rectangle_against_a_loop() -> None:
    for seed in range(30):
        numbers = np.random.default_rng(seed).random(23).astype(np.float32)
        expected = np.zeros((17, 17), bool)
        for share, shape in zip(numbers[:10], numbers[10:20], strict=True):
            area = 17 * 17 * (0.02 + 0.38 * float(share))
            ratio = 0.3 ** (1 - 2 * float(shape))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height <= 17 and width <= 17:
                free = np.array([17 - height, 17 - width])
                top, left = (numbers[20:22].astype(float) * (free + 1)).astype(int)
                expected[top : top + height, left : left + width] = numbers[22] < 0.5
                break
        found = module.erased_rectangle(jnp.asarray(numbers), 17, probability=0.5)
        np.testing.assert_array_equal(found, expected)


def test_noise_is_uniform_and_lies_within_the_rectangle() -> None:
    images = np.broadcast_to(picture(32), (200, 32, 32, 3))
    found = np.asarray(augmented(images, **{**OFF, "erase": 1.0}))
    changed = (found != images).any(-1)
    box = changed.any(2)[:, :, None] & changed.any(1)[:, None, :]
    noise = found[box].astype(float)
    assert noise.mean() == pytest.approx(127.5, abs=1)
    assert noise.std() == pytest.approx(np.sqrt((256**2 - 1) / 12), abs=1)
    np.testing.assert_array_equal(found[~box], images[~box])


# Keys, devices, pipelines


def augmented(images: Any, *, seed: int = 0, step: int = 0, first: int = 0, **keys: Any) -> Any:
    seed, step = jnp.uint32(seed), jnp.uint32(step)
    return augment_pixels(jnp.asarray(images), seed=seed, step=step, first=first, **(ON | keys))


def test_each_position_step_and_seed_has_its_own_numbers() -> None:
    same = np.broadcast_to(picture(16), (8, 16, 16, 3))
    seen = [
        image.tobytes()
        for kind in ({}, {"step": 1}, {"seed": 1}, {"first": 8})
        for image in np.asarray(augmented(same, **kind))
    ]
    assert len(set(seen)) == 32
    np.testing.assert_array_equal(augmented(same[:3], first=5), augmented(same)[5:])


def test_each_kind_has_numbers_of_its_own() -> None:
    images = np.stack([picture(16, seed=i) for i in range(8)])
    plain = augmented(images, erase=0.0)
    erased = augmented(images)
    changed = (plain != erased).any(-1)
    assert 0 < changed.mean() < 0.4
    np.testing.assert_array_equal(
        augmented(plain, **{**OFF, "erase": 0.7}), erased
    )  # as if one followed the other


def test_operations_are_drawn_with_equal_probability(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "apply_operation", lambda x, number, sign, magnitude: x + number)
    keys = jax.random.split(jax.random.key(0), 4200)
    draw = jax.vmap(
        lambda key: module.random_operations(jnp.zeros(()), key, count=1, magnitude=9.0)
    )
    counts = np.bincount(np.asarray(draw(keys)).astype(int), minlength=14)
    assert len(counts) == 14
    assert counts.min() > 230
    assert counts.max() < 370  # 300 each on average


def test_eight_devices_equal_one_and_communicate_nothing() -> None:
    images = np.stack([picture(16, seed=i) for i in range(16)])
    sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
    sharded = jax.device_put(images, sharding)
    found = augmented(sharded)
    assert found.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_array_equal(found, augmented(images))
    numbers = {"seed": jnp.uint32(0), "step": jnp.uint32(0), "first": 0}
    text = augment_pixels.lower(sharded, **numbers, **ON).compile().as_text()
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all") if word in text]


def config(**changes: Any) -> DataConfig:
    sizes = {"image_size": 16, "resize_size": 16, "batch_size": 8, "images_per_class": 2}
    rules = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "resampling": "bilinear"}
    return DataConfig(threads=1, **(sizes | rules | changes))


def splits() -> dict[str, Split]:
    images = np.stack([picture(16, seed=i) for i in range(20)])
    labels, names = np.repeat(np.arange(5), 4).astype(np.int32), np.arange(20).astype(str)
    encoded = np.empty(20, object)
    for i, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        encoded[i] = file.getvalue()
    return {"arrays": Split(images, labels, names), "files": Split(encoded, labels, names)}


def batches(
    kind: str, *, steps: range = range(3), rows: slice = slice(0, 8), **changes: Any
) -> Any:
    pipeline: Any = array_pipeline
    if kind == "files":
        pytest.importorskip("tensorflow", reason="reads image files")
        from mmljax.data import pipeline
    return list(
        pipeline.train_batches(
            splits()[kind],
            config=config(**changes),
            seed=3,
            steps=steps,
            rows=rows,
            place=lambda batch: Batch(*map(jnp.asarray, batch)),
        )
    )


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_batches_by_default_are_those_of_earlier_versions(kind: str) -> None:
    """Crops of whole images: indices and mirroring alone, which no machine rounds."""
    golden = {"arrays": "1ed2bc45a72c1175", "files": "3821361799a0d248"}
    found = batches(kind)
    digest = hashlib.sha256()
    for batch in found:
        digest.update(np.asarray(batch.images).tobytes() + np.asarray(batch.labels).tobytes())
    assert digest.hexdigest()[:16] == golden[kind]


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_pipelines_augment_what_they_yield_without(kind: str) -> None:
    plain, found = batches(kind), batches(kind, **ON)
    for step, (before, after) in enumerate(zip(plain, found, strict=True)):
        expected = augmented(before.images, seed=3, step=step)
        np.testing.assert_array_equal(after.images, expected)
        np.testing.assert_array_equal(after.labels, before.labels)
        assert not np.array_equal(after.images, before.images)
    later = batches(kind, steps=range(2, 3), **ON)  # after a restart
    np.testing.assert_array_equal(later[0].images, found[2].images)
    parts = [batches(kind, rows=rows, **ON)[1].images for rows in (slice(0, 3), slice(3, 8))]
    np.testing.assert_array_equal(np.concatenate(parts), found[1].images)


def test_nothing_is_done_where_all_is_off(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "augment_pixels", None)
    batch: Any = object()
    apply = module.train_augmentation(config(), channels=5, seed=0, first=0)
    assert apply(batch, 0) is batch


# Mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("color_jitter=(0.1,0.1,0.1)", "data.color_jitter must hold 4 values"),
        ("color_jitter=0.4", "data.color_jitter must be a tuple"),
        ("color_jitter=(0.1,-0.1,0,0)", "data.color_jitter must be at least 0, found -0.1"),
        ("color_jitter=(0,0,0,0.6)", "data.color_jitter must be at least 0 and at most 0.5"),
        ("randaugment=(11,9)", "data.randaugment must be at least 0 and at most 10, found 11"),
        ("randaugment=(2,31)", "data.randaugment must be at least 0 and at most 30, found 31"),
        ("randaugment=(2.5,9)", "data.randaugment must be of type int, found 2.5"),
        ("randaugment=2", "data.randaugment must be a tuple"),
        ("erase=1.5", "data.erase must be at least 0 and at most 1, found 1.5"),
    ],
)
def test_malformed_values(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("quickstart", [f"data.{override}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["randaugment", "color_jitter"])
def test_colours_of_other_numbers_of_channels_are_refused(key: str) -> None:
    split = Split(np.zeros((8, 16, 16, 4), np.uint8), np.arange(8) % 4, np.arange(8).astype(str))
    with pytest.raises(UserError, match=f"--config.data.{key}=.* of 1 or 3 channels, found 4"):
        array_pipeline.train_batches(
            split, config=config(**{key: ON[key]}), seed=0, steps=range(1), rows=slice(8), place=id
        )
    images = np.zeros((2, 8, 8, 4), np.uint8)
    assert np.asarray(augmented(images, **{**OFF, "erase": 1.0})).any()

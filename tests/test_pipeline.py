"""Image files become the same batches whatever the threads, processes and restarts."""

from __future__ import annotations

import functools
import io
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmljax.config import DataConfig, SyntheticConfig
from mmljax.errors import UserError
from mmljax.types import Split

tf = pytest.importorskip("tensorflow", reason="the pipeline of image files reads by TensorFlow")

from mmljax.data import pipeline, transforms  # noqa: E402

LABELS = np.repeat(np.arange(5), 6).astype(np.int32)


def _config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "source": "in_shop",
        "directory": "",
        "image_size": 24,
        "resize_size": 28,
        "crop_scale": (0.2, 1.0),
        "crop_ratio": (0.75, 4 / 3),
        "flip": True,
        "rotate": 0.0,
        "shear": 0.0,
        "batch_size": 8,
        "images_per_class": 2,
        "eval_batch_size": 8,
        "threads": 2,
        "prefetch": 2,
        "synthetic": SyntheticConfig(train_items=1, test_items=1, views=1, image_size=8, seed=0),
    }
    return DataConfig(**(values | changes))


def _picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth coloured waves: survives JPEG, and has no symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + 6 * i) for i in range(3)]
    return np.round(127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> Split:
    """Thirty files of many sizes, five classes; every seventh a PNG in spite of its name."""
    for i in range(len(LABELS)):
        image = _picture(30 + i, 61 - i, i)
        encoded = _png(image) if i % 7 == 3 else tf.io.encode_jpeg(image, quality=95).numpy()
        (tmp_path / f"{i:02}.jpg").write_bytes(encoded)
    names = np.array([f"{i:02}.jpg" for i in range(len(LABELS))])
    return Split(np.array([str(tmp_path / name) for name in names]), LABELS, names)


def _encoded(files: Split) -> Split:
    contents = np.empty(len(LABELS), object)
    contents[:] = [Path(path).read_bytes() for path in files.images]
    return files._replace(images=contents)


def _train(split: Split, *, steps=range(4), rows=slice(0, 8), seed=0, **changes):
    return list(
        pipeline.train_batches(
            split,
            config=_config(**changes),
            seed=seed,
            steps=steps,
            rows=rows,
            place=lambda batch: batch,
        )
    )


def _eval(split: Split, *, rows=slice(0, 8), **changes):
    return list(
        pipeline.eval_batches(
            split, config=_config(**changes), rows=rows, place=lambda batch: batch
        )
    )


def _assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_training_batches_have_the_promised_form(files):
    for batch in _train(files):
        assert batch.images.shape == (8, 24, 24, 3)
        assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
        assert batch.valid.tolist() == [True] * 8
        assert sorted(np.unique(batch.labels, return_counts=True)[1]) == [2, 2, 2, 2]


def test_threads_and_restarts_change_nothing(files):
    fresh = _train(files, steps=range(9), threads=1)
    _assert_equal(_train(files, steps=range(7, 9), threads=4), fresh[7:])
    _assert_equal(_train(files, steps=range(9), threads=0, prefetch=0), fresh)
    assert (fresh[0].images != fresh[1].images).any()
    assert (fresh[0].images != _train(files, steps=range(1), seed=1)[0].images).any()


def test_processes_together_load_the_whole_batch(files):
    whole = _train(files)
    parts = [_train(files, rows=slice(0, 3)), _train(files, rows=slice(3, 8))]
    joined = [tuple(map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*parts)]  # noqa: B905
    _assert_equal(joined, whole)


def test_encoded_bytes_give_what_paths_give(files):
    _assert_equal(_train(_encoded(files)), _train(files))
    _assert_equal(_eval(_encoded(files)), _eval(files))


@pytest.mark.parametrize("rows", [[slice(0, 8)], [slice(0, 2), slice(2, 8)]])
def test_evaluation_shows_every_image_once_in_order(files, rows):
    parts = [_eval(files, rows=part) for part in rows]
    labels, valid = (
        np.concatenate([np.concatenate([b[field] for b in step]) for step in zip(*parts)])  # noqa: B905
        for field in (1, 2)
    )
    assert valid.tolist() == [True] * 30 + [False] * 2
    assert labels.tolist() == [*LABELS.tolist(), -1, -1]
    images = np.concatenate([np.concatenate([b.images for b in step]) for step in zip(*parts)])  # noqa: B905
    assert not images[30:].any()
    for image, path in zip(images, files.images, strict=False):
        expected = transforms.center_crop(tf.io.read_file(path), resize_size=28, image_size=24)
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (37, 37), (20, 31)])
def test_center_crop_against_pillow(shape):
    image = _picture(*shape, seed=4)
    short = min(shape)
    height, width = (28 * side // short for side in shape)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = (height - 24) // 2, (width - 24) // 2
    crop = transforms.center_crop(tf.constant(_png(image)), resize_size=28, image_size=24)
    difference = np.abs(crop.numpy().astype(int) - resized[top : top + 24, left : left + 24])
    assert difference.max() <= 1


@pytest.mark.parametrize("encode", [_png, lambda image: tf.io.encode_jpeg(image).numpy()])
def test_crop_and_flip_at_whole_pixels(encode):
    encoded = encode(_picture(48, 48, seed=1))
    contents, plain = tf.constant(encoded), np.asarray(Image.open(io.BytesIO(encoded)))
    numbers = np.full(transforms.NUMBERS, 0.9)
    numbers[-3:] = 0.7, 0.2, 0.9  # down, along, no flip

    def crop(numbers, size, share):
        return transforms.random_crop(
            contents,
            tf.constant(numbers),
            image_size=size,
            scale=(share, share),
            ratio=(1.0, 1.0),
            flip=True,
        ).numpy()

    np.testing.assert_array_equal(crop(numbers, 48, 1.0), plain)
    top, left = int(0.7 * 25), int(0.2 * 25)
    window = plain[top : top + 24, left : left + 24]
    np.testing.assert_array_equal(crop(numbers, 24, 0.25), window)
    numbers[-1] = 0.1
    np.testing.assert_array_equal(crop(numbers, 24, 0.25), window[:, ::-1])


def _windows(height, width, table, scale, ratio):
    window = functools.partial(
        transforms._random_window, tf.constant(height), tf.constant(width), scale=scale, ratio=ratio
    )
    draw = tf.function(lambda t: tf.map_fn(window, t, fn_output_signature=tf.int32))
    return draw(tf.constant(table)).numpy()


def _slow_window(height, width, numbers, scale, ratio):
    """Ten tries, then the largest centred window of an allowed shape: one number at a time."""
    for k in range(10):
        area = height * width * (scale[0] * (1 - numbers[k]) + scale[1] * numbers[k])
        shape = ratio[0] ** (1 - numbers[10 + k]) * ratio[1] ** numbers[10 + k]
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if w <= width and h <= height:
            top = math.floor(numbers[20] * (height - h + 1))
            return top, math.floor(numbers[21] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        h, w = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        h, w = height, round(height * ratio[1])
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("shape", [(112, 150), (150, 112), (12, 90), (90, 12), (64, 64)])
@pytest.mark.parametrize("scale", [(0.16, 1.0), (0.9, 1.0)])
def test_random_window_against_a_loop(shape, scale):
    ratio = (0.75, 4 / 3)
    table = np.random.default_rng(0).random((60, transforms.NUMBERS))
    drawn = _windows(*shape, table, scale, ratio)
    expected = [_slow_window(*shape, numbers, scale, ratio) for numbers in table]
    np.testing.assert_array_equal(drawn, expected)


def test_random_windows_spread_over_scales_ratios_and_places():
    scale, ratio, height, width = (0.2, 0.6), (0.75, 4 / 3), 400, 500
    table = np.random.default_rng(1).random((1500, transforms.NUMBERS))
    top, left, h, w = _windows(height, width, table, scale, ratio).T.astype(float)
    area, shape = h * w / (height * width), w / h
    assert area.min() > 0.197
    assert area.max() < 0.603
    assert area.mean() == pytest.approx(0.4, abs=0.02)
    assert shape.min() > 0.745
    assert shape.max() < 1.34
    assert np.log(shape).mean() == pytest.approx(0, abs=0.03)
    assert (top / (height - h)).mean() == pytest.approx(0.5, abs=0.04)
    assert (left / (width - w)).mean() == pytest.approx(0.5, abs=0.04)
    assert min(top.min(), left.min()) >= 0
    assert (top + h).max() == height
    assert (left + w).max() == width


@pytest.mark.parametrize("contents", ["truncated", "garbage", "empty"])
@pytest.mark.parametrize("encoded", [False, True])
def test_an_image_that_does_not_decode_is_named(files, contents, encoded):
    bad = Path(files.images[13])
    data = {"truncated": bad.read_bytes()[:400], "garbage": b"no image", "empty": b""}[contents]
    bad.write_bytes(data)
    split, where = (_encoded(files), "") if encoded else (files, f" ({bad})")
    with pytest.raises(UserError) as caught:
        _eval(split)
    assert str(caught.value).startswith(
        f"image 13.jpg{where} cannot be decoded: its {len(data)} bytes are no whole JPEG"
    )


def test_training_names_a_bad_image_when_it_meets_it(files):
    Path(files.images[13]).write_bytes(b"no image")
    batches = pipeline.train_batches(
        files, config=_config(), seed=0, steps=range(20), rows=slice(8), place=lambda batch: batch
    )
    with pytest.raises(UserError, match=r"image 13\.jpg"):
        list(batches)


def test_a_missing_file_is_named(files):
    Path(files.images[13]).unlink()
    with pytest.raises(UserError, match=r"image 13\.jpg \(.*13\.jpg\) cannot be read .*directory"):
        _eval(files)


def test_leaving_early_leaves_no_thread_behind(files):
    before = threading.active_count()
    batches = pipeline.train_batches(
        files,
        config=_config(),
        seed=0,
        steps=range(10**9),
        rows=slice(8),
        place=lambda batch: batch,
    )
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before


def test_mistakes_are_found_before_any_image_is_read(files):
    with pytest.raises(UserError, match="asks for 6 classes"):
        pipeline.train_batches(
            files, config=_config(batch_size=12), seed=0, steps=range(1), rows=slice(12), place=id
        )
    with pytest.raises(UserError, match=r"resize_size=20 is below --config.data.image_size=24"):
        pipeline.eval_batches(files, config=_config(resize_size=20), rows=slice(8), place=id)


def test_grey_images_become_colour():
    contents = tf.constant(_png(_picture(30, 30, seed=2)[..., 0]))
    crop = transforms.center_crop(contents, resize_size=30, image_size=30).numpy()
    np.testing.assert_array_equal(crop, np.repeat(_picture(30, 30, seed=2)[..., :1], 3, axis=-1))

"""Image files become the same batches whatever the threads, processes and restarts."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmljax.config import DataConfig, SyntheticConfig
from mmljax.errors import UserError
from mmljax.types import Split

tf = pytest.importorskip("tensorflow", reason="the pipeline of image files reads by TensorFlow")

from mmljax.data import limits, pipeline, transforms  # noqa: E402

LABELS = np.repeat(np.arange(5), 6).astype(np.int32)


def _config(**changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "source": "in_shop",
        "directory": "",
        "check_counts": True,
        "test_share": 0.5,
        "corrupt": "error",
        "image_size": 24,
        "resize_size": 28,
        "resampling": "bilinear",
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


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (37, 37), (20, 31)])
def test_center_crop_against_pillow(shape, filter):
    image = _picture(*shape, seed=4)
    short = min(shape)
    height, width = (28 * side // short for side in shape)
    resized = np.asarray(
        Image.fromarray(image).resize((width, height), Image.Resampling[filter.upper()])
    )
    top, left = (height - 24) // 2, (width - 24) // 2
    crop = transforms.center_crop(
        tf.constant(_png(image)), resize_size=28, image_size=24, resampling=filter
    )
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
    crop = transforms.RandomCrop(24, scale, ratio, False, "bilinear")
    encoded = tf.io.encode_jpeg(np.zeros((height, width, 3), np.uint8))
    headers = [transforms.header(encoded, row, crop=crop, plain=True) for row in table]
    ratios = tf.stack([header.ratios for header in headers])
    shapes = tf.repeat([[height, width]], len(table), axis=0)
    return transforms._random_windows(shapes, ratios, table, scale=scale, ratio=ratio).numpy()


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
        f"image 13.jpg{where} cannot be decoded: its {len(data)} bytes are not a whole JPEG"
    )


def test_training_names_a_bad_image_when_it_meets_it(files):
    Path(files.images[13]).write_bytes(b"no image")
    batches = pipeline.train_batches(
        files, config=_config(), seed=0, steps=range(20), rows=slice(8), place=lambda batch: batch
    )
    with pytest.raises(UserError, match=r"image 13\.jpg"):
        list(batches)


def _spoil(files, *numbers, contents=b"no image"):
    for number in numbers:
        Path(files.images[number]).write_bytes(contents)


def test_a_corrupt_image_is_replaced_by_the_next_of_its_class(files, caplog):
    sound = _train(files, steps=range(12))
    good = files._replace(images=files.images.copy())
    for bad, instead in ((13, 15), (14, 15), (17, 12)):  # class 2 is images 12 to 17
        good.images[bad] = files.images[instead]
    expected = _train(good, steps=range(12))
    _spoil(files, 13, 14, 17)
    with caplog.at_level("WARNING", "mmljax"):
        found = _train(files, steps=range(12), corrupt="skip")
    _assert_equal(found, expected)
    assert any((a.images != b.images).any() for a, b in zip(found, sound, strict=True))
    records = [record for record in caplog.records if record.name == "mmljax.data.pipeline"]
    told = sorted(record.getMessage() for record in records)
    assert [message.split()[1] for message in told] == ["13.jpg", "14.jpg", "17.jpg"]
    assert "cannot be decoded: its 8 bytes" in told[0]
    assert {message[-10:] for message in told} == {"(1 so far)", "(2 so far)", "(3 so far)"}
    for changes in ({"threads": 1, "prefetch": 0}, {"threads": 4}):
        again = _train(files, steps=range(7, 12), corrupt="skip", **changes)
        _assert_equal(again, expected[7:])
    parts = [_train(files, rows=r, corrupt="skip") for r in (slice(0, 3), slice(3, 8))]
    joined = [tuple(map(np.concatenate, zip(*pair, strict=True))) for pair in zip(*parts)]  # noqa: B905
    _assert_equal(joined, expected[:4])


def test_replaced_images_are_counted_by_step(files):
    _spoil(files, 13)
    skipped: dict[int, int] = {}
    sound = _train(files, steps=range(12), corrupt="skip")
    batches = pipeline.train_batches(
        files,
        config=_config(corrupt="skip"),
        seed=0,
        steps=range(12),
        rows=slice(0, 8),
        place=lambda batch: batch,
        skipped=skipped,
    )
    _assert_equal(list(batches), sound)
    drawn = [pipeline.batch_sampler(LABELS, _config(), seed=0)(step) for step in range(12)]
    assert skipped == {step: 1 for step, rows in enumerate(drawn) if 13 in rows}
    assert 0 < len(skipped) < 12


def test_a_cut_image_counts_as_corrupt_only_where_its_crop_needs_the_rest(files):
    contents = Path(files.images[13]).read_bytes()
    _spoil(files, 13, contents=contents[: len(contents) * 2 // 3])
    fresh = _train(files, steps=range(20), corrupt="skip")
    _assert_equal(_train(files, steps=range(19, 20), corrupt="skip"), fresh[19:])


def test_a_class_without_any_sound_image_stops_the_training(files):
    _spoil(files, *range(12, 18))
    with pytest.raises(UserError, match=r"cannot be decoded: .*; no other image of its class can"):
        _train(files, steps=range(12), corrupt="skip")


def test_what_is_not_skipped(files):
    with pytest.raises(UserError, match="config.data.corrupt='skipp' is unknown"):
        _train(files, corrupt="skipp")
    _spoil(files, 13)
    with pytest.raises(UserError, match=r"image 13\.jpg .*cannot be decoded"):
        _eval(files, corrupt="skip")
    Path(files.images[13]).unlink()
    with pytest.raises(UserError, match=r"image 13\.jpg .*cannot be read"):
        _train(files, steps=range(12), corrupt="skip")


def _bomb(kind):
    """The head of a small file of 60,000 x 50,000 pixels, which Pillow too reads as that."""
    width, height = 60_000, 50_000
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, kind)
    data = bytearray(small.getvalue())
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    elif kind == "PNG":
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif kind == "GIF":
        data[6:10] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    else:
        data[18:26] = width.to_bytes(4, "little") + (-height).to_bytes(4, "little", signed=True)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_an_image_that_states_too_many_pixels_is_not_decoded(files, kind, monkeypatch):
    with warnings.catch_warnings(action="ignore"), pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(_bomb(kind)))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("was decoded")

    contents = tf.constant(_bomb(kind))
    for name in ("decode_jpeg", "decode_image"):
        monkeypatch.setattr(tf.io, name, refuse)
    monkeypatch.setattr(tf.image, "decode_and_crop_jpeg", refuse)
    with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
        transforms.center_crop(contents, resize_size=28, image_size=24)
    monkeypatch.undo()
    _spoil(files, 13, contents=_bomb(kind))
    with pytest.raises(UserError, match=r"13\.jpg .*states 60000 x 50000 pixels, and more"):
        _eval(files)


def test_other_kinds_of_files_are_refused(files):
    buffer = io.BytesIO()
    Image.fromarray(_picture(30, 30, seed=0)).save(buffer, "PPM")
    _spoil(files, 13, contents=buffer.getvalue())
    with pytest.raises(UserError, match=r"13\.jpg .*not a whole JPEG, PNG, WebP, AVIF, GIF or BMP"):
        _eval(files)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (60, 60), (200, 130), (20, 15)])
def test_a_random_crop_against_pillow(shape, filter):
    image, size = _picture(*shape, seed=3), 64
    table = np.random.default_rng(5).random((8, transforms.NUMBERS))
    windows = _windows(*shape, table, (0.2, 1.0), (0.75, 4 / 3))
    for numbers, (top, left, height, width) in zip(table, windows, strict=True):
        crop = transforms.random_crop(
            tf.constant(_png(image)),
            tf.constant(numbers),
            image_size=size,
            scale=(0.2, 1.0),
            ratio=(0.75, 4 / 3),
            flip=True,
            resampling=filter,
        )
        window = Image.fromarray(image[top : top + height, left : left + width])
        expected = np.asarray(window.resize((size, size), Image.Resampling[filter.upper()])).astype(
            int
        )
        if numbers[-1] < 0.5:
            expected = expected[:, ::-1]
        assert np.abs(crop.numpy() - expected).max() <= 1


def _jpeg(height: int, width: int, seed: int) -> tuple[bytes, Image.Image]:
    """A photograph's file, with detail in it, and what it holds at full size."""
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    picture = np.clip(_picture(height, width, seed) + noise, 0, 255).astype(np.uint8)
    encoded = tf.io.encode_jpeg(picture, quality=95).numpy()
    return encoded, Image.open(io.BytesIO(encoded)).convert("RGB")


@pytest.mark.parametrize(
    ("short", "scale"), [(127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8), (1200, 8)]
)
def test_a_large_jpeg_is_decoded_at_a_scale_that_leaves_twice_the_pixels(short, scale, monkeypatch):
    asked = []

    def record(own, *arguments, **options):
        asked.append(options["ratio"])
        return own(*arguments, **options)

    own = tf.image.decode_and_crop_jpeg
    monkeypatch.setattr(tf.image, "decode_and_crop_jpeg", functools.partial(record, own))
    contents = tf.constant(_jpeg(short, short + 30, seed=1)[0])
    transforms.center_crop(contents, resize_size=32, image_size=32)
    numbers = tf.zeros(transforms.NUMBERS, tf.float64)
    whole = {"scale": (1.0, 1.0), "ratio": ((short + 30) / short,) * 2, "flip": False}
    transforms.random_crop(contents, numbers, image_size=32, **whole)
    assert asked == [scale, scale]


@pytest.mark.parametrize("shape", [(150, 200), (333, 277), (600, 901), (1003, 700)])
def test_at_a_scale_pixels_are_about_those_of_the_whole_image(shape):
    encoded, plain = _jpeg(*shape, seed=6)
    height, width = (32 * side // min(shape) for side in shape)
    top, left = (height - 32) // 2, (width - 32) // 2
    resized = np.asarray(plain.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    crop = transforms.center_crop(tf.constant(encoded), resize_size=32, image_size=32)
    difference = np.abs(crop.numpy() - resized[top : top + 32, left : left + 32])
    assert difference.max() <= 6
    assert difference.mean() <= 0.5

    table = np.random.default_rng(5).random((6, transforms.NUMBERS))
    for numbers in table:
        top, left, height, width = _slow_window(*shape, numbers, (0.3, 1.0), (0.75, 4 / 3))
        crop = transforms.random_crop(
            tf.constant(encoded),
            tf.constant(numbers),
            image_size=32,
            scale=(0.3, 1.0),
            ratio=(0.75, 4 / 3),
            flip=False,
        )
        box = left, top, left + width, top + height
        expected = plain.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        difference = np.abs(crop.numpy() - np.asarray(expected).astype(int))
        assert difference.max() <= 6
        assert difference.mean() <= 0.5


def _resize_plan(size, factor, translation, *, grows):
    nothing = dict.fromkeys(transforms.Plan._fields)
    wanted = {"size": size, "factor": factor, "translation": translation, "grows": grows}
    return transforms.Plan(**(nothing | wanted))


@pytest.mark.parametrize(("kernel", "name"), [("triangle", "bilinear"), ("keyscubic", "bicubic")])
@pytest.mark.parametrize("shape", [(40, 50), (25, 60), (60, 25), (20, 20)])
def test_two_passes_over_rows_give_the_bits_of_one_over_both_axes(shape, kernel, name):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    sides, size = np.array(shape) * 2 - 7, [24, 30]
    factor = np.float32(np.array(size) * 2 / sides)
    plan = _resize_plan(size, factor, -0.5 * factor, grows=tf.constant(False))
    found = transforms._resize(tf.constant(image), plan, resampling=name)
    whole = tf.raw_ops.ScaleAndTranslate(
        images=image[None], size=size, scale=factor, translation=-0.5 * factor, kernel_type=kernel
    )
    assert found.shape == (24, 30, 3)
    np.testing.assert_array_equal(found, whole[0])


@pytest.mark.parametrize("shape", [(40, 50), (64, 1), (1, 71), (64, 71)])
def test_two_passes_enlarge_as_one_over_both_axes_does(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    plan = _resize_plan([64, 71], np.zeros(2), np.zeros(2), grows=tf.constant(True))
    found = transforms._resize(tf.constant(image), plan, resampling="bilinear")
    whole = tf.image.resize(image, [64, 71], method="bilinear")
    np.testing.assert_allclose(found, whole, atol=1e-4)


@pytest.mark.parametrize("size", [32, 100, 600])
@pytest.mark.parametrize("lost", [2, 1000])
def test_a_jpeg_without_its_end_is_refused_at_every_scale(size, lost):
    encoded = _jpeg(600, 901, seed=6)[0][:-lost]
    with pytest.raises(tf.errors.InvalidArgumentError):
        transforms.center_crop(tf.constant(encoded), resize_size=size, image_size=size)


def test_paths_on_another_file_system_give_what_local_ones_give(files, tmp_path):
    paths = [f"ram://{tmp_path.name}-{Path(path).name}" for path in files.images]
    for path, local in zip(paths, files.images, strict=True):
        with tf.io.gfile.GFile(path, "wb") as file:
            file.write(Path(local).read_bytes())
    remote = files._replace(images=np.array(paths))
    _assert_equal(_train(remote), _train(files))
    _assert_equal(_eval(remote), _eval(files))


def test_batches_are_placed_one_ahead(files):
    placed = []
    batches = pipeline.train_batches(
        files,
        config=_config(),
        seed=0,
        steps=range(5),
        rows=slice(8),
        place=lambda batch: placed.append(batch) or batch,
    )
    for taken in range(1, 5):
        assert next(batches) is placed[taken - 1]
        assert len(placed) == taken + 1


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


class _CountingBudget(limits.PixelBudget):
    """Counts what is decoded within it, and the most pixels of that at once."""

    def __init__(self, limit):
        super().__init__(limit)
        self.taken_pixels, self.most = [], 0

    @contextlib.contextmanager
    def taken(self, pixels):
        with super().taken(pixels):
            with self._changed:
                self.taken_pixels.append(pixels)
                self.most = max(self.most, self.limit - self._free)
            yield


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("share", [2_000, 1_000, 0])
def test_large_images_are_decoded_within_the_pixel_budget(files, threads, share, monkeypatch):
    """Some images, or all, are above their share of a small budget; the batches are the same."""
    for i, path in enumerate(files.images):
        Path(path).write_bytes(_png(_picture(30 + i, 61 - i, i)))
    pixels = [(30 + i) * (61 - i) for i in range(len(LABELS))]  # 1,830 to 2,070
    expected = _train(files, threads=threads), _eval(files, threads=threads)
    budget = _CountingBudget(2 * threads * share + 1)
    monkeypatch.setattr(pipeline, "_BUDGET", budget)
    _assert_equal(_train(files, threads=threads), expected[0])
    budget.taken_pixels.clear()
    _assert_equal(_eval(files, threads=threads), expected[1])
    large = [count for count in pixels if count > share]
    assert sorted(budget.taken_pixels) == sorted(large)
    assert 0 < budget.most <= budget.limit
    assert (len(large) < len(pixels)) == (share == 2_000)
    assert pipeline.decodable(files, _config(threads=threads)).all()


def test_a_large_jpeg_counts_by_the_pixels_that_are_decoded(files, monkeypatch):
    """At an eighth of its size a photograph is small, and decoded beside others."""
    images = np.array([_jpeg(512, 640, seed=i)[0] for i in range(8)], object)
    split = files._replace(images=images, labels=LABELS[:8], names=files.names[:8])
    budget = _CountingBudget(4 * 64 * 80)  # of 2 x 2 images at an eighth
    monkeypatch.setattr(pipeline, "_BUDGET", budget)
    _eval(split)
    assert budget.taken_pixels == []
    monkeypatch.setattr(pipeline, "_BUDGET", _CountingBudget(4 * 64 * 80 - 4))
    _eval(split)
    assert pipeline._BUDGET.taken_pixels == [512 * 640] * 8


def test_which_images_can_be_decoded(files):
    _spoil(files, 13, 20)
    _spoil(files, 21, contents=_bomb("PNG"))
    Path(files.images[2]).unlink()
    wanted = [n not in (2, 13, 20, 21) for n in range(30)]
    assert pipeline.decodable(files, _config()).tolist() == wanted

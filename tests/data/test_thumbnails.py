"""Small pictures of images, however a split holds them; what is no picture is named."""

from __future__ import annotations

import io

import numpy as np
import pytest

from mmljax.data.thumbnails import thumbnail, webp
from mmljax.errors import UserError
from mmljax.types import Split

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def gradient(height, width):
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    return np.stack([red, green, np.full_like(red, 40)], axis=-1).astype(np.uint8)


def encoded(kind):
    file = io.BytesIO()
    Image.fromarray(gradient(120, 80)).save(file, kind)
    return file.getvalue()


def split_of(images):
    return Split(images, np.zeros(len(images), np.int32), np.array(["front.jpg"]))


def one_object(value):
    images = np.empty(1, object)
    images[0] = value
    return images


@pytest.mark.parametrize("kind", ["path", "jpeg", "png", "array"])
def test_longer_side_is_as_asked_and_the_picture_is_the_same(tmp_path, kind):
    path = tmp_path / "front.jpg"
    path.write_bytes(encoded("JPEG"))
    images = {
        "path": np.array([str(path)]),
        "jpeg": one_object(encoded("JPEG")),
        "png": one_object(encoded("PNG")),
        "array": gradient(120, 80)[None],
    }[kind]
    small = thumbnail(split_of(images), 0, side=30)
    assert (small.mode, small.size) == ("RGB", (20, 30))
    np.testing.assert_allclose(np.asarray(small, float), gradient(30, 20), atol=12)


def test_grey_arrays_and_small_images_stay_what_they_are():
    grey = gradient(12, 12)[None, ..., :1]
    small = thumbnail(split_of(grey), 0, side=30)
    assert small.size == (12, 12)
    np.testing.assert_array_equal(np.asarray(small), np.repeat(grey[0], 3, axis=-1))


def test_a_photograph_is_shown_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    lying = Image.fromarray(gradient(120, 80)).transpose(Image.Transpose.ROTATE_90)
    file = io.BytesIO()
    lying.save(file, "JPEG", exif=exif)
    small = thumbnail(split_of(one_object(file.getvalue())), 0, side=30)
    assert small.size == (20, 30)
    np.testing.assert_allclose(np.asarray(small, float), gradient(30, 20), atol=12)


def test_webp_is_a_smaller_picture_for_less_quality():
    image = Image.fromarray(gradient(64, 64))
    files = [webp(image, side=side, quality=q) for side, q in ((64, 80), (32, 40))]
    assert len(files[1]) < len(files[0])
    assert [Image.open(io.BytesIO(f)).size for f in files] == [(64, 64), (32, 32)]
    assert image.size == (64, 64)


@pytest.mark.parametrize("damage", ["cut", "text", "absent", "large", "huge"])
def test_what_is_no_picture_is_named(tmp_path, monkeypatch, damage):
    path = tmp_path / "front.jpg"
    if damage != "absent":
        path.write_bytes(b"no picture" if damage == "text" else encoded("PNG"))
    if damage == "cut":
        path.write_bytes(encoded("PNG")[: len(encoded("PNG")) // 2])
    if damage in ("large", "huge"):
        pixels = 120 * 80
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels - 1 if damage == "large" else 99)
    with pytest.raises(UserError, match=r"image front\.jpg cannot be shown"):
        thumbnail(split_of(np.array([str(path)])), 0, side=30)

"""Pairs of near copies, by pictures that were cut, darkened, or are others."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mmljax.retrieval import near_copies

SIDE = near_copies.PICTURE


def photograph(seed: int) -> Image.Image:
    """Smooth random grey values of 160 x 160 pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (10, 10)).astype(np.uint8)
    return Image.fromarray(values).resize((160, 160), Image.Resampling.BICUBIC)


def picture(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)


def correlation(one: Image.Image, other: Image.Image) -> float:
    return near_copies.aligned_correlation(picture(one)[None], picture(other)[None]).item()


@pytest.mark.parametrize("cut", [(0, 0, 0, 0), (8, 0, 0, 3), (7, 2, 8, 6), (0, 8, 8, 8)])
def test_a_cut_picture_is_found_either_way(cut):
    left, top, right, bottom = cut
    image = photograph(0)
    window = image.crop((left, top, 160 - right, 160 - bottom))
    darker = window.point(lambda value: 0.8 * value + 10)
    whole, small = picture(image), picture(window)
    plain = np.corrcoef(whole.ravel(), small.ravel())[0, 1]
    assert correlation(image, darker) > max(0.975, plain - 1e-3)
    assert correlation(darker, image) == pytest.approx(correlation(image, darker), abs=1e-6)
    if any(cut):
        assert plain < 0.97


def test_another_picture_and_another_cut_are_none():
    image = photograph(0)
    assert correlation(image, photograph(1)) < 0.6
    assert correlation(image, image.crop((24, 24, 160, 160))) < 0.9
    assert correlation(image, image.filter(ImageFilter.GaussianBlur(2))) > 0.97
    assert correlation(image, Image.new("L", (160, 160), 70)) == pytest.approx(0, abs=1e-3)


def test_a_window_is_a_mean_over_its_cells():
    cells = near_copies._cells(SIDE, 0.05, 0.025)
    np.testing.assert_allclose(cells.sum(axis=1), 1)
    ramp = cells @ (np.arange(SIDE) + 0.5)  # the middle of each cell
    width = 0.925 * SIDE / 12
    np.testing.assert_allclose(ramp, 0.05 * SIDE + width * (np.arange(12) + 0.5), atol=0.1)


def test_near_copies_need_both_embedding_and_picture():
    random = np.random.default_rng(0)
    x = random.normal(size=(12, 16)).astype(np.float32)
    x[5] = x[2] + 0.01
    x[7] = x[2] + 0.02  # another photograph of the thing
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pictures = np.stack([picture(photograph(seed)) for seed in range(12)])
    pictures[5] = 0.5 * pictures[2] + 9  # darker
    pictures[8] = pictures[3]  # the same picture, whose embedding differs
    pairs = near_copies.near_copies(x, pictures, similarity=0.9, correlation=0.97)
    assert pairs.tolist() == [[2, 5]]
    pairs = near_copies.near_copies(x, pictures, similarity=-1, correlation=0.97, k=11)
    assert pairs.tolist() == [[2, 5], [3, 8]]
    pairs = near_copies.near_copies(x, pictures, similarity=1.1, correlation=0.97)
    assert pairs.shape == (0, 2)

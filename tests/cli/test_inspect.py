"""Findings about a small folder with planted faults, the list that readers take, and the page."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from commands import run
from mmljax.config import load_config
from mmljax.data.load import load_dataset
from mmljax.errors import UserError
from mmljax.inference import baseline

ITEMS, VIEWS, SIDE = 40, 6, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Items of one pattern each, with a copy, a wrong label, a tiny image and a broken file."""
    root: Path = tmp_path_factory.mktemp("inspect") / "photos"
    random = np.random.default_rng(0)
    for item in range(ITEMS):
        pattern = random.integers(0, 256, (6, 6, 3))
        side = root / ("train" if item % 2 else "test") / f"item{item:02}"
        side.mkdir(parents=True)
        for view in range(VIEWS):
            noisy = np.clip(pattern + random.normal(0, 70, pattern.shape), 0, 255)
            image = Image.fromarray(noisy.astype(np.uint8)).resize((SIDE, SIDE))
            image.save(side / f"{view}.png")
    one, two = root / "train" / "item01", root / "train" / "item03"
    with Image.open(one / "0.png") as image:
        image.resize((60, 60)).save(root / "test" / "item00" / "copy.jpg", quality=80)
    (one / "5.png").rename(two / "wrong.png")
    Image.new("RGB", (9, 9)).save(two / "tiny.png")
    (two / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(autouse=True)
def pixels_as_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a pretrained network, the means of small squares of a crop."""

    def make(config: Any, dataset: Any, mesh: Any) -> Any:
        def embed(images: Any) -> Any:
            size = config.data.image_size // 6
            squares = images.astype(jnp.float32).reshape(-1, 6, size, 6, size, 3)
            return squares.mean(axis=(2, 4)).reshape(len(images), -1)

        return embed

    monkeypatch.setattr(baseline, "make_pretrained_embed", make)


def inspected(folder: Path, output: Path, *words: str) -> dict[str, dict[str, str]]:
    assert run("inspect", folder, "--output", output, *words) == 0
    with (output / "exclude.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_planted_faults_are_found_and_can_be_left_out(folder, tmp_path, capsys):
    found = inspected(folder, tmp_path / "findings")
    reasons = {name: row["reason"] for name, row in found.items()}
    assert reasons["train/item03/broken.jpg"] == "unreadable"
    assert reasons["train/item03/tiny.png"] == "tiny"
    assert reasons["train/item01/0.png"] == "copy on the other side"
    assert found["train/item01/0.png"]["other"] == "test/item00/copy.jpg"
    assert reasons["train/item03/wrong.png"] == "label"
    assert found["train/item03/wrong.png"]["other"].startswith("train/item01/")
    assert len(found) <= 6
    summary, *written = capsys.readouterr().out.splitlines()[-3:]
    assert summary.startswith("243 images of 40 items: 1 unreadable, 1 tiny, ")
    assert written == [
        f"list  {tmp_path / 'findings/exclude.csv'}",
        f"page  {tmp_path / 'findings/page.html'}",
    ]
    page = (tmp_path / "findings" / "page.html").read_text()
    assert "train/item03/wrong.png" in page
    assert "http" not in page.replace("http-equiv", "")
    overrides = [f"data.directory={folder}", f"data.exclude={tmp_path / 'findings/exclude.csv'}"]
    dataset = load_dataset(load_config("finetune", overrides))
    left = {*dataset.train.names, *dataset.query.names}
    assert not left & found.keys()
    assert len(left) == 243 - len(found)


def test_nothing_in_the_data_changes(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    inspected(folder, tmp_path / "findings")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((), "name a folder of images, or --config CONFIG of other data"),
        (("photos", "--config=quickstart"), "name two data sets; omit one"),
        (("--config=quickstart",), "starts from random weights, whose features say nothing"),
        (("absent",), "absent"),
    ],
)
def test_mistakes(tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        run("inspect", *words, "--output", tmp_path / "findings")
    assert not (tmp_path / "findings").exists()

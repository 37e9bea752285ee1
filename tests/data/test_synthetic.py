"""The generated garments: the same for a seed, hard by pixels, safe to write."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmljax.config import SyntheticConfig
from mmljax.data.readers.in_shop import PARTITION, read_in_shop
from mmljax.data.synthetic import dataset as synthetic
from mmljax.data.synthetic.dataset import synthetic_images, write_synthetic
from mmljax.errors import UserError

CONFIG = SyntheticConfig(train_items=5, test_items=4, views=3, image_size=24, seed=3)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_seed_decides_every_pixel() -> None:
    images = synthetic_images(CONFIG)[0]
    assert images.shape == (9, 3, 24, 24, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, synthetic_images(CONFIG)[0])
    other = synthetic_images(dataclasses.replace(CONFIG, seed=4))[0]
    assert (images != other).mean() > 0.9


def test_items_and_views_differ() -> None:
    images = synthetic_images(CONFIG)[0].reshape(27, -1).astype(int)
    distance = np.abs(images[:, None] - images[None]).mean(-1) + 255 * np.eye(27)
    assert distance.min() > 5


def test_neither_pixels_nor_colours_find_the_item() -> None:
    """An untrained eye is far from the answer, yet above chance: the views do show one item."""
    config = SyntheticConfig(train_items=1, test_items=99, views=4, image_size=32, seed=0)
    images = synthetic_images(config)[0]
    levels = (images // 52).astype(int)  # five per channel
    colors = np.eye(125, dtype=np.float32)[levels @ [25, 5, 1]].mean((2, 3))
    pixels = images.reshape(100, 4, -1) - images.mean((2, 3, 4))[..., None]
    for features, most in ((np.sqrt(colors), 0.35), (pixels, 0.3)):
        unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
        query, gallery = (unit[:, side::2].reshape(200, -1) for side in (0, 1))
        recall = ((query @ gallery.T).argmax(1) // 2 == np.arange(200) // 2).mean()
        assert 0.03 < recall < most


def test_layout_reads_back(tmp_path: Path) -> None:
    import tensorflow as tf

    root = tmp_path / "deep" / "set"
    write_synthetic(root, CONFIG)
    data = read_in_shop(root)
    assert data.gallery is not None
    assert data.classes == 5
    assert np.bincount(data.train.labels).tolist() == [3] * 5
    assert np.bincount(data.query.labels).tolist() == [2] * 4
    assert np.bincount(data.gallery.labels).tolist() == [1] * 4
    items = [{name.split("/")[-2] for name in part.names} for part in (data.train, data.query)]
    assert not items[0] & items[1]
    assert items[1] == {name.split("/")[-2] for name in data.gallery.names}
    image = tf.io.decode_jpeg(tf.io.read_file(data.query.images[2])).numpy()
    drawn = synthetic_images(CONFIG)[0][6, 0]  # the first query of the second test item
    assert image.shape == (24, 24, 3)
    assert np.abs(image.astype(int) - drawn).mean() < 12
    assert [p.name for p in root.parent.iterdir()] == ["set"]  # nothing else is left behind


def test_a_complete_set_is_kept_and_another_config_remakes_it(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set", CONFIG)
    before = contents(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")}
    write_synthetic(tmp_path / "set", CONFIG)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")} == times
    write_synthetic(tmp_path / "set", dataclasses.replace(CONFIG, seed=9))
    assert contents(tmp_path) != before
    write_synthetic(tmp_path / "set", CONFIG)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("lost", ["image", "list", "folder"])
def test_an_incomplete_set_is_remade(tmp_path: Path, lost: str) -> None:
    root = tmp_path / "set"
    write_synthetic(root, CONFIG)
    before = contents(root)
    if lost == "image":
        next(root.rglob("*.jpg")).unlink()
    elif lost == "list":
        (root / PARTITION).unlink()
    else:
        shutil.rmtree(root / "Img")
    write_synthetic(root, CONFIG)
    assert contents(root) == before


def test_an_interrupted_call_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    root = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_put", lambda *_, **__: stop())
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(root, CONFIG)
    assert list(tmp_path.iterdir()) == []
    write_synthetic(root, CONFIG)
    read_in_shop(root)


def test_a_faster_process_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    write = synthetic._write
    marker = []

    def slower(directory: Path, config: SyntheticConfig) -> None:
        write(directory, config)
        write(root, config)  # the other process is done first
        marker.append(root.stat().st_ino)

    monkeypatch.setattr(synthetic, "_write", slower)
    write_synthetic(root, CONFIG)
    assert [root.stat().st_ino] == marker


@pytest.mark.parametrize("marked", [False, True])
def test_a_users_own_directory_is_refused(tmp_path: Path, marked: bool) -> None:
    root = tmp_path / "mine"
    if marked:
        write_synthetic(root, CONFIG)
    root.mkdir(exist_ok=True)
    (root / "holiday.jpg").write_bytes(b"dear")
    before = contents(root)
    with pytest.raises(UserError, match=r"--config.data.directory=.*holds 'holiday.jpg'"):
        write_synthetic(root, dataclasses.replace(CONFIG, seed=8))
    assert contents(root) == before


def test_an_empty_directory_is_used_and_a_link_kept(tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    write_synthetic(tmp_path / "link", CONFIG)
    assert (tmp_path / "link").is_symlink()
    read_in_shop(tmp_path / "disk" / "empty")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        write_synthetic(tmp_path / "file", CONFIG)
    with pytest.raises(UserError, match="cannot be written"):
        write_synthetic(tmp_path / "file" / "below", CONFIG)
    with pytest.raises(UserError, match="--config.data.directory is empty"):
        write_synthetic("", CONFIG)


@pytest.mark.parametrize(
    "change", [{"train_items": 0}, {"test_items": 0}, {"views": 1}, {"image_size": 4}, {"seed": -1}]
)
def test_sizes_that_make_no_set(tmp_path: Path, change: dict[str, int]) -> None:
    (name,) = change
    with pytest.raises(UserError, match=rf"--config.data.synthetic.{name}="):
        write_synthetic(tmp_path / "set", dataclasses.replace(CONFIG, **change))

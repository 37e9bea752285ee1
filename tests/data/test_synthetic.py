"""The generated garments: equal for a seed, hard to tell by pixels, never overwritten."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import quickstart
from mmljax.config import SyntheticConfig, from_mapping
from mmljax.data.load import load_dataset
from mmljax.data.readers.in_shop_list import PARTITION
from mmljax.data.synthetic import dataset as synthetic
from mmljax.data.synthetic.dataset import (
    read_synthetic,
    synthetic_folder,
    synthetic_images,
    write_synthetic,
)
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

    folder = write_synthetic(tmp_path / "deep" / "set", CONFIG)
    data = read_synthetic(tmp_path / "deep" / "set", CONFIG)
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
    assert list((tmp_path / "deep").iterdir()) == [folder.parent]  # nothing else is left behind
    assert list(folder.parent.iterdir()) == [folder]


def test_a_complete_set_is_kept_and_another_config_has_its_own_folder(tmp_path: Path) -> None:
    first = write_synthetic(tmp_path, CONFIG)
    before = contents(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert write_synthetic(tmp_path, CONFIG) == first
    for change in ({"seed": 9}, {"views": 2}, {"image_size": 16}):
        other = write_synthetic(tmp_path, dataclasses.replace(CONFIG, **change))
        assert other.parent == first.parent
        assert not contents(other).items() <= contents(first).items()
    assert len(list(tmp_path.iterdir())) == 4
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == times
    assert contents(tmp_path).items() >= before.items()


def test_reading_never_writes(tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, seed=8)
    write_synthetic(tmp_path / "set", CONFIG)
    before = contents(tmp_path)
    for directory, config in ((tmp_path / "set", other), (tmp_path / "typo", CONFIG)):
        with pytest.raises(UserError) as error:
            read_synthetic(directory, config)
        assert str(error.value).startswith(f"--config.data.directory={str(directory)!r} lacks")
        assert f"mmljax train --config CONFIG --config.data.directory={directory}" in str(
            error.value
        )
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_only_a_caller_that_may_create_writes(tmp_path: Path) -> None:
    mapping = quickstart.get_config()
    mapping.data.directory = str(tmp_path / "set")
    mapping.data.synthetic = dataclasses.asdict(CONFIG)
    config = from_mapping(mapping)
    with pytest.raises(UserError, match="only training writes them: mmljax train --config"):
        load_dataset(config, create=False)
    assert list(tmp_path.iterdir()) == []
    made = load_dataset(config)
    read = load_dataset(config, create=False)
    assert made.train.images.tolist() == read.train.images.tolist()


@pytest.mark.parametrize("lost", ["image", "list", "folder"])
def test_an_incomplete_set_is_made_again(tmp_path: Path, lost: str) -> None:
    folder = write_synthetic(tmp_path, CONFIG)
    before = contents(folder)
    if lost == "image":
        next(folder.rglob("*.jpg")).unlink()
    elif lost == "list":
        (folder / PARTITION).unlink()
    else:
        shutil.rmtree(folder / "Img")
    with pytest.raises(UserError, match="lacks the generated images"):
        read_synthetic(tmp_path, CONFIG)
    write_synthetic(tmp_path, CONFIG)
    assert contents(folder) == before


def test_an_interrupted_call_leaves_no_partial_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_put", stop)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic(tmp_path, CONFIG)
    assert list(tmp_path.iterdir()) == []
    write_synthetic(tmp_path, CONFIG)
    read_synthetic(tmp_path, CONFIG)


def test_the_set_of_a_faster_process_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = synthetic_folder(tmp_path, CONFIG)
    write = synthetic._write
    inodes = []

    def slower(directory: Path, config: SyntheticConfig) -> None:
        write(directory, config)
        write(folder, config)  # the other process finishes first
        inodes.append(folder.stat().st_ino)

    monkeypatch.setattr(synthetic, "_write", slower)
    write_synthetic(tmp_path, CONFIG)
    assert [folder.stat().st_ino] == inodes


def test_what_was_not_generated_is_kept(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"dear")
    folder = write_synthetic(tmp_path, CONFIG)  # beside it
    assert (tmp_path / "holiday.jpg").read_bytes() == b"dear"
    (folder / "holiday.jpg").write_bytes(b"dear")
    (folder / PARTITION).unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds 'holiday.jpg'.*another --config.data.directory"):
        write_synthetic(tmp_path, CONFIG)
    assert contents(tmp_path) == before


def test_a_link_to_a_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write_synthetic(tmp_path / "link", CONFIG)
    assert (tmp_path / "link").is_symlink()
    read_synthetic(tmp_path / "disk", CONFIG)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="cannot be written"):
            write_synthetic(tmp_path / place, CONFIG)
    synthetic_folder(tmp_path, CONFIG).write_text("x")
    with pytest.raises(UserError, match="is a file; name another --config.data.directory"):
        write_synthetic(tmp_path, CONFIG)
    with pytest.raises(UserError, match="--config.data.directory is empty"):
        write_synthetic("", CONFIG)


def test_images_beyond_the_memory_are_refused_at_once(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, image_size=10**6)
    with pytest.raises(UserError, match=r"27 images of 1000000 pixels a side needs .* GiB of mem"):
        write_synthetic(tmp_path, config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [{"train_items": 0}, {"test_items": 0}, {"views": 1}, {"image_size": 4}, {"seed": -1}]
)
def test_sizes_that_make_no_set(tmp_path: Path, change: dict[str, int]) -> None:
    (name,) = change
    with pytest.raises(UserError, match=rf"--config.data.synthetic.{name}="):
        write_synthetic(tmp_path / "set", dataclasses.replace(CONFIG, **change))

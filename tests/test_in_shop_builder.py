"""The TFDS builder over a small folder in In-Shop's layout, and reading what TFDS prepared."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the builder is TFDS's")

import tensorflow as tf
import tensorflow_datasets as tfds

from mmljax.data import in_shop
from mmljax.data.sources import read_in_shop, read_tfds
from mmljax.errors import UserError

ITEMS = {
    "id_00000003": "train",
    "id_00000001": "train",
    "id_00000008": "test",
    "id_00000004": "test",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"the network was asked for: {arguments}")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    rows = []
    for item, split in ITEMS.items():
        for view in range(3):
            name = f"img/WOMEN/Skirts/{item}/01_{view + 1}_front.jpg"
            path = tmp_path / "raw" / "Img" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = random.integers(256, size=(12 + view, 10, 3), dtype=np.uint8)
            path.write_bytes(tf.io.encode_jpeg(image).numpy())
            status = split if split == "train" else ("query", "gallery")[view > 0]
            rows.append(f"{name}   {item} {status}  ")
    path = tmp_path / "raw" / "Eval" / "list_eval_partition.txt"
    path.parent.mkdir()
    header = "image_name item_id evaluation_status"
    path.write_text("\n".join([str(len(rows)), header, *rows, ""]))
    return tmp_path / "raw"


def test_prepared_data_equal_the_folder(folder: Path, tmp_path: Path) -> None:
    in_shop.prepare(folder, tmp_path / "tfds", check_counts=False)
    plain, prepared = read_in_shop(folder), read_tfds("in_shop", tmp_path / "tfds")
    assert prepared.classes == plain.classes == 2
    for name, size in (("train", 6), ("query", 2), ("gallery", 4)):
        a, b = getattr(plain, name), getattr(prepared, name)
        assert len(b.names) == size
        assert b.labels.dtype == np.int32
        order = [b.names.tolist().index(n) for n in a.names]
        np.testing.assert_array_equal(b.labels[order], a.labels)
        for path, row in zip(a.images, order, strict=True):
            assert b.images[row] == Path(path).read_bytes()


def test_prepared_data_are_read_in_one_order_and_kept(folder: Path, tmp_path: Path) -> None:
    in_shop.prepare(folder, tmp_path / "tfds", check_counts=False)
    names = read_tfds("in_shop", tmp_path / "tfds").train.names.tolist()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*.tfrecord*")}
    in_shop.prepare(folder, tmp_path / "tfds", check_counts=False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*.tfrecord*")} == times
    assert read_tfds("in_shop", tmp_path / "tfds").train.names.tolist() == names


def test_features_and_splits(folder: Path, tmp_path: Path) -> None:
    in_shop.prepare(folder, tmp_path, check_counts=False)
    builder = in_shop.InShop(data_dir=str(tmp_path))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 6,
        "query": 2,
        "gallery": 4,
    }
    for row in builder.as_dataset(split="gallery").as_numpy_iterator():
        assert row["image"].shape in {(13, 10, 3), (14, 10, 3)}
        assert row["item_id"].decode() in row["name"].decode()
        assert row["label"] == (row["item_id"] == b"id_00000008")


def test_other_counts_than_the_benchmarks_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="6 images in train, but the benchmark has 25882"):
        in_shop.prepare(folder, tmp_path / "tfds")
    assert sum(in_shop.IMAGES.values()) == 52_712


def test_absent_manual_dir(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manual_dir=.*absent.*Eval/list_eval_partition.txt"):
        in_shop.prepare(tmp_path / "absent", tmp_path / "tfds")


def test_a_broken_folder_is_named(folder: Path, tmp_path: Path) -> None:
    next(folder.rglob("id_00000008/01_1*.jpg")).unlink()
    with pytest.raises(UserError, match=r"image .*id_00000008/01_1_front.jpg .*line 9"):
        in_shop.prepare(folder, tmp_path / "tfds", check_counts=False)


def test_a_set_that_is_not_prepared(tmp_path: Path) -> None:
    for name in ("in_shop", "cars196"):
        with pytest.raises(UserError, match=f"holds no prepared TFDS data set '{name}'; prepare"):
            read_tfds(name, tmp_path)
    with pytest.raises(UserError, match="did you mean 'cars196'"):
        read_tfds("cars", tmp_path)


def store(builder_name: str, directory: Path, features: dict[str, object], label: str) -> None:
    """Grey images whose value is their class: 90, 110 in train, 91, 111 in test."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = in_shop.InShop.code_path
        name = builder_name

        def _info(self) -> tfds.core.DatasetInfo:
            kinds = {
                "image": tfds.features.Image(),
                label: tfds.features.ClassLabel(num_classes=200),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(kinds | features)
            )

        def _split_generators(self, dl_manager: object) -> dict[str, object]:
            return {s: self._generate_examples(n) for n, s in enumerate(("train", "test"))}

        def _generate_examples(self, number: int) -> Iterator[tuple[int, dict[str, object]]]:
            for value in (90 + number, 110 + number):
                row = {"image": np.full((4, 4, 3), value, np.uint8), label: value}
                yield value, row | dict.fromkeys(features, f"{value}.jpg")

    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    Builder(data_dir=str(directory)).download_and_prepare(download_config=offline)


@pytest.mark.parametrize(
    ("name", "features", "label", "train", "test"),
    [
        (
            "caltech_birds2011",
            {"image/filename": tfds.features.Text()},
            "label",
            [90, 91],
            [110, 111],
        ),
        ("cars196", {}, "label", [90, 91], [110, 111]),
        ("stanford_online_products", {}, "class_id", [90, 110], [91, 111]),
    ],
)
def test_tfds_own_sets_are_split_by_class(
    tmp_path: Path,
    name: str,
    features: dict[str, object],
    label: str,
    train: list[int],
    test: list[int],
) -> None:
    store(name, tmp_path, features, label)
    data = read_tfds(name, tmp_path)
    assert (data.classes, data.gallery) == (2, None)
    for split, values in ((data.train, train), (data.query, test)):
        pixels = [tf.io.decode_image(image).numpy()[0, 0, 0] for image in split.images]
        order = np.argsort(pixels)
        assert np.array(pixels)[order].tolist() == values
        assert split.labels[order].tolist() == [0, 1]
        if features:
            assert split.names[order].tolist() == [f"{value}.jpg" for value in values]

"""The TFDS builder over a small folder in In-Shop's layout, and reading what TFDS prepared."""

from __future__ import annotations

import io
import os
import shutil
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow_datasets", reason="the builder is TFDS's")

import tensorflow as tf

from mmljax.cli import main
from mmljax.data.readers import in_shop_builder as in_shop
from mmljax.data.readers.in_shop import read_in_shop
from mmljax.data.readers.in_shop_list import BOX_HEADER, BOXES, HEADER, PARTITION
from mmljax.data.readers.tfds import StoredImages, read_tfds
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
    plain, prepared = read_in_shop(folder), read_tfds("in_shop/low", tmp_path / "tfds")
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
    names = read_tfds("in_shop/low", tmp_path / "tfds").train.names.tolist()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*.tfrecord*")}
    in_shop.prepare(folder, tmp_path / "tfds", check_counts=False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tfds").rglob("*.tfrecord*")} == times
    assert read_tfds("in_shop/low", tmp_path / "tfds").train.names.tolist() == names


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


@pytest.mark.parametrize("variant", ["low", "high", "cropped"])
def test_a_set_that_is_not_prepared(tmp_path: Path, variant: str) -> None:
    with pytest.raises(
        UserError, match=f"'in_shop/{variant}'; .*mmljax prepare FOLDER .* --variant={variant}"
    ):
        read_tfds(f"in_shop/{variant}", tmp_path)


def test_images_of_high_resolution(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "Img" / "img", folder / "Img" / "img_highres")
    for path in (folder / "Img" / "img_highres").rglob("*.jpg"):
        path.write_bytes(tf.io.encode_jpeg(np.full((40, 30, 3), 90, np.uint8)).numpy())
    in_shop.prepare(folder, tmp_path / "tfds", variant="high", check_counts=False)
    high = read_tfds("in_shop/high", tmp_path / "tfds")
    for image in high.train.images:
        assert tf.io.extract_jpeg_shape(image).numpy().tolist() == [40, 30, 3]
    plain = read_in_shop(folder, images="img_highres")
    assert sorted(high.query.names) == sorted(plain.query.names)
    assert all("/Img/img_highres/WOMEN/" in path for path in plain.train.images)
    with pytest.raises(UserError, match="'in_shop/low'"):
        read_tfds("in_shop/low", tmp_path / "tfds")


def write_boxes(folder: Path, *, change: tuple[str, str] = ("", ""), end: str = "\n") -> None:
    names = [line.split()[0] for line in (folder / PARTITION).read_text().splitlines()[2:]]
    rows = [f"{name}   1 1  002 003 {6 + i % 3:03} 011" for i, name in enumerate(names)]
    text = "\n".join([str(len(rows)), BOX_HEADER, *rows, ""]).replace(*change)
    (folder / "Anno").mkdir(exist_ok=True)
    (folder / BOXES).write_bytes(text.replace("\n", end).encode())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_images_cropped_to_their_boxes(folder: Path, tmp_path: Path, end: str) -> None:
    y, x = np.mgrid[:14, :12].astype(np.uint8)
    for path in folder.rglob("*.jpg"):
        image = np.stack([x * 20, y * 16, x * 8 + y * 8], axis=-1)
        path.write_bytes(tf.io.encode_jpeg(image, quality=100).numpy())
    write_boxes(folder, end=end)
    in_shop.prepare(folder, tmp_path / "tfds", variant="cropped", check_counts=False)
    data = read_tfds("in_shop/cropped", tmp_path / "tfds")
    widths = set()
    for image, name in zip(data.train.images, data.train.names, strict=True):
        crop = np.array(Image.open(io.BytesIO(image)))
        whole = np.array(Image.open(folder / "Img" / name))
        widths.add(crop.shape[1])
        assert crop.shape[0] == 8  # rows 3 to 10
        window = whole[3:11, 2 : 2 + crop.shape[1]]
        assert np.abs(crop.astype(int) - window).mean() < 3  # encoded again
        assert np.abs(crop.astype(int) - whole[:8, : crop.shape[1]]).mean() > 10
    assert widths == {4, 5, 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("y_2", "y_3"), "list_bbox_inshop.txt, line 2: must be 'image_name clothes_type"),
        (("12\n", "13\n"), "line 1: states '13' rows, but 12 follow"),
        (("002 003 006 011", "002 003 006 x"), "line 3: .* is not 'image_name clothes_type"),
        (("002 003 006 011", "006 003 006 011"), "line 3: the box of img/.*_front.jpg is empty"),
        (("id_00000001/01_2_front", "id_00000001/01_1_front"), "line 7: .* has a box above too"),
        (("id_00000001/01_2_front", "id_00000001/01_9_front"), "has no box of image .*/01_2_fr"),
        (("002 003 006 011", "022 003 026 011"), "beyond its 10 x 12 pixels; the boxes are those"),
    ],
)
def test_mistakes_in_the_boxes(
    folder: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    write_boxes(folder, change=change)
    with pytest.raises(UserError, match=message):
        in_shop.prepare(folder, tmp_path / "tfds", variant="cropped", check_counts=False)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_place_of_the_output_folder(folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"data_dir='.*{place}' cannot be written") as error:
        in_shop.prepare(folder, tmp_path / place, check_counts=False)
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_absent_boxes_and_unknown_variants(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"list_bbox_inshop.txt cannot be read \(FileNotFoundError"):
        in_shop.prepare(folder, tmp_path / "tfds", variant="cropped", check_counts=False)
    with pytest.raises(UserError, match="variant='crop' is unknown; did you mean 'cropped'"):
        in_shop.prepare(folder, tmp_path / "tfds", variant="crop")


def test_array_record_holds_the_same(folder: Path, tmp_path: Path) -> None:
    options = {"check_counts": False, "file_format": "array_record"}
    in_shop.prepare(folder, tmp_path / "tfds", **options)
    plain, prepared = read_in_shop(folder), read_tfds("in_shop/low", tmp_path / "tfds")
    contents = dict(zip(prepared.gallery.names, prepared.gallery.images, strict=True))
    assert isinstance(prepared.gallery.images, StoredImages)
    assert contents == {
        name: Path(path).read_bytes()
        for name, path in zip(plain.gallery.names, plain.gallery.images, strict=True)
    }


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", str(folder), str(tmp_path / "tfds")]
    assert main(command) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith(f"mmljax: error: {folder}: 6 images in train, but the benchmark has")
    assert "--no-check-counts" in line
    assert main([*command, "--no-check-counts"]) == 0
    assert len(read_tfds("in_shop/low", tmp_path / "tfds").train.labels) == 6


def official_folder(folder: Path) -> Path:
    """The benchmark's numbers of images and items, all of them one tiny image."""
    image = folder / "one.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(tf.io.encode_jpeg(np.full((2, 2, 3), 7, np.uint8)).numpy())
    rows = []
    for split, first in (("train", 0), ("query", 4_000), ("gallery", 4_000)):
        for number in range(in_shop.IMAGES[split]):
            item = f"id_{first + number % in_shop.ITEMS[split]:08}"
            view = number // in_shop.ITEMS[split] + 1
            name = f"img/MEN/Shorts/{item}/{view:02}_{split}.jpg"
            path = folder / "Img" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(image, path)
            rows.append(f"{name} {item} {split}")
    (folder / PARTITION).parent.mkdir()
    (folder / PARTITION).write_text("\n".join([str(len(rows)), HEADER, *rows, ""]))
    return folder


@pytest.mark.slow
def test_a_set_of_the_official_counts_passes(tmp_path: Path) -> None:
    folder = official_folder(tmp_path / "raw")
    in_shop.prepare(folder, tmp_path / "tfds", file_format="array_record")
    data = read_tfds("in_shop/low", tmp_path / "tfds")
    sizes = [len(split.labels) for split in (data.train, data.query, data.gallery)]
    assert sizes == [25_882, 14_218, 12_612]
    assert (data.classes, len(np.unique(data.query.labels))) == (3_997, 3_985)
    text = (folder / PARTITION).read_text().splitlines()
    (folder / PARTITION).write_text("\n".join(["52711", *text[1:-1], ""]))
    with pytest.raises(UserError, match="12611 images in gallery, but the benchmark has 12612"):
        in_shop.prepare(folder, tmp_path / "other")


@pytest.mark.slow
def test_real_photographs(tmp_path: Path) -> None:
    archive = Path(__file__).parents[3] / "shared" / "data" / "grocery" / "grocery_inshop.zip"
    if not archive.exists():
        pytest.skip(f"needs {archive}")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "raw")
    with pytest.raises(UserError, match="2781 images in train, but the benchmark has 25882"):
        in_shop.prepare(tmp_path / "raw", tmp_path / "tfds")
    in_shop.prepare(tmp_path / "raw", tmp_path / "tfds", check_counts=False)
    data = read_tfds("in_shop/low", tmp_path / "tfds")
    sizes = [len(split.labels) for split in (data.train, data.query, data.gallery)]
    assert (sizes, data.classes) == ([2781, 1197, 1443], 41)
    plain = dict(zip(*read_in_shop(tmp_path / "raw").train[::-2], strict=True))
    assert all(Path(plain[n]).read_bytes() == i for i, _, n in zip(*data.train, strict=True))

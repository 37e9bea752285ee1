"""Arrays in files and in memory as data sets, and every mistake in them."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmljax.data.readers.arrays import from_arrays, read_arrays
from mmljax.data.readers.splits import count_small_classes
from mmljax.errors import UserError


def test_small_classes_are_counted() -> None:
    labels = np.array([3, 3, 0, 1, 1, 1, 7], np.int32)
    assert [count_small_classes(labels, size=n) for n in (1, 2, 3, 4)] == [0, 2, 3, 4]


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(256, size=(7, 5, 4), dtype=np.uint8)
    return {
        "images": images,
        "labels": np.array([40, 7, 12, 7, 30, 12, 40]),
        "split": np.array(["query", "train", "train", "train", "query", "train", "query"]),
    } | changes


def write_npz(path: Path, **content: np.ndarray) -> Path:
    np.savez(path / "set.npz", **content)
    return path / "set.npz"


def test_array_file_without_gallery(tmp_path: Path) -> None:
    content = arrays()
    data = read_arrays(write_npz(tmp_path, **content))
    assert (data.classes, data.gallery) == (2, None)
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.query.labels.tolist() == [1, 0, 1]
    assert data.query.names.tolist() == ["images[0]", "images[4]", "images[6]"]
    np.testing.assert_array_equal(data.query.images, content["images"][[0, 4, 6], :, :, None])


@pytest.mark.parametrize("kind", ["words", "bytes", "numbers"])
def test_array_file_with_gallery(tmp_path: Path, kind: str) -> None:
    words = arrays()["split"].astype("U7")
    words[6] = "gallery"
    split = {
        "words": words,
        "bytes": words.astype("S"),
        "numbers": np.array([["train", "query", "gallery"].index(w) for w in words], np.int8),
    }[kind]
    images = np.random.default_rng(1).integers(256, size=(7, 5, 4, 3), dtype=np.uint8)
    data = read_arrays(write_npz(tmp_path, **arrays(images=images, split=split)))
    assert data.gallery is not None
    assert (data.query.labels.tolist(), data.gallery.labels.tolist()) == ([1, 0], [1])
    np.testing.assert_array_equal(data.gallery.images, images[6:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((7, 5, 4))}, "images must be uint8 .* found float64"),
        ({"images": np.zeros((7, 20), np.uint8)}, r"images must be uint8 .*\(7, 20\)"),
        ({"labels": np.arange(6)}, "labels must be 7 integers"),
        ({"labels": np.arange(7.0)}, "labels must be 7 integers.*float64"),
        ({"split": np.array(["train"])}, "split .* must have one entry per label"),
        ({"split": np.array(["train", "query", "val"] * 2 + ["train"])}, "split holds .*'val'"),
        ({"split": np.array([0, 1, 3, 0, 1, 0, 1])}, "split holds .*3"),
        ({"split": np.array(["train"] * 7)}, "marks no image as query"),
        ({"split": np.array(["query"] * 7)}, "marks no image as train"),
        ({"labels": np.array([40, 7, 12, 7, 12, 12, 40])}, "class 12 has images both"),
        ({"split": np.array(["train"] * 7, object)}, "cannot be read as arrays"),
    ],
)
def test_mistakes_in_an_array_file(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_arrays(write_npz(tmp_path, **arrays(**changes)))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_array_file(tmp_path: Path) -> None:
    content = arrays()
    del content["split"]
    np.save(tmp_path / "one.npy", content["images"])
    (tmp_path / "text.npz").write_text("hello")
    whole = write_npz(tmp_path, **arrays()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    write_npz(tmp_path, **content)  # set.npz, without the split
    for name in ("absent.npz", "one.npy", "text.npz", "cut.npz", "set.npz"):
        with pytest.raises(UserError, match="--config.data.directory=.*cannot be read as arrays"):
            read_arrays(tmp_path / name)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_are_refused_with_the_cure(tmp_path: Path, channels: int) -> None:
    images = np.zeros((7, channels, 32, 20), np.uint8)
    with pytest.raises(UserError, match=r"channels first; store images.transpose\(0, 2, 3, 1\)"):
        read_arrays(write_npz(tmp_path, **arrays(images=images)))
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    with pytest.raises(UserError, match="train: images .* seem to have their channels first"):
        from_arrays(images, labels, images, labels)
    assert from_arrays(images[..., :4], labels, images[..., :4], labels).classes == 3


def test_a_header_beyond_the_memory_is_refused_at_once(tmp_path: Path) -> None:
    path = write_npz(tmp_path, **arrays())
    content = dict(np.load(path))
    header = io.BytesIO()
    shape = (10**9, 1000, 1000, 3)  # 3 PB
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"few bytes")
        for name in ("labels", "split"):
            array = io.BytesIO()
            np.save(array, content[name])
            archive.writestr(f"{name}.npy", array.getvalue())
    with pytest.raises(UserError) as error:
        read_arrays(path)
    assert "needs 5587935" in str(error.value)
    assert "GiB is available" in str(error.value)
    assert "\n" not in str(error.value)


def test_arrays_in_memory() -> None:
    images = np.random.default_rng(2).integers(256, size=(9, 6, 6), dtype=np.uint8)
    train, test, gallery = np.array([5, 9, 5]), np.array([9, 2]), np.array([2, 5, 9, 9])
    alone = from_arrays(images[:3], train, images[3:5], test)
    assert (alone.classes, alone.gallery) == (2, None)
    assert alone.query.labels.tolist() == [1, 0]
    both = from_arrays(
        images[:3], train, images[3:5], test, gallery_images=images[5:], gallery_labels=gallery
    )
    assert both.gallery is not None
    assert both.query.labels.tolist() == [2, 0]
    assert both.gallery.labels.tolist() == [0, 1, 2, 2]
    assert both.gallery.images.shape == (4, 6, 6, 1)
    with pytest.raises(UserError, match="both or not at all"):
        from_arrays(images[:3], train, images[3:5], test, gallery_images=images[5:])


def test_arrays_need_no_tensorflow() -> None:
    code = "import sys, mmljax.data.load; print('tensorflow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

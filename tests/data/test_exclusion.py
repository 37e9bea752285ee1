"""Images that an exclusion list names, left out of data sets of every kind of storage."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from data_files import rows, write

import small_runs
from mmljax.config import load_config
from mmljax.data import load
from mmljax.data.exclusion import without_excluded
from mmljax.data.fingerprint import dataset_fingerprint, fingerprint_differences
from mmljax.data.readers.folder import read_folder
from mmljax.errors import UserError
from mmljax.retrieval.records import evaluation_protocol
from mmljax.types import Dataset, Split

NAMES = ["train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg", "train/c/1.jpg"]
NAMES += ["query/d/1.jpg", "query/e/1.jpg", "query/f/1.jpg"]
NAMES += ["gallery/d/2.jpg", "gallery/e/2.jpg", "gallery/e/3.jpg"]


def write_list(folder: Path, *names: str) -> str:
    path = folder / "list.csv"
    path.write_text("reason,name\n" + "".join(f'copy,"{name}"\n' for name in names))
    return str(path)


def overrides(folder: Path, exclude: str) -> list[str]:
    return [f"data.directory={folder}", f"data.exclude={exclude}"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(str(tmp_path / "data"), *NAMES)
    return tmp_path / "data"


def test_listed_images_are_left_out_of_every_split(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An item without images is no class: c becomes 1 in train, e stays 1 in gallery."""
    left_out = ["train/b/1.jpg", "train/b/2.jpg", "query/f/1.jpg", "gallery/e/2.jpg"]
    path = write_list(tmp_path, *left_out, "train/b/2.jpg")
    with caplog.at_level(logging.INFO, logger="mmljax"):
        found = load.load_dataset(load_config("finetune", overrides(folder, path)))
    assert rows(found) == {
        "train": [("train/a/1.jpg", 0), ("train/c/1.jpg", 1)],
        "query": [("query/d/1.jpg", 0), ("query/e/1.jpg", 1)],
        "gallery": [("gallery/d/2.jpg", 0), ("gallery/e/3.jpg", 1)],
    }
    assert found.classes == 2
    assert caplog.messages == [
        f"--config.data.exclude={path!r}: left out 2 of 4 of train, 1 of 3 of query, 1 of 3 of "
        "gallery"
    ]


def test_a_list_without_names_changes_nothing(folder: Path, tmp_path: Path) -> None:
    config = load_config("finetune", overrides(folder, write_list(tmp_path)))
    assert rows(load.load_dataset(config)) == rows(read_folder(folder, test_share=0.5))


@pytest.mark.parametrize(
    ("left_out", "changed", "protocol"),
    [("train/b/1.jpg", "train: 3 images, was 4", False), ("query/f/1.jpg", "query: 2 im", True)],
)
def test_fingerprint_and_protocol(
    folder: Path, tmp_path: Path, left_out: str, changed: str, protocol: bool
) -> None:
    """The protocol is of the test images alone."""
    config = load_config("finetune", overrides(folder, write_list(tmp_path, left_out)))
    whole, part = read_folder(folder, test_share=0.5), load.load_dataset(config)
    lines = fingerprint_differences(dataset_fingerprint(whole), dataset_fingerprint(part))
    assert lines[0].startswith(changed)
    assert {line.partition(":")[0] for line in lines} == {changed.partition(":")[0]}
    differs = (
        evaluation_protocol(whole, config)["data"] != evaluation_protocol(part, config)["data"]
    )
    assert differs == protocol


def test_images_of_arrays_are_named_by_their_number(tmp_path: Path) -> None:
    images = small_runs.write_images(tmp_path / "images.npz", train_items=2, test_items=1)
    listed = [f"images[{n}]" for n in (*range(6), 7, 12)]  # the whole first item
    path = write_list(tmp_path, *listed)
    whole = load_config("finetune", ["data.source=arrays", f"data.directory={images}"])
    config = load_config(
        "finetune", ["data.source=arrays", f"data.directory={images}", f"data.exclude={path}"]
    )
    before, after = load.load_dataset(whole), load.load_dataset(config)
    assert after.train.labels.tolist() == [0] * 5
    assert after.train.names.tolist() == [f"images[{n}]" for n in (6, 8, 9, 10, 11)]
    np.testing.assert_array_equal(after.train.images, before.train.images[[6, 8, 9, 10, 11]])
    np.testing.assert_array_equal(after.query.images, before.query.images[1:])


def test_encoded_images_and_distractors_are_kept(tmp_path: Path) -> None:
    def split(name: str, count: int) -> Split:
        stored = np.empty(count, object)
        stored[:] = [f"{name}{n}".encode() for n in range(count)]
        names = np.array([f"{name}[{n}]" for n in range(count)])
        return Split(stored, np.arange(count, dtype=np.int32), names)

    dataset = Dataset(split("train", 3), split("test", 2), None, 3, split("other", 2))
    found = without_excluded(dataset, write_list(tmp_path, "train[1]"))
    assert found.train.images.tolist() == [b"train0", b"train2"]
    assert found.query.images.tolist() == [b"test0", b"test1"]
    assert found.gallery is None
    assert found.distractors is dataset.distractors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name\ntrain/b/2.jpg\ntrain/b/3.jpeg\n",
            r"line 3: the data set has no image 'train/b/3\.",
        ),
        (
            "name\ntrain/b/2.jpe\n",
            r"\(1 of 1 names are unknown\); did you mean 'train/b/2.jpg'\? Correct",
        ),
        ("name\nxyzzy\n", "remove the row, or name the data set for which the list was made"),
        ('name\n""\n', "line 2: the data set has no image ''"),
        ("path\ntrain/b/2.jpg\n", "line 1: lacks name; the first line must name the columns name"),
        ('name\n"a"b\n', "line 2: .*; correct the row"),
        ("name\n" + "\n".join(NAMES[:4]), r"leaves no image of train \(4 are listed\)"),
        ("name\n" + "\n".join(NAMES[4:7]), r"leaves no image of query \(3 are listed\)"),
        ("name\n\udcff", r"cannot be read \(UnicodeDecodeError\); name a CSV .* the column name"),
        (None, r"cannot be read \(FileNotFoundError\); name a CSV file"),
    ],
)
def test_mistakes_in_a_list(folder: Path, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "list.csv"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"^--config.data.exclude='.*list.csv'.*{message}") as error:
        load.load_dataset(load_config("finetune", overrides(folder, str(path))))
    assert "\n" not in str(error.value)


def test_features_are_left_out_when_they_are_made(tmp_path: Path) -> None:
    config = load_config("heads", overrides(tmp_path, "list.csv"))
    with pytest.raises(UserError, match=r"exclude='list.csv': features are left out when they are"):
        load.load_dataset(config)

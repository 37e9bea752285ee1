"""A changed data set is noticed by what its run stored; a moved one is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmljax.data.fingerprint import (
    dataset_fingerprint,
    fingerprint_contents,
    fingerprint_differences,
    fingerprint_names,
)
from mmljax.data.readers.arrays import from_arrays
from mmljax.data.readers.csv import read_csv
from mmljax.data.readers.folder import read_folder
from mmljax.errors import UserError
from mmljax.types import Dataset

NAMES = [
    *(f"train/{c}/{i}.jpg" for c in "dbc" for i in range(3)),
    *(f"{split}/{c}/{i}.jpg" for split in ("query", "gallery") for c in "xy" for i in range(2)),
]


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def differences(old: Path, new: Path) -> list[str]:
    """What a run of ``old`` says of ``new``; the stored one goes through JSON."""
    stored, now = (dataset_fingerprint(read_folder(root, test_share=0.5)) for root in (old, new))
    return fingerprint_differences(json.loads(json.dumps(stored)), now)


def test_another_folder_and_order_on_disk_is_the_same_data_set(tmp_path: Path) -> None:
    old = write(tmp_path / "old", *NAMES)
    assert differences(old, write(tmp_path / "new" / "deep", *NAMES[::-1])) == []
    assert differences(old, Path(shutil.copytree(old, tmp_path / "copy"))) == []


def pixels(root: Path) -> None:
    (root / "train/b/1.jpg").write_bytes(b"trbin/a/1.jpg")  # of the same size


def first_class(root: Path) -> None:
    write(root, "train/a/0.jpg", "train/a/1.jpg")


def renamed_class(root: Path) -> None:
    (root / "train/d").rename(root / "train/a")


def image(root: Path) -> None:
    write(root, "train/d/9.jpg")


def swapped(root: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        other = root / "train/c" / name
        moved = (root / "train/b" / name).read_bytes()
        (root / "train/b" / name).write_bytes(other.read_bytes())
        other.write_bytes(moved)


def query(root: Path) -> None:
    write(root, "query/y/7.jpg")


def query_class(root: Path) -> None:
    (root / "query/y/1.jpg").rename(root / "query/x/9.jpg")


def size(root: Path) -> None:
    (root / "gallery/x/0.jpg").write_bytes(b"longer than it was before")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (pixels, ["train: contents of sampled images differ"]),
        (first_class, ["train: 11 images, was 9", "train: 4 classes, was 3"]),
        (
            renamed_class,
            [
                "train: names or labels differ",
                "train: the order of the images differs",
                "train: contents of sampled images differ",  # in the order of the names
            ],
        ),
        (image, ["train: 10 images, was 9"]),
        (swapped, ["train: contents of sampled images differ"]),
        (query, ["query: 5 images, was 4"]),
        (
            query_class,
            ["query: names or labels differ", "query: contents of sampled images differ"],
        ),
        (
            size,
            [
                "gallery: sizes of sampled files differ",
                "gallery: contents of sampled images differ",
            ],
        ),
    ],
)
def test_a_change_is_noticed_and_said_in_words(
    tmp_path: Path, change: Callable[[Path], None], expected: list[str]
) -> None:
    old, new = write(tmp_path / "old", *NAMES), write(tmp_path / "new", *NAMES)
    change(new)
    assert differences(old, new) == expected


def csv(folder: Path, *labels: str) -> Dataset:
    """Four images under equal names whatever their labels."""
    splits = ("train", "train", "test", "test")
    names = [f"{i}.jpg" for i in range(4)]
    write(folder, *names)
    rows = [",".join(row) for row in zip(names, labels, splits, strict=True)]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    return read_csv(folder / "list.csv")


@pytest.mark.parametrize("labels", [("b", "a", "x", "y"), ("2", "1", "x", "y")])
def test_labels_that_shift_against_the_proxies_are_noticed(
    tmp_path: Path, labels: tuple[str, ...]
) -> None:
    """The same images form the same classes, but their numbers are exchanged."""
    old, new = csv(tmp_path, "a", "b", "x", "y"), csv(tmp_path, *labels)
    assert fingerprint_names([old.train]) == fingerprint_names([new.train])
    found = fingerprint_differences(dataset_fingerprint(old), dataset_fingerprint(new))
    assert found == ["train: names or labels differ"]


def test_classes_that_are_swapped_are_noticed(tmp_path: Path) -> None:
    old, new = csv(tmp_path, "a", "a", "x", "y"), csv(tmp_path, "a", "b", "x", "x")
    found = fingerprint_differences(dataset_fingerprint(old), dataset_fingerprint(new))
    assert found == ["train: 2 classes, was 1", "query: 1 classes, was 2"]


def test_the_order_of_training_images_counts_and_that_of_queries_does_not(tmp_path: Path) -> None:
    old = csv(tmp_path, "a", "b", "x", "y")
    flipped = [type(old.train)(*(c[::-1] for c in part)) for part in (old.train, old.query)]
    new = old._replace(train=flipped[0], query=flipped[1])
    found = fingerprint_differences(dataset_fingerprint(old), dataset_fingerprint(new))
    assert found == ["train: the order of the images differs"]


def test_arrays_in_memory() -> None:
    images = np.random.default_rng(0).integers(256, size=(8, 5, 4), dtype=np.uint8)
    labels = np.repeat(np.arange(4), 2)
    other = images.copy()
    other[6, 2, 2] ^= 1
    old, same, new = (
        dataset_fingerprint(from_arrays(i[:4], labels[:4], i[4:], labels[4:]))
        for i in (images, images.copy(), other)
    )
    assert fingerprint_differences(old, same) == []
    assert fingerprint_differences(old, new) == ["query: contents of sampled images differ"]
    gallery = dataset_fingerprint(
        from_arrays(
            *(images[:4], labels[:4], images[4:], labels[4:]),
            gallery_images=images[:2],
            gallery_labels=labels[:2],
        )
    )
    assert fingerprint_differences(gallery, gallery) == []
    assert "gallery: none, was 2 images" in fingerprint_differences(gallery, old)
    assert "gallery: 2 images, was none" in fingerprint_differences(old, gallery)


def test_what_is_no_fingerprint_differs() -> None:
    new = {"train": {"images": 4, "classes": 2}}
    assert fingerprint_differences({"train": [1]}, new) == ["train: 4 images, was none"]
    assert fingerprint_differences({"train": {}}, new) == [
        "train: 4 images, was None",
        "train: 2 classes, was None",
    ]


def test_names_count_and_numbers_of_classes_do_not(tmp_path: Path) -> None:
    data = read_folder(write(tmp_path, *NAMES), test_share=0.5)
    shuffled = data.train._replace(
        **{
            field: getattr(data.train, field)[[4, 8, 0, 1, 2, 3, 5, 6, 7]]
            for field in ("images", "labels", "names")
        }
    )
    numbers = np.array([2, 0, 1], np.int32)
    same = shuffled._replace(labels=numbers[shuffled.labels])
    assert fingerprint_names([same]) == fingerprint_names([data.train])
    assert fingerprint_contents(same) == fingerprint_contents(data.train)
    regrouped = same._replace(labels=np.where(same.labels == 2, 1, same.labels))
    renamed = same._replace(names=np.char.add(same.names, "x"))
    for other in (regrouped, renamed):
        assert fingerprint_names([other]) != fingerprint_names([data.train])


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = read_folder(write(tmp_path, *NAMES), test_share=0.5)
    (tmp_path / "train/d/0.jpg").unlink()
    with pytest.raises(UserError, match=r"train/d/0.jpg.*fetch it again"):
        dataset_fingerprint(data)

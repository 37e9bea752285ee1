"""Lists of image files below folders: order, names, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_files import forbid, write

from mmljax.data.readers.image_files import list_images
from mmljax.errors import UserError


def test_images_below_a_folder_in_the_order_of_their_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), "b/2.JPG", "b/a/1.png", "a.gif", "b/.x/1.jpg", ".1.jpg", "b/notes.txt")
    split = list_images([tmp_path], flag="--images")
    assert split.names.tolist() == ["a.gif", "b/2.JPG", "b/a/1.png"]
    assert split.images.tolist() == [str(tmp_path / name) for name in split.names]
    assert split.labels.tolist() == [-1, -1, -1]
    assert not caplog.records


def test_links_that_are_not_followed_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), "a/1.jpg", "elsewhere/2.jpg")
    for link, target in {
        "a/broken.jpg": "absent",
        "a/loop": "loop",
        "a/round": "..",
        "a/folder": "../elsewhere",
        "a/good.jpg": "1.jpg",
        "a/broken.txt": "absent",
    }.items():
        (tmp_path / link).symlink_to(target)
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    split = list_images([tmp_path / "a"], flag="--images")
    assert split.names.tolist() == ["1.jpg", "good.jpg"]
    (record,) = caplog.records
    assert "--images: left out 5 that are broken, circular or folder links" in record.getMessage()
    assert record.getMessage().endswith(
        f"{tmp_path}/a/broken.jpg, {tmp_path}/a/folder, {tmp_path}/a/loop, ..."
    )


def test_pictures_that_are_not_read_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), "1.jpg", "2.webp", "3.avif", "a/4.HEIC", "5.tif", ".6.heic", "7.txt")
    split = list_images([tmp_path], flag="--images")
    assert split.names.tolist() == ["1.jpg", "2.webp", "3.avif"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "--images: left out 2 that are HEIC, TIFF or JPEG XL (convert them to JPEG, WebP or AVIF): "
        f"{tmp_path}/5.tif, {tmp_path}/a/4.HEIC"
    )


def test_a_folder_of_broken_links_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1.jpg").symlink_to("absent")
    with pytest.raises(UserError, match="holds no image"):
        list_images([tmp_path], flag="--images")
    assert len(caplog.records) == 1


def test_a_folder_without_access_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), "a/1.jpg", "b/deep/1.jpg")
    forbid(monkeypatch, tmp_path / "b" / "deep")
    with pytest.raises(UserError, match=r"folder '.*b/deep/?' cannot be listed \(Permission"):
        list_images([tmp_path], flag="--images")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    write(str(tmp_path), os.fsdecode(b"a/\xff.jpg"))
    with pytest.raises(UserError, match=r"--images: the name '.*udcff.jpg' is not valid UTF-8"):
        list_images([tmp_path], flag="--images")


@pytest.mark.parametrize("name", ["absent", "a" * 5000, "a\0b", "broken.jpg"])
def test_a_path_that_cannot_be_reached(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.jpg").symlink_to("absent")
    with pytest.raises(UserError, match="does not exist or cannot be reached") as error:
        list_images([tmp_path / name], flag="--images")
    assert len(str(error.value)) < 400

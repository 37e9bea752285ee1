"""Class folders as data sets, on the local disk and on another file system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import forbid, rows, write
from test_in_shop import ROWS, write_images, write_list

from mmljax.data import paths as files
from mmljax.data.readers.folder import read_folder
from mmljax.data.readers.in_shop import read_in_shop
from mmljax.errors import UserError


def test_train_and_test_folders(root: str) -> None:
    write(root, "train/b/1.jpg", "train/a/2.JPEG", "train/a/1.png", "train/a/notes.txt")
    write(root, "test/d/1.jpg", "test/c/9.gif", "test/c/.hidden.jpg", "readme.txt", "val/a/1.jpg")
    assert rows(read_folder(root, test_share=0.5)) == {
        "train": [("train/a/1.png", 0), ("train/a/2.JPEG", 0), ("train/b/1.jpg", 1)],
        "query": [("test/c/9.gif", 0), ("test/d/1.jpg", 1)],
    }


def test_query_and_gallery_folders_share_their_classes(root: str) -> None:
    write(root, "train/a/1.jpg", "query/d/1.jpg", "query/c/1.jpg", "gallery/b/2.jpg")
    write(root, "gallery/d/2.jpg")
    assert rows(read_folder(root, test_share=0.5)) == {
        "train": [("train/a/1.jpg", 0)],
        "query": [("query/c/1.jpg", 1), ("query/d/1.jpg", 2)],
        "gallery": [("gallery/b/2.jpg", 0), ("gallery/d/2.jpg", 2)],
    }


@pytest.mark.parametrize(("share", "held_out"), [(0.3, 3), (0.5, 5), (0.04, 0), (1.0, 10)])
def test_a_share_of_the_classes_is_held_out(root: str, share: float, held_out: int) -> None:
    write(root, *(f"class {c}/{i}.jpg" for c in range(10) for i in range(2)))
    if not 0 < held_out < 10:
        with pytest.raises(
            UserError, match=rf"test_share={share:g} of its 10 classes is {held_out}"
        ):
            read_folder(root, test_share=share)
        return
    found = rows(read_folder(root, test_share=share))
    classes = {split: {name.split("/")[0] for name, _ in part} for split, part in found.items()}
    assert len(classes["query"]) == held_out
    assert len(classes["train"]) == 10 - held_out
    assert not classes["train"] & classes["query"]
    assert sum(map(len, found.values())) == 20
    assert set(found) == {"train", "query"}


def test_what_is_held_out_depends_on_the_names_alone(tmp_path: Path) -> None:
    names = [f"{c}/1.jpg" for c in "abcdefgh"]
    write(str(tmp_path / "one"), *names)
    write(str(tmp_path / "two"), *names[::-1], "a/2.jpg")
    code = (
        "import sys; from mmljax.data.readers.folder import read_folder\n"
        "print(*read_folder(sys.argv[1], test_share=0.5).query.names)"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / folder)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for folder, seed in (("one", "1"), ("two", "2"))
    ]
    # Of SHA-256, the four lowest: sha256sum of each letter, sorted.
    assert found[0] == ["b/1.jpg", "c/1.jpg", "d/1.jpg", "f/1.jpg"]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no folder; it must hold train/CLASS/ and test/CLASS/"),
        (["a.jpg"], "holds no folder"),
        (["train/a/1.jpg"], "holds train and no test; beside train"),
        (["train/a/1.jpg", "query/b/1.jpg"], "holds train and query; beside train"),
        (["train/a/1.jpg", "test/b/1.jpg", "query/b/1.jpg"], "holds train and test, query; beside"),
        (["train/a/1.jpg", "test/1.jpg"], "test holds no folder; it must hold one per class"),
        (["train/a/1.jpg", "test/b/1.txt"], "test/b holds no image; the names of images end in"),
        (["train/a/1.jpg", "test/a/2.jpg"], "class a is in test and in train"),
        (["a/1.jpg", "b/c/1.jpg"], "b holds no image"),
    ],
)
def test_mistakes_in_a_folder(root: str, names: list[str], message: str) -> None:
    write(root, *names)
    with pytest.raises(UserError, match=message) as error:
        read_folder(root, test_share=0.5)
    assert "\n" not in str(error.value)


def test_absent_folder(tmp_path: Path) -> None:
    for directory in ("", str(tmp_path / "absent")):
        with pytest.raises(UserError, match="--config.data.directory=.*holds no folder"):
            read_folder(directory, test_share=0.5)


def test_in_shop_on_another_file_system(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="reads other file systems")
    write_images(tmp_path, ROWS)
    write_list(tmp_path, ROWS, newline="\r\n")
    local = read_in_shop(tmp_path)
    remote = f"ram://{tmp_path.name}-{os.getpid()}"
    for path in tmp_path.rglob("*.*"):
        write(remote, path.relative_to(tmp_path).as_posix(), contents=path.read_bytes())
    data = read_in_shop(remote)
    assert rows(data) == rows(local)
    assert all(str(path).startswith(f"{remote}/Img/img/") for path in data.train.images)
    with pytest.raises(UserError, match="is not a directory"):
        read_in_shop(remote + "/absent")
    with pytest.raises(UserError, match=r"list_eval_partition.txt cannot be read \(FileNotFound"):
        read_in_shop(remote + "/Img")


def test_a_circular_link_is_neither_file_nor_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    write(str(tmp_path), "a/1.jpg", "2.jpg")
    assert files.list_folder(tmp_path) == (["2.jpg"], ["a"], ["loop"])


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be listed") as raised:
        files.list_folder(tmp_path / name)
    assert len(str(raised.value)) < 400


def make_links(folder: Path, *names: str) -> None:
    """Links that lead to no file: to an absent one, and to themselves."""
    for name in names:
        (folder / name).symlink_to(Path(name).name if "loop" in name else "/absent")


def test_links_to_no_file_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), "train/a/1.jpg", "train/b/1.jpg", "test/c/1.jpg", "test/d/1.jpg")
    expected = rows(read_folder(tmp_path, test_share=0.5))
    assert not caplog.records
    make_links(tmp_path, "train/a/2.jpg", "test/c/loop.png", "train/e", "train/b/3.jpg")
    make_links(tmp_path, "train/a/.hidden.jpg", "train/a/notes.txt")
    (tmp_path / "test/d/4.jpg").symlink_to("1.jpg")  # a link that does lead to an image
    found = rows(read_folder(tmp_path, test_share=0.5))
    assert found.pop("query") == [*expected["query"], ("test/d/4.jpg", 1)]
    assert found["train"] == expected["train"]
    (record,) = caplog.records
    assert record.getMessage().startswith("--config.data.directory=")
    assert "left out 4 that are broken" in record.getMessage()
    assert record.getMessage().endswith("train/e, train/a/2.jpg, train/b/3.jpg, ...")


def test_a_folder_without_access_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), "a/1.jpg", "b/1.jpg", "c/1.jpg")
    forbid(monkeypatch, tmp_path / "b")
    with pytest.raises(UserError, match=r"folder '.*/b' cannot be listed \(Permission denied\)"):
        read_folder(tmp_path, test_share=0.5)


@pytest.mark.parametrize("name", [b"a/\xff.jpg", b"\xff/1.jpg"])
def test_a_name_that_is_not_utf8_is_an_error(tmp_path: Path, name: bytes) -> None:
    write(str(tmp_path), "a/1.jpg", "b/1.jpg", os.fsdecode(name))
    with pytest.raises(UserError, match=r"name '.*\\udcff.*' is not valid UTF-8; rename the file"):
        read_folder(tmp_path, test_share=0.5)

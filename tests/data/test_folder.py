"""Class folders and CSV files as data sets, on the local disk and on another file system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_in_shop import ROWS, write_images, write_list

from mmljax.data import paths as files
from mmljax.data.readers import in_shop as sources
from mmljax.data.readers.folder import read_csv, read_folder
from mmljax.errors import UserError
from mmljax.types import Dataset


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder: on the disk, or in TensorFlow's own file system in memory."""
    if request.param == "local":
        return str(tmp_path)
    pytest.importorskip("tensorflow", reason="reads other file systems")
    return f"ram://{tmp_path.name}-{os.getpid()}"


def write(root: str, *names: str, contents: bytes = b"not decoded here") -> None:
    for name in names:
        path = f"{root}/{name}"
        if files.is_remote(root):
            import tensorflow as tf

            tf.io.gfile.makedirs(os.path.dirname(path))
            with tf.io.gfile.GFile(path, "wb") as file:
                file.write(contents)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(contents)


def rows(data: Dataset) -> dict[str, list[tuple[str, int]]]:
    """Names and labels of each split; every path must lead to the image of that name."""
    found = {}
    for split in ("train", "query", "gallery"):
        part = getattr(data, split)
        if part is not None:
            assert part.labels.dtype == np.int32
            assert all(str(p).endswith(n) for p, n in zip(part.images, part.names, strict=True))
            assert all(files.read(str(path)) == b"not decoded here" for path in part.images)
            found[split] = list(zip(part.names.tolist(), part.labels.tolist(), strict=True))
    return found


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


LIST = """path,label,split,size
a/1.jpg,shoe 2,train,3
b/7.png,"hat, red",query,1
./a/2.jpg,bag,train,2
 c.jpg , coat , gallery ,9
b/8.png,"hat, red",gallery,1
"""


def write_csv(root: str, text: str, *, absent: str = "") -> str:
    images = [n for n in ("a/1.jpg", "a/2.jpg", "b/7.png", "b/8.png", "c.jpg") if n != absent]
    write(root, *images)
    write(root, "list.csv", contents=text.encode())
    return f"{root}/list.csv"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv(root: str, end: str, mark: str) -> None:
    path = write_csv(root, mark + LIST.replace("\n", end))
    assert rows(read_csv(path)) == {
        "train": [("a/1.jpg", 1), ("a/2.jpg", 0)],
        "query": [("b/7.png", 1)],
        "gallery": [("c.jpg", 0), ("b/8.png", 1)],
    }


def test_csv_whose_test_images_search_among_themselves(root: str) -> None:
    text = "split,path,label\ntest,b/7.png,2\ntrain,a/1.jpg,10\ntest,b/8.png,2\n"
    assert rows(read_csv(write_csv(root, text))) == {
        "train": [("a/1.jpg", 0)],
        "query": [("b/7.png", 0), ("b/8.png", 0)],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("path,label,split", "file,label,split"), "line 1: lacks path; the first line must name"),
        ((LIST, ""), "line 1: lacks path, label, split"),
        ((LIST, "path,label,split\n"), "lists no image"),
        (("shoe 2,train", "shoe 2"), "line 2: split '3' is unknown"),
        ((",shoe 2,", ",,"), "line 2: label is empty; fill it in"),
        (("a/1.jpg,shoe 2,train,3", "a/1.jpg"), "line 2: label, split is empty"),
        (("query", "valid"), "line 3: split 'valid' is unknown; known: train, test, query"),
        (("./a/2.jpg", "a/../a/2.jpg"), r"line 4: 'a/\.\./a/2.jpg' leaves the CSV's folder"),
        (("./a/2.jpg", "/a/2.jpg"), "line 4: '/a/2.jpg' leaves the CSV's folder"),
        (("./a/2.jpg", "gs://a/2.jpg"), "line 4: 'gs://a/2.jpg' leaves the CSV's folder"),
        (("./a/2.jpg", "a/1.jpg"), "line 4: a/1.jpg stands in line 2 too"),
        (("./a/2.jpg", "a//./1.jpg"), "line 4: a/1.jpg stands in line 2 too"),
        (("./a/2.jpg", "a/3.jpg"), r"line 4: a/3.jpg is not in .*\(1 of 5 are absent\)"),
        (("coat", "bag"), "line 5: label bag is in gallery and in train"),
        (("query", "test"), "lists images of train, test, gallery; there must be train, and"),
        (("query", "gallery"), "lists images of train, gallery; there must be"),
        (('"hat, red",query', '"hat" red,query'), "line 3: .*expected after"),
    ],
)
def test_mistakes_in_a_csv(root: str, change: tuple[str, str], message: str) -> None:
    path = write_csv(root, LIST.replace(*change, 1))
    with pytest.raises(UserError, match=message) as error:
        read_csv(path)
    assert str(error.value).startswith(f"--config.data.directory='{path}'")
    assert "\n" not in str(error.value)


def test_the_first_absent_image_of_a_csv_is_named(root: str) -> None:
    text = LIST + "d/1.jpg,boot,gallery,1\n"
    with pytest.raises(UserError, match=r"line 3: b/7.png is not in .* \(2 of 6 are absent\)"):
        read_csv(write_csv(root, text, absent="b/7.png"))


def test_a_csv_that_cannot_be_read(root: str) -> None:
    with pytest.raises(UserError, match="list.csv' cannot be read .*name a CSV file in UTF-8"):
        read_csv(f"{root}/list.csv")
    write(root, "list.csv", contents=b"path,label,split\n\xff\n")
    with pytest.raises(UserError, match=r"cannot be read \(UnicodeDecodeError\)"):
        read_csv(f"{root}/list.csv")


def test_a_csv_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(str(tmp_path), LIST)
    monkeypatch.chdir(tmp_path)
    assert read_csv("list.csv").train.images.tolist() == ["a/1.jpg", "a/2.jpg"]


def test_in_shop_on_another_file_system(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="reads other file systems")
    write_images(tmp_path, ROWS)
    write_list(tmp_path, ROWS, newline="\r\n")
    local = sources.read_in_shop(tmp_path)
    remote = f"ram://{tmp_path.name}-{os.getpid()}"
    for path in tmp_path.rglob("*.*"):
        write(remote, path.relative_to(tmp_path).as_posix(), contents=path.read_bytes())
    data = sources.read_in_shop(remote)
    assert rows(data) == rows(local)
    assert all(str(path).startswith(f"{remote}/Img/img/") for path in data.train.images)
    with pytest.raises(UserError, match="is no directory"):
        sources.read_in_shop(remote + "/absent")
    with pytest.raises(UserError, match=r"list_eval_partition.txt cannot be read \(FileNotFound"):
        sources.read_in_shop(remote + "/Img")


def test_other_file_systems_need_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"names with :// are read by TensorFlow .*mmljax\[data\]"):
        read_csv("gs://bucket/list.csv")


def test_a_link_in_a_circle_is_neither_file_nor_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    write(str(tmp_path), "a/1.jpg", "2.jpg")
    assert files.folders_in(tmp_path) == ["a"]
    assert files.files_in(tmp_path) == ["2.jpg"]


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be listed") as raised:
        files.files_in(tmp_path / name)
    assert len(str(raised.value)) < 400

"""CSV files as data sets, on the local disk and on another file system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from data_files import rows, write

from mmljax.data.readers.csv import read_csv
from mmljax.errors import UserError

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
        (("./a/2.jpg", "a/1.jpg"), "line 4: a/1.jpg is listed in line 2 too"),
        (("./a/2.jpg", "a//./1.jpg"), "line 4: a/1.jpg is listed in line 2 too"),
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


def test_other_file_systems_need_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"reading names with :// needs .*mmljax\[data\]"):
        read_csv("gs://bucket/list.csv")

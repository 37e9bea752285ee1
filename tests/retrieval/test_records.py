"""Records of an evaluation: written and read; the protocol and what it depends on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmljax.config import RerankConfig
from mmljax.data.fingerprint import fingerprint_names
from mmljax.errors import UserError
from mmljax.retrieval import records
from mmljax.types import Dataset, Split


def some_records() -> records.Records:
    names, labels = np.array(["a", "b", "c"]), np.array([0, 0, 1])
    values = {"recall@1": np.array([1, 0, np.nan], np.float32)}
    return records.Records({"crop": 28}, 7, names, labels, values)


@pytest.mark.parametrize("kept", [True, False])
def test_records_are_read_as_they_were_written(tmp_path: Path, kept: bool) -> None:
    written = some_records()
    if kept:
        found = records.Neighbors(
            np.array([[1, 0], [0, 1], [1, 0]], np.int32),
            np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], np.float32),
            np.array(["x", "y"]),
            np.array([4, 5]),
        )
        written = written._replace(neighbors=found)
    read = records.read_records(records.write_records(tmp_path, written))
    assert (read.protocol, read.step) == (written.protocol, written.step)
    np.testing.assert_array_equal(read.names, written.names)
    np.testing.assert_array_equal(read.values["recall@1"], written.values["recall@1"])
    assert (read.neighbors is not None) is kept
    for a, b in zip(read.neighbors or (), written.neighbors or (), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = records.write_records(tmp_path, some_records())

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mmljax.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        records.write_records(tmp_path, some_records()._replace(step=8))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert records.read_records(path).step == 7


def test_a_missing_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        records.read_records(tmp_path)
    (tmp_path / records.QUERIES).write_bytes(b"no archive")
    with pytest.raises(UserError, match="not a file of records"):
        records.read_records(tmp_path)
    records.write_records(tmp_path, some_records()._replace(labels=np.arange(2)))
    with pytest.raises(UserError, match="do not fit"):
        records.read_records(tmp_path)


def dataset(labels: list[int], names: list[str], *, brightness: int = 0) -> Dataset:
    images = np.full((len(names), 4, 4, 1), brightness, np.uint8)
    split = Split(images, np.array(labels, np.int32), np.array(names))
    return Dataset(train=split, query=split, gallery=None, classes=2)


def config(
    *, resize_size: int = 30, resampling: str = "bilinear", methods: tuple[str, ...] = ()
) -> Any:
    return SimpleNamespace(
        evaluation=SimpleNamespace(rerank=RerankConfig(methods)),
        data=SimpleNamespace(resize_size=resize_size, image_size=28, resampling=resampling),
        model=SimpleNamespace(compute_dtype="float32"),
    )


def test_the_protocol_depends_on_names_groups_contents_and_sizes_alone() -> None:
    names = ["a", "b", "c"]
    one = records.evaluation_protocol(dataset([0, 0, 1], names), config())
    same = dataset([5, 9, 9], ["c", "b", "a"])  # another order, another numbering
    assert records.evaluation_protocol(same, config()) == one
    others = {
        "data": dataset([0, 1, 1], names),
        "images": dataset([0, 0, 1], names, brightness=1),
    }
    for field, other in others.items():
        protocol = records.evaluation_protocol(other, config())
        assert [key for key in one if protocol[key] != one[key]] == [field]
    renamed = records.evaluation_protocol(dataset([0, 0, 1], ["a", "b", "d"]), config())
    assert renamed["data"] != one["data"]
    more = dataset([0, 0, 1], names)._replace(distractors=dataset([0], ["x"]).query)
    assert set(records.evaluation_protocol(more, config()).items()) - set(one.items()) == {
        ("distractors", fingerprint_names([more.distractors]))
    }
    assert one["decoding"] == "none"
    again = records.evaluation_protocol(
        dataset([0, 0, 1], names), config(methods=("query_expansion", "k_reciprocal"))
    )
    assert set(again.items()) - set(one.items()) == {
        (
            "rerank",
            "query_expansion, k_reciprocal: k 3, alpha 3, k1 20, k2 6, original_weight 0.3, "
            "candidates 100",
        )
    }
    resized = records.evaluation_protocol(dataset([0, 0, 1], names), config(resize_size=31))
    assert [key for key in one if resized[key] != one[key]] == ["resize"]
    filtered = records.evaluation_protocol(dataset([0, 0, 1], names), config(resampling="bicubic"))
    assert [key for key in one if filtered[key] != one[key]] == ["resampling"]


def test_the_protocol_says_how_files_are_decoded() -> None:
    images = np.empty(3, object)
    images[:] = [b"1", b"2", b"3"]
    files = Split(images, np.array([0, 0, 1], np.int32), np.array(["a", "b", "c"]))
    data = Dataset(train=files, query=files, gallery=None, classes=2)
    assert records.evaluation_protocol(data, config())["decoding"] == (
        "upright by EXIF; JPEG at 1/1, 1/2, 1/4, 1/8 with at least 2 times the wanted pixels a side"
    )

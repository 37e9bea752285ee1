"""Data sets that TFDS prepared, in a bucket: their shards are copied to the disk once."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets", reason="the data sets are prepared by TFDS")

import tensorflow as tf
from data_files import write

import fake_tfds
from mmljax.data import copies, paths
from mmljax.data.readers.tfds import read_tfds
from mmljax.errors import UserError

NAME = "caltech_birds2011"
SPLITS = {"train": [*range(4), 100, 101], "test": [2, 3, 102, 103]}


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> str:
    """An address in TensorFlow's own file system in memory, and a cache that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"ram://{tmp_path.name}-{os.getpid()}"


def upload(folder: Path, address: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            write(address, path.relative_to(folder).as_posix(), contents=path.read_bytes())


def read_bytes(split) -> list[bytes]:
    return [split.images[row] for row in range(len(split.labels))]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_shards_in_a_bucket_read_as_local_ones(bucket, tmp_path, file_format) -> None:
    fake_tfds.prepare(NAME, tmp_path / "here", SPLITS, views=2, file_format=file_format)
    upload(tmp_path / "here", bucket)
    data, local = (
        read_tfds(NAME, place, check_counts=False) for place in (bucket, tmp_path / "here")
    )
    for remote, own in ((data.train, local.train), (data.query, local.query)):
        assert read_bytes(remote) == read_bytes(own)
        assert remote.labels.tolist() == own.labels.tolist()
        assert remote.names.tolist() == own.names.tolist()


def test_a_copy_is_completed_and_kept_up_to_date(bucket, tmp_path, caplog, monkeypatch) -> None:
    write(bucket, "set/a/1", "set/a/2", "set/3", "other/4", contents=b"old")
    copied = []
    copy = paths.copy
    monkeypatch.setattr(
        paths, "copy", lambda address, path: (copied.append(address), copy(address, path))
    )
    caplog.set_level(logging.INFO)
    root = copies.local_copy(bucket, "set")
    assert {path.relative_to(root).as_posix() for path in (root / "set").rglob("*")} == {
        *("set/a", "set/a/1", "set/a/2", "set/3")
    }
    assert f"of {bucket} to {root}" in caplog.text
    assert copies.local_copy(f"{bucket}/", "set") == root
    assert len(copied) == 3  # nothing again
    for name in ("a/2", "3"):  # in memory, writing appends to what is there
        tf.io.gfile.remove(f"{bucket}/set/{name}")
    write(bucket, "set/a/2", contents=b"newer")
    (root / "set/a/1").write_bytes(b"cut")  # of the same size: known by its time
    copied.clear()
    copies.local_copy(bucket, "set")
    assert sorted(copied) == [f"{bucket}/set/a/1", f"{bucket}/set/a/2"]
    assert (root / "set/a/1").read_bytes() == b"old"
    assert (root / "set/a/2").read_bytes() == b"newer"
    assert not (root / "set/3").exists()


def test_a_file_that_was_cut_off_is_copied_again(bucket, monkeypatch) -> None:
    write(bucket, "set/1", contents=b"whole")

    def cut_off(address: str, path: Path) -> None:
        path.write_bytes(b"wh")
        raise OSError("connection reset")

    with monkeypatch.context() as broken:
        broken.setattr(paths, "copy", cut_off)
        with pytest.raises(UserError, match=rf"{bucket}/set cannot be copied to .*reset.*access"):
            copies.local_copy(bucket, "set")
    assert (copies.local_copy(bucket, "set") / "set/1").read_bytes() == b"whole"


def test_a_disk_without_room_is_refused_before_anything_is_copied(bucket, monkeypatch) -> None:
    write(bucket, "set/1", contents=bytes(3 * 2**20))
    usage = type(shutil.disk_usage("/"))(4 * 2**20, 2 * 2**20, 2 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="needs 3.0 MiB in .*, which has 2.0 MiB; .*XDG_CACHE_HOME"):
        copies.local_copy(bucket, "set")


def test_a_set_that_is_not_in_the_bucket(bucket) -> None:
    with pytest.raises(UserError, match=f"{bucket}' holds no prepared TFDS data set '{NAME}'"):
        read_tfds(NAME, bucket)

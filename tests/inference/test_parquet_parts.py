"""Tables written in parts: interrupted anywhere and resumed, the file is the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mmljax.errors import UserError
from mmljax.inference.parquet_parts import Parts, metadata

IDENTITY = {"step": 7, "names": "a1"}
TABLES = [pa.table({"x": pa.array([3 * n, 3 * n + 1][: 2 - n % 2], pa.int32())}) for n in range(4)]


def make(path, *, stop_before: int | None = None) -> None:
    with Parts(path, IDENTITY) as parts:
        for number, table in enumerate(TABLES):
            if number == stop_before:
                return
            if not parts.has(number):
                parts.write(number, table)
        parts.join(len(TABLES), facts={"rows": 6})


def test_the_file_holds_the_parts_and_their_metadata(tmp_path):
    path = tmp_path / "folder" / "x.parquet"
    make(path)
    assert parquet.read_table(path)["x"].to_pylist() == [0, 1, 3, 6, 7, 9]
    assert parquet.ParquetFile(path).num_row_groups == 4
    assert metadata(path) == {**IDENTITY, "rows": 6}
    assert list(path.parent.iterdir()) == [path]
    assert Parts(path, IDENTITY).finished


@pytest.mark.parametrize("stop_before", range(4))
def test_interrupted_and_resumed_gives_the_same_bytes(tmp_path, stop_before):
    make(tmp_path / "whole.parquet")
    make(tmp_path / "x.parquet", stop_before=stop_before)
    assert not (tmp_path / "x.parquet").exists()
    (tmp_path / "x.parquet.parts" / "part-000003.parquet.partial").write_bytes(b"torn")
    make(tmp_path / "x.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    assert (tmp_path / "x.parquet").read_bytes() == whole
    assert not (tmp_path / "x.parquet.parts").exists()


@pytest.mark.parametrize("broken", ["unlink", "rmtree", "replace"])
def test_interrupted_at_the_end(tmp_path, monkeypatch, broken):
    make(tmp_path / "whole.parquet")
    path = tmp_path / "x.parquet"
    make(path, stop_before=3)

    def stop(*_, **__):
        raise KeyboardInterrupt

    where = {"unlink": Path, "rmtree": shutil, "replace": os}[broken]
    with Parts(path, IDENTITY) as parts:
        parts.write(3, TABLES[3])
        with monkeypatch.context() as patch:
            patch.setattr(where, broken, stop)
            with pytest.raises(KeyboardInterrupt):
                parts.join(4, facts={"rows": 6})
    assert path.exists() == (broken != "replace")
    with Parts(path, IDENTITY) as parts:
        finished = parts.finished
    if not finished:
        make(path)
    assert path.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_rest_without_manifest_is_not_taken_for_this_table(tmp_path):
    path = tmp_path / "x.parquet"
    make(path, stop_before=3)
    (tmp_path / "x.parquet.parts/manifest.json").unlink()
    with Parts(path, {"step": 8}) as parts:
        assert not parts.has(0)


def test_what_is_made_from_something_else_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    make(path, stop_before=2)
    with pytest.raises(UserError, match=r"x.parquet.parts holds parts.*step: 7 -> 8.*remove it"):
        Parts(path, {**IDENTITY, "step": 8})
    (tmp_path / "x.parquet.parts/manifest.json").write_text("{")
    with pytest.raises(UserError, match="made from something else"):
        Parts(path, IDENTITY)
    make(tmp_path / "y.parquet")
    with pytest.raises(UserError, match="exists already.*step: 7 -> 8"):
        Parts(tmp_path / "y.parquet", {**IDENTITY, "step": 8})
    (tmp_path / "z.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="exists already; name another"):
        Parts(tmp_path / "z.jsonl", IDENTITY)


def test_a_damaged_part_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    make(path, stop_before=3)
    (tmp_path / "x.parquet.parts/part-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-000001.parquet is damaged"):
        make(path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output.*cannot be written"):
        Parts(tmp_path / "file" / "x.parquet", IDENTITY)


def test_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    with Parts(path, IDENTITY) as parts:
        for number, table in enumerate(TABLES):
            parts.write(number, table)
        parts.join_lines(4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"x": x} for x in (0, 1, 3, 6, 7, 9)]


def test_a_table_of_somebody_else(tmp_path):
    parquet.write_table(TABLES[0], tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"no table")
    for name in ("x", "y"):
        with pytest.raises(UserError, match="is not a table of mmljax"):
            metadata(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="does not exist"):
        metadata(tmp_path / "z.parquet")

"""A workdir holds one run at a time, of one config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mmljax.config import Config
from mmljax.errors import UserError
from mmljax.runs.workdir import claimed

DATA = {"train": {"images": 120, "labels": "a"}}


@pytest.fixture
def config() -> Config:
    return Config()


def test_makes_the_workdir_and_writes_the_config(tmp_path: Path, config: Config) -> None:
    workdir = tmp_path / "a/b"
    with claimed(workdir, config, DATA):
        assert json.loads((workdir / "config.json").read_text())["seed"] == config.seed
    with claimed(workdir, config, DATA):  # again, after it ended
        pass


def test_two_runs_at_a_time_are_refused(tmp_path: Path, config: Config) -> None:
    with (
        claimed(tmp_path, config, DATA),
        pytest.raises(UserError, match="in use by another run .process"),
        claimed(tmp_path, config, DATA),
    ):
        pass
    with claimed(tmp_path, config, DATA):
        pass


def test_another_config_is_refused_with_the_keys(tmp_path: Path, config: Config) -> None:
    with claimed(tmp_path, config, DATA):
        pass
    other = dataclasses.replace(config, seed=config.seed + 1)
    with pytest.raises(UserError, match="another config .*seed"), claimed(tmp_path, other, DATA):
        pass


@pytest.mark.parametrize("content", ["", "{", "\xff", "[]", "null", "3", "[" * 100_000])
def test_a_damaged_config_is_an_error(tmp_path: Path, config: Config, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with (
        pytest.raises(UserError, match=r"cannot be used \(config.json: "),
        claimed(tmp_path, config, DATA),
    ):
        pass


def test_a_file_in_its_place_is_an_error(tmp_path: Path, config: Config) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be used"),
        claimed(tmp_path / "file/run", config, DATA),
    ):
        pass


def test_the_lock_is_no_part_of_the_run(tmp_path: Path, config: Config) -> None:
    with claimed(tmp_path, config, DATA):
        assert {path.name for path in tmp_path.iterdir()} == {
            "config.json",
            "data.json",
            "running.lock",
        }


def test_other_data_is_refused_with_what_changed(tmp_path: Path, config: Config) -> None:
    with claimed(tmp_path, config, DATA):
        pass
    other = {"train": {"images": 121, "labels": "b"}}
    message = "other data .train: 121 images, was 120.: restore the"
    with pytest.raises(UserError, match=message), claimed(tmp_path, config, other):
        pass
    with claimed(tmp_path, config, DATA):  # what was stored is kept
        pass

"""The doctor's checks: each passes on a run that can go, and fails on its own injected fault."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from test_loop import make_config

from mmljax.config import CheckpointConfig, Config
from mmljax.data import load
from mmljax.data.readers.arrays import from_arrays
from mmljax.training import checks
from mmljax.training.trainer import Trainer
from mmljax.types import Dataset

KEPT = CheckpointConfig(every="1 steps", keep_last=2, keep_best=1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def dataset(config: Config) -> Dataset:
    return load.load_dataset(config)


# What is installed.


def test_versions_that_are_asked_for() -> None:
    found = checks.check_versions(["jax>=0.9", "numpy>=2", "no-such-package>=3; extra == 'x'"])
    assert found.verdict == "ok"
    assert f"jax {jax.__version__}" in found.text
    assert f"numpy {np.__version__}" in found.text
    assert checks.check_versions().verdict == "ok"


@pytest.mark.parametrize("requirement", ["jax>=99.1", "no-such-package>=0.1"])
def test_what_is_too_old_or_absent_fails(requirement: str) -> None:
    found = checks.check_versions(["numpy>=2.0", requirement])
    assert found.verdict == "FAIL"
    assert found.text.endswith(f"pip install -U '{requirement}'")


# Devices.


def device(platform: str, **memory: int) -> Any:
    return SimpleNamespace(
        platform=platform, device_kind=f"{platform}-x", memory_stats=lambda: memory or None
    )


def test_devices_of_this_machine() -> None:
    found = checks.check_devices()
    assert "8 x cpu" in found.text
    assert found.verdict in ("ok", "warn")


def test_devices_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [device("gpu", bytes_limit=48 * 2**30)] * 4)
    assert checks.check_devices() == ("ok", "devices", "4 x gpu-x, 48.0 GiB each")


def test_no_device_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> None:
        raise RuntimeError("Unable to initialize\nbackend 'cuda'")

    monkeypatch.setattr(jax, "devices", devices)
    found = checks.check_devices()
    assert found.verdict == "FAIL"
    assert "initialize backend 'cuda'" in found.text


def test_an_accelerator_that_jax_overlooks_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "_ACCELERATORS", {str(tmp_path): ("a TPU", "tpu")})
    found = checks.check_devices()
    assert found.verdict == "warn"
    assert "mmljax[tpu]" in found.text
    monkeypatch.setattr(jax, "devices", lambda: [device("tpu")])
    assert checks.check_devices().verdict == "ok"


@pytest.mark.parametrize(
    ("seen", "verdict", "word"),
    [([], "ok", "no accelerator"), (["GPU:0"], "FAIL", "GPU:0"), (None, "warn", "mmljax[data]")],
)
def test_tensorflow(
    seen: list[str] | None, verdict: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "visible_accelerators", lambda: seen)
    found = checks.check_tensorflow()
    assert found.verdict == verdict
    assert word in found.text


# Disk.


def test_a_workdir_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    assert checks.check_workdir(tmp_path / "new" / "run").verdict == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run/checkpoints/5").mkdir(parents=True)
    assert checks.check_workdir(tmp_path / "run").verdict == "ok"
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["5"]


def test_a_file_in_the_place_of_the_workdir_fails(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    for workdir in (tmp_path / "run", tmp_path / "run" / "below"):
        found = checks.check_workdir(workdir)
        assert found.verdict == "FAIL"
        assert str(workdir / "checkpoints") in found.text
        assert "--workdir" in found.text
    assert (tmp_path / "run").read_text() == ""


def test_a_disk_that_takes_no_byte_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks.os, "fsync", fsync)
    found = checks.check_workdir(tmp_path / "run")
    assert found.verdict == "FAIL"
    assert "No space left" in found.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "verdict"), [(15_999, "FAIL"), (16_000, "warn"), (32_000, "warn"), (32_001, "ok")]
)
def test_disk_against_what_checkpoints_take(
    free: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    state: Any = {"a": np.zeros(500, np.float32), "b": [np.zeros(250, np.float64)]}
    found = checks.check_disk(tmp_path / "new/run", state, kept=KEPT)  # (2 + 1 + 1) x 4,000
    assert found.verdict == verdict
    assert ("keep_last" in found.text) == (verdict == "FAIL")
    assert asked == [tmp_path]


# The run.


def test_data_is_counted(config: Config) -> None:
    found, dataset = checks.check_data(config)
    assert found == ("ok", "data", "train 72 images of 12 items, query 24, gallery 24")
    assert dataset is not None


def test_missing_data_fails(tmp_path: Path) -> None:
    config = make_config(tmp_path, data__directory=str(tmp_path / "none.npz"))
    found, dataset = checks.check_data(config)
    assert found.verdict == "FAIL"
    assert "none.npz" in found.text
    assert dataset is None


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("model__backbone", "resnet19", "resnet18"),
        ("model__pretrained", "none.safetensors", "none.safetensors"),
    ],
)
def test_a_config_that_cannot_be_used_fails(
    key: str, value: str, word: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path, **{key: value})
    found, trainer = checks.check_config(config, load.load_dataset(config))
    assert found.verdict == "FAIL"
    assert word in found.text
    assert trainer is None


def with_rates(workdir: Path, *rows: tuple[float, float]) -> Path:
    workdir.mkdir(parents=True)
    lines = [
        {"step": i, "kind": "rates", "images_per_second": speed, "input_wait": wait}
        for i, (speed, wait) in enumerate(rows, 1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def test_rate_of_the_steps_without_the_waits_is_read_from_a_run(tmp_path: Path) -> None:
    assert checks.logged_step_rate(tmp_path / "none") is None
    assert checks.logged_step_rate(with_rates(tmp_path / "first", (5, 0.1))) is None
    run = with_rates(tmp_path / "run", (5, 0.1), (100, 0.5), (90, 0.1), (300, 0.0))
    assert checks.logged_step_rate(run) == pytest.approx(200)


@pytest.mark.parametrize(("taken", "verdict"), [(1e-3, "ok"), (1e9, "warn")])
def test_input_against_the_steps_of_a_run(
    taken: float, verdict: str, config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    run = with_rates(tmp_path / "run", (1, 0), (taken, 0.0))
    trainer: Any = None  # is not asked
    found = checks.check_speed(config, dataset, trainer, run, seconds=0.05)
    assert found.verdict == verdict
    assert str(run / "metrics.jsonl") in found.text
    assert ("--config.data.threads" in found.text) == (verdict == "warn")


def test_input_rate_is_that_of_the_input(
    config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(*arguments: Any) -> Any:
        for step in range(1000):
            if step > 4:  # a few made ahead, then 10 ms each
                time.sleep(0.01)
            yield np.zeros(3)

    monkeypatch.setattr(load, "train_batches", batches)
    rate = checks.input_rate(config, dataset, seconds=0.2)
    assert 0.5 * 1600 < rate < 1600


def test_data_that_cannot_fill_a_batch_fails(config: Config) -> None:
    images = np.zeros((4, 12, 12), np.uint8)
    dataset = from_arrays(images, np.arange(4) // 2, images, np.arange(4) // 2)
    trainer: Any = None
    found = checks.check_speed(config, dataset, trainer, Path("none"), seconds=0.05)
    assert found.verdict == "FAIL"
    assert "--config.data" in found.text


def test_a_step_without_room_fails(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    def step(*arguments: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    trainer: Any = SimpleNamespace(state=None, step=step)
    found = checks.check_speed(config, dataset, trainer, tmp_path, seconds=0.05)
    assert found.verdict == "FAIL"
    assert "--config.data.batch_size" in found.text


def test_a_config_that_can_be_used(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    found, trainer = checks.check_config(config, dataset)
    assert found.verdict == "ok"
    assert isinstance(trainer, Trainer)
    assert checks.checkpoint_bytes(trainer.state) > 12 * 16 * 4 * 3  # proxies, their moments
    assert checks.check_disk(tmp_path, trainer.state, kept=config.checkpoint).verdict == "ok"

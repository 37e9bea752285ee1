"""Scalars arrive in each service, and a resumed run continues the same run there."""

from __future__ import annotations

import dataclasses
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmljax.config import LogConfig
from mmljax.errors import UserError
from mmljax.runs.loggers import MLflow, TensorBoard, WandB, make_loggers

CONFIG = {"seed": 3, "data": {"batch_size": 8}}
NOTHING = LogConfig(
    every=1, input_wait_warning=0.2, tensorboard=False, wandb=False, mlflow=False, plot=False
)


def events(folder: Path) -> list[Any]:
    """Events by the TFRecord framing: length, its checksum, message, its checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs tensorboardX")
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    logger = TensorBoard(tmp_path, start_step=4)
    logger.scalars(5, {"loss/pair": 0.5, "evaluation/recall@1": 0.75})
    logger.close()
    found = events(tmp_path / "tensorboard")
    scalars = {(v.tag, e.step): v.simple_value for e in found for v in e.summary.value}
    assert scalars == {("loss/pair", 5): 0.5, ("evaluation/recall_1", 5): 0.75}
    # TensorBoard hides what an interrupted session wrote from this step on.
    assert [e.step for e in found if e.session_log.status == e.session_log.START] == [5]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    (tmp_path / "tensorboard").write_text("")
    log = dataclasses.replace(NOTHING, tensorboard=True)
    with pytest.raises(UserError, match=r"/tensorboard cannot be written .*move it away"):
        make_loggers(log, tmp_path, config=CONFIG, start_step=0)


def test_without_tensorboardx_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = dataclasses.replace(NOTHING, tensorboard=True)
    assert make_loggers(log, tmp_path, config=CONFIG, start_step=0) == []
    (record,) = caplog.records
    assert "pip install 'mmljax[plot]'" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_one_that_is_asked_for_and_absent_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    log = dataclasses.replace(NOTHING, **{name: True})
    with pytest.raises(UserError, match=rf"log.{name}=True needs .*'mmljax\[{name}\]'"):
        make_loggers(log, tmp_path, config=CONFIG, start_step=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install mmljax[mlflow]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    (tmp_path / "run").mkdir()
    for start in (0, 1):
        logger = MLflow(tmp_path / "run", config=CONFIG)
        logger.scalars(start + 1, {"loss/pair": 0.5 + start, "evaluation/recall@1": 0.75})
        logger.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mmljax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "data.batch_size": "8"}
    history = client.get_metric_history(run.info.run_id, "loss/pair")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 1.5)]
    assert run.data.metrics["evaluation/recall_1"] == 0.75


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install mmljax[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run").mkdir()
    names = []
    for start in (0, 1):
        logger = WandB(tmp_path / "run", config=CONFIG)
        names.append(wandb.run.id)
        assert wandb.run.config["data"]["batch_size"] == 8
        logger.scalars(start + 1, {"loss/pair": 0.5 + start})
        logger.close()
    assert names[0] == names[1]
    files = list((tmp_path / "run").rglob("*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 60  # another process writes them
    while not all(b"loss/pair" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)

"""The scores of a pretrained backbone before any training, alone and beside those of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_interpolate import plant, same

import small_runs
from commands import run
from mmljax.config import load_config, to_dict
from mmljax.errors import UserError
from mmljax.inference.baseline import score_pretrained
from mmljax.inference.embedder import load_embedder
from mmljax.inference.interpolate import curve, pretrained_weights
from mmljax.retrieval import records
from mmljax.runs.reader import load_run_data
from mmljax.runs.writer import read_metrics, recall_table
from mmljax.training.loop import train


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pretrained backbone, and a config that fine-tunes it for two steps."""
    folder = tmp_path_factory.mktemp("baseline")
    return plant(folder, first=same, last=same)


def short(planted: Any, **changes: Any) -> Path:
    """The path of a config that trains the backbone for two steps."""
    folder = planted.folder.parent
    weights = str(folder / "weights.safetensors")
    settings = {"duration": "2 steps", "optimizer__warmup": "1 steps", "model__pretrained": weights}
    return small_runs.write_config(
        folder / "short.py", folder / "images.npz", **(settings | changes)
    )


def test_the_verb_scores_the_features_without_a_head(
    planted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that ``interpolate`` scores, which its own test compares with NumPy."""
    config = short(planted)
    assert run("evaluate", "--config", config, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    trained = load_embedder(planted.folder)
    _, dataset = load_run_data(planted.folder)
    _, features = curve(trained, pretrained_weights(trained), dataset, [])
    assert 0.3 < features["recall@1"] < 1
    for key in ("recall@1", "recall@2", "map@r", "queries"):
        assert found["scores"][key] == pytest.approx(features[key], abs=1e-6), key
    assert found["protocol"] == records.evaluation_protocol(dataset, trained.config)
    assert found["config"] == to_dict(load_config(str(config)))

    assert run("evaluate", "--config", config) == 0
    assert capsys.readouterr().out == recall_table({"pretrained": found["scores"]}) + "\n"


def test_a_run_has_them_beside_its_own_scores(planted: Any, tmp_path: Path, capsys: Any) -> None:
    config = load_config(str(short(planted)))
    alone = score_pretrained(config)["scores"]
    results = train(config, tmp_path)
    shown = capsys.readouterr()
    assert results["pretrained"]["recall@1"] == alone["recall@1"] != results["scores"]["recall@1"]
    (row,) = read_metrics(tmp_path, kind="pretrained")
    assert row == results["pretrained"]
    assert [row["step"] for row in read_metrics(tmp_path, kind="evaluation")] == [0, 2]
    assert shown.out.splitlines()[0].split() == [
        "%",
        "trained",
        "untrained",
        "pretrained",
        "chance",
    ]
    assert "step 0/2  pretrained features:  Recall@1" in shown.err

    assert train(config, tmp_path)["pretrained"] == results["pretrained"]  # the run is finished


@pytest.mark.parametrize(
    "changes", [{"evaluation__untrained": False}, {"model__pretrained": ""}], ids=str
)
def test_a_run_without_them_has_none(planted: Any, changes: Any, tmp_path: Path) -> None:
    config = load_config(str(short(planted, **changes)))
    assert train(config, tmp_path)["pretrained"] is None


def test_random_weights_are_refused(planted: Any) -> None:
    config = short(planted, model__pretrained="")
    with pytest.raises(UserError, match=r"pretrained='' starts from random weights.*name pretr"):
        run("evaluate", "--config", config)

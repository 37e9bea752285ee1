"""A whole run in one process: what it writes, and that an interruption changes nothing."""

from __future__ import annotations

import itertools
import logging
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import small_runs
from mmljax.config import Config, default_config, from_mapping, load_config
from mmljax.data import load
from mmljax.data.composition import RULES
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.models.backbones import BACKBONES
from mmljax.runs.writer import read_metrics
from mmljax.training import loop as train
from mmljax.training.checks import check_config
from mmljax.training.trainer import make_trainer
from mmljax.types import Split

pytestmark = pytest.mark.filterwarnings(
    # orbax reads checkpoints without shardings in small_runs.final_state, on purpose
    "ignore:Sharding info not provided when restoring:UserWarning"
)


def make_config(tmp_path: Path, **changes: Any) -> Config:
    images = tmp_path / "images.npz"
    if not images.exists():
        small_runs.write_images(images)
    path = small_runs.write_config(tmp_path / "small.py", images, **changes)
    return load_config(str(path))


def test_run_learns_and_writes_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, log__plot=True, log__profile="steps 3:5", duration="40 steps")
    result = train.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "Recall@1" in out
    for name in ("checkpoints", "results.json", "contributions.png"):
        assert (tmp_path / "run" / name).exists()
        assert str(tmp_path / "run" / name) in out
    assert len(list((tmp_path / "run/profile/plugins/profile").glob("*/*.xplane.pb"))) == 1
    assert result["scores"]["recall@1"] > result["untrained"]["recall@1"]
    assert result["config"]["data"]["batch_size"] == 16
    rows = [row for row in small_runs.metrics(tmp_path / "run") if '"train"' in row]
    assert len(rows) == 40
    assert all(f'"{key}/pair"' in rows[0] for key in ("loss", "weight", "share_embeddings"))
    rates = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "rates"]
    assert len(rates) == 40
    assert all(0 <= row["input_wait"] <= 1 for row in rates)
    compilations = [row["compilations"] for row in rates]
    assert compilations == sorted(compilations)
    assert compilations[0] >= 1  # the step; the augmentation may be known from another test
    assert "compiled" not in caplog.text  # saves and evaluations compile, steps do not again


FINE_TUNING: dict[str, Any] = {
    "model__drop_path": 0.4,
    "model__pooling": "gem",
    "model__batch_norm": "frozen",
    "data__micro_batches": 2,
    "data__randaugment": (2, 9.0),
    "data__color_jitter": (0.4, 0.4, 0.4, 0.1),
    "data__erase": 0.5,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"memory__size": 128, "objectives__pair__memory": True},
        {
            "data__composition__rule": "either",
            "data__composition__share": 0.6,
            "data__composition__every": "4 steps",
        },
        pytest.param(
            {
                "data__composition__rule": "class",
                "data__composition__share": 0.6,
                "data__composition__every": "4 steps",
                "data__composition__images": 3,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "centers": 2,
                "objectives__proxy__loss": "subcenter_arcface",
                "objectives__proxy__sampled_proxies": 6,
                "objectives__proxy__margin_rise": "75%",
                "objectives__proxy__least_margin": 0.1,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "optimizer__ema_decay": 0.9,
                "optimizer__layer_decay": 0.8,
                "optimizer__proxies_dtype": "bfloat16",
                "proxies_init": "class_means",
                "model__matryoshka": (4, 16),
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(FINE_TUNING, marks=pytest.mark.slow),
        pytest.param(
            {
                "model__backbone": small_runs.TINY_VIT,
                "model__width": 64,
                "model__pooling": "token",
                "model__lora__rank": 2,
                "model__patch_keep": 0.5,
                "optimizer__ema_decay": 0.9,
                "optimizer__layer_decay": 0.8,
                "optimizer__freeze_backbone": "3 steps",
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "model__backbone": "efficientnet_lite0",
                "model__batch_norm": "frozen",
                "model__remat": "full",
                "optimizer__ema_decay": 0.9,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "memory",
        "composition",
        "classes",
        "softmax",
        "average",
        "augmentation",
        "lora",
        "efficientnet",
    ],
)
def test_interrupted_equals_uninterrupted(
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Broken off between two checkpoints; state, metrics and scores are equal bit for bit."""
    caplog.set_level(logging.INFO, "mmljax")
    small_runs.add_tiny_vit(monkeypatch)
    config = make_config(tmp_path, **changes)
    train.train(config, tmp_path / "whole")

    parts = tmp_path / "parts"
    small_runs.train_broken_off(config, parts, steps=12, monkeypatch=monkeypatch)
    original, seen = load.train_batches, []

    def recorded(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[-1])
        return original(*arguments, **options)

    monkeypatch.setattr(load, "train_batches", recorded)
    train.train(config, parts)
    assert [*itertools.chain(*seen)] == [*range(10, 20)]  # on from the checkpoint
    means = 2 if config.proxies_init == "class_means" else 0  # once per run, not on resume
    assert caplog.text.count("proxies start as class means of 72 training images") == means

    whole = small_runs.assert_same_run(tmp_path / "whole", parts)
    assert int(whole["objective.step"]) == 20
    assert any(name.startswith("average.") for name in whole) == (config.optimizer.ema_decay > 0)
    for table in ("classes", "images"):
        used = table in RULES[config.data.composition.rule]
        assert (f"neighbors.{table}" in whole) == used


def test_margins_follow_the_sizes_of_the_training_classes(tmp_path: Path) -> None:
    proxy = {"loss": "cosface", "least_margin": 0.05, "margin_rise": "50%"}
    changes: Any = {f"objectives__proxy__{key}": value for key, value in proxy.items()}
    config = make_config(tmp_path, **changes)
    dataset = load.load_dataset(config)
    kept = np.delete(np.arange(72), np.flatnonzero(dataset.train.labels == 7)[:5])
    dataset = dataset._replace(train=Split(*(field[kept] for field in dataset.train)))
    _, trainer = check_config(config, dataset)
    assert trainer is not None
    (bound,) = (o for o in trainer.objective.objectives if o.name == "proxy")
    assert bound.margin is not None
    assert bound.margin.rise == 10
    expected = np.where(np.arange(12) == 7, 0.25, 0.05)  # one image, and six
    np.testing.assert_allclose(bound.margin.value, expected)


def test_evaluation_uses_the_average(tmp_path: Path) -> None:
    """Scores are those of planted weights in the average, not those of the trained weights."""
    config, mesh = make_config(tmp_path, optimizer__ema_decay=0.9), make_mesh()
    dataset = load.load_dataset(config)
    trainer = make_trainer(config, classes=12, channels=1, train_examples=72, mesh=mesh)
    score = train.make_score(config, dataset, trainer, mesh)
    state = trainer.state
    start = score(state)
    planted = jax.tree.map(lambda x: np.roll(np.asarray(x), 1), state.average)
    other = score(state._replace(average=planted))
    expected = score(
        state._replace(
            params=state.params | {"network": planted["network"]},
            model_state=planted["model_state"],
            average=(),
        )
    )
    np.testing.assert_array_equal(other.similarity, expected.similarity)
    assert not np.allclose(other.similarity, start.similarity, atol=1e-3)
    nothing = jax.tree.map(np.zeros_like, state.params["network"])
    trained = score(state._replace(params=state.params | {"network": nothing}))
    np.testing.assert_array_equal(trained.similarity, start.similarity)


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint__keep_last=2, evaluation__every="5 steps")
    train.train(config, tmp_path / "run")
    rows = [eval(row.replace("null", "None")) for row in small_runs.metrics(tmp_path / "run")]
    recall = {row["step"]: row["recall@1"] for row in rows if row["kind"] == "evaluation"}
    steps = {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()}
    assert {15, 20} <= steps
    best = max(v for k, v in recall.items() if k)
    assert any(recall[step] == best for step in steps)
    assert len(steps) <= 3


def test_another_config_in_the_same_workdir_is_refused(tmp_path: Path) -> None:
    train.train(make_config(tmp_path, duration="2 steps"), tmp_path / "run")
    before = small_runs.metrics(tmp_path / "run")
    with pytest.raises(UserError, match=r"config.seed: 0 -> 1.*choose another --workdir"):
        train.train(make_config(tmp_path, duration="2 steps", seed=1), tmp_path / "run")
    assert small_runs.metrics(tmp_path / "run") == before


def test_changed_data_is_refused_when_a_run_resumes(tmp_path: Path) -> None:
    config = make_config(tmp_path, duration="2 steps")
    train.train(config, tmp_path / "run")
    dataset = load.load_dataset(config)
    pixels = dataset.train.images.copy()
    pixels[0, 0, 0] ^= 255
    changed = dataset._replace(train=dataset.train._replace(images=pixels))
    with pytest.raises(UserError, match="other data .train: contents of sampled images differ"):
        train.train(config, tmp_path / "run", dataset=changed)


def test_replaced_images_are_counted_in_metrics_and_results(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow", reason="image files are read by TensorFlow")
    changes = {"data__corrupt": "skip", "duration": "6 steps", "evaluation__untrained": False}
    config = make_config(tmp_path, **changes)
    dataset = load.load_dataset(config)

    def encoded(split: Split) -> Split:
        files = np.empty(len(split.labels), object)
        files[:] = [tf.io.encode_png(image).numpy() for image in split.images]
        return split._replace(images=files)

    splits = (dataset.train, dataset.query, dataset.gallery)
    train_split, query, gallery = (encoded(split) for split in splits if split is not None)
    train_split.images[4] = b"no image"
    dataset = dataset._replace(train=train_split, query=query, gallery=gallery)
    results = train.train(config, tmp_path / "run", dataset=dataset)
    rows = read_metrics(tmp_path / "run", kind="train")
    counts = [row["skipped_images"] for row in rows]
    assert len(counts) == 6
    assert set(counts) <= {0, 1}
    assert results["skipped_images"] == sum(counts) > 0


def test_recall_need_not_be_at_1(tmp_path: Path) -> None:
    """The best checkpoint is chosen by a score that the run has."""
    config = make_config(tmp_path, evaluation__recall_at=(2, 4), duration="2 steps")
    result = train.train(config, tmp_path / "run")
    assert {"recall@2", "recall@4"} <= result["scores"].keys()
    assert "recall@1" not in result["scores"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation__recall_at": (1, 1000)}, "asks for Recall@1000, but a query has only"),
        ({"data__resize_size": 11}, "--config.data.resize_size=11 is below"),
        ({"optimizer__warmup": "30 steps"}, "is 30 steps, beyond the run's 20"),
        (
            {"objectives__proxy__loss": "cosface", "objectives__proxy__margin_rise": "30 steps"},
            "proxy.margin_rise='30 steps' is 30 steps, beyond the run's 20",
        ),
        ({"data__batch_size": 18, "data__images_per_class": 4}, "batch_size=18 is no"),
    ],
)
def test_what_must_fail_is_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train.train(make_config(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_of_no_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--config.duration='0 steps'"):
        train.train(make_config(tmp_path, duration="0 steps"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, optimizer__head__learning_rate=1e38, optimizer__warmup="0 steps")
    with pytest.raises(UserError, match=r"objective \w+ not finite .* at step \d+.*learning_rate"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        pytest.param("inshop", marks=pytest.mark.slow),
        pytest.param("omniglot", marks=pytest.mark.slow),
    ],
)
def test_committed_config_takes_two_steps(name: str, tmp_path: Path) -> None:
    """Every config runs on small arrays, with a narrow network for the sake of the test's time."""
    mapping = default_config(name)
    assert mapping.model.backbone in BACKBONES
    mapping.model.backbone, mapping.model.width = "small", 8
    data = mapping.data
    data.source, data.directory = "arrays", str(small_runs.write_images(tmp_path / "images.npz"))
    data.image_size = data.resize_size = small_runs.PIXELS
    data.batch_size, data.eval_batch_size = 8, 16
    mapping.duration = "2 steps"
    mapping.evaluation.recall_at = (1,)
    mapping.evaluation.untrained = False
    mapping.optimizer.warmup = mapping.optimizer.freeze_backbone = "1 steps"
    mapping.log.tensorboard = mapping.log.plot = False
    result = train.train(from_mapping(mapping), tmp_path / "run")
    assert 0 <= result["scores"]["recall@1"] <= 1


def test_a_disk_without_room_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"disk: 0.0 MiB free .* make room"):
            train.train(config, tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()

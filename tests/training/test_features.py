"""Heads on cached features: the writer, the data source, training, sweeps, and loading the head."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import small_runs
from mmljax.cli.command import main
from mmljax.config import Config, RerankConfig, load_config
from mmljax.data import load
from mmljax.data.array_pipeline import augment
from mmljax.errors import UserError
from mmljax.inference import features as writing
from mmljax.inference.embed import embed_batches
from mmljax.inference.embedder import load_embedder
from mmljax.mesh import make_mesh
from mmljax.retrieval.records import read_records
from mmljax.training.loop import train
from mmljax.training.state import make_model
from mmljax.training.sweep import Run, sweep, sweep_table
from mmljax.types import Split

pytestmark = pytest.mark.filterwarnings(
    # orbax reads checkpoints without shardings in small_runs.final_state, on purpose
    "ignore:Sharding info not provided when restoring:UserWarning"
)

# Crops that are the whole image, so that training sees what evaluation sees.
WHOLE = {"data__crop_scale": (1.0, 1.0), "data__crop_ratio": (1.0, 1.0), "data__flip": False}
HEAD = {"model__head": "mlp", "model__head_width": 24, "model__head_norm": "batch"}
FROZEN = {"model__batch_norm": "frozen", "optimizer__freeze_backbone": "20 steps"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, their features without and with random crops."""
    path = tmp_path_factory.mktemp("features")
    small_runs.write_images(path / "images.npz")
    writing.write_features(of_images(path), path / "plain", views=0)
    writing.write_features(of_images(path, data__flip=True), path / "crops", views=3)
    return path


def of_images(folder: Path, **changes: Any) -> Config:
    name = folder / "images.py"
    settings = {**WHOLE, **FROZEN, **changes}
    small_runs.write_config(name, folder / "images.npz", **settings)
    return load_config(str(name))


def of_features(folder: Path, name: str = "plain", **changes: Any) -> Config:
    """A config of the features in a subfolder."""
    config = of_images(folder, **changes)
    data = dataclasses.replace(config.data, source="features", directory=str(folder / name))
    return dataclasses.replace(config, data=data)


def network(config: Config) -> Any:
    graphdef, *state = make_model(config.model, seed=config.seed, channels=1, pretrained=True)
    return nnx.merge(graphdef, *state)


def test_features_are_what_the_head_sees_of_each_crop(folder: Path) -> None:
    config = of_images(folder, data__flip=True)
    images, features = load.load_dataset(config), load.load_dataset(of_features(folder, "crops"))
    model = network(config)
    for name, split in images._asdict().items():
        if not isinstance(split, Split):
            continue
        cached = getattr(features, name)
        np.testing.assert_array_equal(cached.labels, split.labels)
        assert cached.names.tolist() == split.names.tolist()
        seen = [model.backbone((split.images / 127.5 - 1).astype(np.float32), train=False)]
        wanted = np.mean(seen[0], axis=(1, 2)) + np.max(seen[0], axis=(1, 2))
        np.testing.assert_allclose(cached.images[:, 0], wanted, rtol=1e-4, atol=1e-5)
        assert cached.images.shape[1] == (4 if name == "train" else 1)
    # View 2 of the second batch: its own random crops, which are told by seed, view and batch.
    split, size = images.train, config.data.eval_batch_size
    batches = -(-len(split.labels) // size)
    crops = augment(
        jnp.asarray(split.images[size : 2 * size]),
        seed=jnp.uint32(config.seed),
        step=jnp.uint32(batches + 1),
        first=0,
        image_size=12,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        rotate=0.0,
        shear=0.0,
        flip=True,
    )
    found = features.train.images[size : 2 * size, 2]
    np.testing.assert_allclose(found, model.pooled(crops), rtol=1e-4, atol=1e-5)
    assert np.abs(found - features.train.images[size : 2 * size, 0]).max() > 0.01


def test_training_batches_have_the_images_of_image_fed_training_and_draw_every_view(
    folder: Path,
) -> None:
    config, mesh = of_features(folder, "crops"), make_mesh()
    dataset = load.load_dataset(config)
    with_images = of_images(folder)
    theirs = load.train_batches(load.load_dataset(with_images), with_images, mesh, range(30))
    counts = np.zeros(4, int)
    ours = load.train_batches(dataset, config, mesh, range(30))
    for batch, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(batch.labels, other.labels)
        for row in np.asarray(batch.images):
            same = np.all(dataset.train.images == row, axis=2)
            assert same.any()
            counts[np.unique(np.nonzero(same)[1])] += 1
    assert counts[0] < counts[1:].min()  # only where a random crop is the evaluation crop
    assert counts[1:].min() > 0.25 * 30 * 16 / 3


def test_killed_writer_resumes_and_makes_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_images(folder, data__flip=True)
    original = writing._Folder.append
    for killed_at in (0, 2, 7):
        output, calls = tmp_path / f"at{killed_at}", iter(range(100))

        def stop(self: Any, *arguments: Any, calls: Any = calls, at: int = killed_at) -> None:
            if next(calls) == at:
                with (self._path / f"{arguments[0]}.npy").open("ab") as file:
                    file.write(b"torn")
                raise KeyboardInterrupt
            original(self, *arguments)

        monkeypatch.setattr(writing._Folder, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            writing.write_features(config, output, views=3, rows_per_part=32)
        monkeypatch.setattr(writing._Folder, "append", original)
        with pytest.raises(UserError, match=r"(is incomplete|has no .*); mmljax features"):
            load.load_dataset(of_features(output.parent, output.name))
        writing.write_features(config, output, views=3, rows_per_part=32)
        for name in ("train", "query", "gallery"):
            wanted = (folder / "crops" / f"{name}.npy").read_bytes()
            assert (output / f"{name}.npy").read_bytes() == wanted
        assert not (output / "progress.json").exists()
        assert writing.write_features(config, output, views=3) is None


@pytest.mark.parametrize(
    ("changes", "views", "message"),
    [
        ({"model__width": 16}, 0, r"model.width: 8 -> 16.*name another --output"),
        ({"data__image_size": 8}, 0, r"data.image_size: 12 -> 8"),
        ({}, 2, r"views.train: 1 -> 3"),
    ],
)
def test_folder_of_other_features_is_left_alone(
    folder: Path, changes: dict[str, Any], views: int, message: str
) -> None:
    before = (folder / "plain" / "train.npy").read_bytes()
    with pytest.raises(UserError, match=message):
        writing.write_features(of_images(folder, **changes), folder / "plain", views=views)
    assert (folder / "plain" / "train.npy").read_bytes() == before


def damage(path: Path, how: str) -> None:
    file = path / "train.npy"
    if how == "absent":
        file.unlink()
    elif how == "short":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "other rows":
        np.save(file, np.zeros((1, 3, 8), np.float32))
    elif how == "text":
        (path / "features.json").write_text("{")
    elif how == "no images":
        (path / "images.npz").write_bytes(b"PK")


@pytest.mark.parametrize("how", ["absent", "short", "other rows", "text", "no images"])
def test_damaged_features_are_refused(folder: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(folder / "plain", tmp_path / "damaged")
    damage(tmp_path / "damaged", how)
    config = of_features(folder)
    data = dataclasses.replace(config.data, directory=str(tmp_path / "damaged"))
    with pytest.raises(UserError, match=r"--config.data.directory=.*damaged.*again"):
        load.load_dataset(dataclasses.replace(config, data=data))


def test_features_of_another_backbone_or_size_than_the_config_names(folder: Path) -> None:
    with pytest.raises(UserError, match="network or crop.*model.backbone: 'small' -> 'resnet18'"):
        load.load_dataset(of_features(folder, model__backbone="resnet18"))
    with pytest.raises(UserError, match="data.resize_size: 12 -> 16"):
        load.load_dataset(of_features(folder, data__resize_size=16))
    with pytest.raises(UserError, match=r"has no features.json; mmljax features --config CONFIG"):
        load.load_dataset(of_features(folder, "nothing"))
    config = of_images(folder)
    with pytest.raises(UserError, match="features of 9 channels, but the backbone gives 32"):
        make_model(config.model, seed=0, channels=1, pretrained=False, features=9)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in small_runs.metrics(run) if '"train"' in row]


@pytest.mark.parametrize("head", [pytest.param({}, marks=pytest.mark.slow), HEAD])
def test_equals_image_fed_training_with_a_frozen_backbone(
    folder: Path, tmp_path: Path, head: dict[str, Any]
) -> None:
    train(of_images(folder, **head), tmp_path / "images")
    train(of_features(folder, **head), tmp_path / "features")
    for ours, theirs in zip(rows(tmp_path / "features"), rows(tmp_path / "images"), strict=True):
        for key in theirs:
            if key not in ("gradient_norm/network", "kind"):  # the backbone's gradient is in it
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    one, two = (small_runs.final_state(tmp_path / name) for name in ("features", "images"))
    names = [name for name in one if name.startswith(("params", "model_state"))]
    assert any("head" in name for name in names)
    assert not any("backbone" in name for name in names)
    for name in names:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5, rtol=1e-5, err_msg=name)
    scores = [small_runs.results(tmp_path / name)["scores"] for name in ("features", "images")]
    assert scores[0]["map@r"] == pytest.approx(scores[1]["map@r"], abs=1e-3)


def test_interrupted_equals_uninterrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_features(folder, "crops", model__dropout=0.3, **HEAD)
    train(config, tmp_path / "whole")
    parts = tmp_path / "parts"
    small_runs.train_broken_off(config, parts, steps=12, monkeypatch=monkeypatch)
    train(config, parts)
    small_runs.assert_same_run(tmp_path / "whole", parts)


def test_run_is_not_resumed_on_other_features(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "plain", tmp_path / "features")
    config = of_features(folder, duration="2 steps")
    data = dataclasses.replace(config.data, directory=str(tmp_path / "features"))
    config = dataclasses.replace(config, data=data)
    train(config, tmp_path / "run")
    features = np.load(tmp_path / "features" / "train.npy")
    np.save(tmp_path / "features" / "train.npy", features + np.float32(0.5))
    with pytest.raises(UserError, match="holds a run of other data .train: contents of sampled"):
        train(config, tmp_path / "run")


def test_distractors_have_features_and_scores_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distractors are the gallery's images, so each match ties with one of them."""

    def named(config: Config, path: str) -> Config:
        evaluation = dataclasses.replace(config.evaluation, distractors=path)
        return dataclasses.replace(config, evaluation=evaluation)

    dataset = load.load_dataset(of_images(folder))
    dataset = dataset._replace(distractors=dataset.gallery)
    monkeypatch.setattr(load, "load_dataset", lambda config, **_: dataset)
    writing.write_features(named(of_images(folder), "noise"), tmp_path / "x", views=0)
    monkeypatch.undo()
    config = named(of_features(tmp_path, "x", duration="2 steps"), "noise")
    assert load.load_dataset(named(config, "")).distractors is None
    with pytest.raises(UserError, match="distractors=other: .* has features of noise; make them"):
        load.load_dataset(named(config, "other"))
    with pytest.raises(UserError, match="has features of no distractors; make them"):
        load.load_dataset(named(of_features(folder), "noise"))
    rerank = RerankConfig(("query_expansion", "k_reciprocal"), k=2, k1=4, k2=2)
    evaluation = dataclasses.replace(config.evaluation, rerank=rerank)
    config = dataclasses.replace(config, evaluation=evaluation)
    results = train(config, tmp_path / "run")
    scores, before = results["scores"], results["untrained"]
    for row, name in itertools.product((scores, before), rerank.methods):
        assert 0 < row[f"mrr/{name}"] <= 1
    assert results["protocol"]["rerank"].startswith("query_expansion, k_reciprocal: k 2, ")
    assert (scores["distractors"], scores["gallery"]) == (24, 24)
    for row in (scores, before):
        assert row["recall@1/distractors"] == 0 < row["recall@1"]
        assert 0 < row["mrr/distractors"] <= 0.5
    assert results["protocol"]["distractors"]
    kept = read_records(tmp_path / "run").values
    assert kept["recall@4/distractors"].mean() == pytest.approx(scores["recall@4/distractors"])


def test_head_is_joined_with_its_backbone(folder: Path, tmp_path: Path) -> None:
    config = of_features(folder, **HEAD)
    train(config, tmp_path / "run")
    trained = load_embedder(tmp_path / "run")
    images = load.load_dataset(of_images(folder)).query.images
    by_images = trained.embed(images)
    features = load.eval_batches(load.load_dataset(config).query, config, trained.mesh)
    by_features = embed_batches(trained.embed, features)[0]
    np.testing.assert_allclose(by_images, by_features, atol=1e-5)
    scores = small_runs.results(tmp_path / "run")["scores"]
    assert scores["queries"] == len(images)

    identity = json.loads((tmp_path / "run" / "features.json").read_text())
    other = {**identity, "seed": identity["seed"] + 1}
    (tmp_path / "run" / "features.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="is a head on features of other weights"):
        load_embedder(tmp_path / "run")


def test_head_without_its_backbones_weights_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(of_features(folder, duration="2 steps"), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    saved["model"]["pretrained"] = str(tmp_path / "gone.safetensors")
    path.write_text(json.dumps(saved))
    capsys.readouterr()
    flags = ["--images", str(tmp_path), "--output", str(tmp_path / "out.parquet")]
    assert main(["embed", str(tmp_path / "run"), *flags]) == 2
    message = capsys.readouterr().err
    assert "is a head on features, which needs its backbone to embed images" in message
    assert "gone.safetensors' is no file" in message
    assert message.count("\n") == 1


def make_runs(
    folder: Path, workdir: Path, *, rates: tuple[float, ...], seeds: int, **changes: Any
) -> list[Run]:
    runs = []
    for rate in rates:
        config = of_features(folder, "crops", optimizer__head__learning_rate=rate, **changes)
        for seed in range(seeds):
            name = f"{rate}-{seed}"
            own = dataclasses.replace(config, seed=seed)
            runs.append(Run(f"rate={rate}", own, workdir / name))
    return runs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"data__composition__rule": "either", "data__composition__every": "3 steps"},
            marks=pytest.mark.slow,
        ),
        {
            "objectives__proxy__loss": "arcface",
            "objectives__proxy__sampled_proxies": 3,
            "objectives__proxy__margin_rise": "50%",
            "objectives__proxy__least_margin": 0.1,
        },
    ],
    ids=["plain", "composition", "softmax"],
)
def test_sweep_equals_the_runs_alone(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = make_runs(folder, tmp_path / "sweep", rates=(1e-3, 3e-3), seeds=2, **changes)
    found = sweep(runs, tmp_path / "sweep")
    assert [row["seed"] for row in found] == [0, 1, 0, 1]
    for run in (runs[1], runs[2]):
        train(run.config, tmp_path / run.workdir.name)
        ours, theirs = rows(run.workdir), rows(tmp_path / run.workdir.name)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for key in other:
                if key != "kind":
                    assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
        one, two = (small_runs.final_state(path) for path in (run.workdir, tmp_path / run[2].name))
        assert one.keys() == two.keys()
        for name, value in two.items():
            np.testing.assert_allclose(one[name], value, atol=1e-4, rtol=1e-4, err_msg=name)
    assert load_embedder(runs[0].workdir).config.seed == 0
    table = sweep_table(found, ["recall@1"])
    mean = 50 * sum(row["scores"]["recall@1"] for row in found[:2])
    assert f"rate=0.001      2  {mean:.1f} ±" in table


def test_sweep_trains_only_what_is_not_complete(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = make_runs(folder, tmp_path, rates=(1e-3,), seeds=3)
    sweep(runs[:2], tmp_path)
    before = (runs[0].workdir / "results.json").read_bytes()
    caplog.set_level("INFO", "mmljax")
    caplog.clear()
    assert len(sweep(runs, tmp_path)) == 3
    assert "training 1 runs" in caplog.text
    assert (runs[0].workdir / "results.json").read_bytes() == before


@pytest.mark.slow
def test_run_of_a_sweep_that_diverges_fails_alone(folder: Path, tmp_path: Path) -> None:
    found = sweep(make_runs(folder, tmp_path, rates=(1e-3, 1e38), seeds=1), tmp_path)
    assert "scores" in found[0]
    assert "not finite" in found[1]["error"]
    assert "0, 1 failed" in sweep_table(found, ["recall@1"])


def test_sweep_of_images_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make them with mmljax features"):
        sweep([Run("", of_images(folder), tmp_path / "run")], tmp_path)


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_images(folder)
    config, output = f"--config={folder / 'images.py'}", str(tmp_path / "made")
    assert main(["features", config, "--output", output, "--views", "0"]) == 0
    assert "features of 32 channels" in capsys.readouterr().err
    assert main(["features", config, "--output", output, "--views", "0"]) == 0
    assert "is complete already" in capsys.readouterr().err
    source = ["--config.data.source=features", f"--config.data.directory={output}"]
    vary = ["--vary", "model.dropout=0.0,0.2", "--config.duration=4 steps"]
    workdir = ["--workdir", str(tmp_path / "sweep"), "--seeds", "2"]
    assert main(["sweep", config, *source, *workdir, *vary]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "setting",
        "model.dropout=0.0",
        "model.dropout=0.2",
    ]
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())) == 4
    assert main(["sweep", config, *source, "--vary", "seed=1,2"]) == 2
    assert "--seeds varies the seed" in capsys.readouterr().err


@pytest.mark.slow
def test_eight_devices_equal_one(folder: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 8):
        config = of_features(folder, "crops", model__dropout=0.3, **HEAD)
        images = folder / "images.npz"
        path = small_runs.write_config(tmp_path / "c.py", images, **WHOLE, **FROZEN, **HEAD)
        done = small_runs.run(
            path,
            tmp_path / f"run{count}",
            "--config.model.dropout=0.3",
            "--config.data.source=features",
            f"--config.data.directory={config.data.directory}",
            JAX_NUM_CPU_DEVICES=str(count),
        )
        assert done.returncode == 0, done.stderr
        found.append(small_runs.final_state(tmp_path / f"run{count}"))
    for name, value in found[0].items():
        if name.startswith("params"):
            np.testing.assert_allclose(found[1][name], value, atol=2e-5, rtol=1e-4, err_msg=name)

"""Networks between pretrained and fine-tuned weights: the ends, the scores, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import small_runs
from commands import run
from mmljax.config import load_config, to_dict
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference.embedder import load_embedder
from mmljax.inference.interpolate import interpolate, pretrained_weights
from mmljax.training.checkpoints import Checkpoints
from mmljax.training.state import make_model

numpy_files = pytest.importorskip("safetensors.numpy", reason="writes the files of weights")

Change = Callable[[str, np.ndarray], np.ndarray]

ENDINGS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
LAST = "layer3.0.bn2.bias"  # what is added to the last feature map, before a ReLU


class Planted(NamedTuple):
    """A run whose two ends were chosen by the test, and their arrays by name."""

    folder: Path
    pretrained: dict[str, np.ndarray]  # of the backbone
    fine_tuned: dict[str, np.ndarray]  # of the network


def by_name(*trees: Any) -> dict[str, np.ndarray]:
    return {
        ".".join(str(entry.key) for entry in path): np.asarray(leaf)
        for tree in trees
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def changed(tree: Any, change: Change) -> Any:
    leaves = [change(name, value) for name, value in by_name(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def plant(folder: Path, *, first: Change, last: Change) -> Planted:
    """Write a run; ``first`` and ``last`` change the backbone's arrays at each end by name."""
    file = folder / "weights.safetensors"
    path = small_runs.write_config(
        folder / "small.py",
        small_runs.write_images(folder / "images.npz"),
        model__pretrained=str(file),
    )
    config = load_config(str(path))
    _, *made = make_model(config.model, seed=1, channels=1, pretrained=False)
    pretrained = by_name(*(changed(tree["backbone"], first) for tree in made))
    theirs = {}
    for name, value in pretrained.items():
        module, _, ending = name.rpartition(".")
        value = value.transpose(3, 2, 0, 1) if ending == "kernel" else value
        theirs[f"{module}.{ENDINGS.get(ending, ending)}"] = np.ascontiguousarray(value)
    numpy_files.save_file(theirs, file)

    network, statistics = ({**tree, "backbone": changed(tree["backbone"], last)} for tree in made)
    saved = Checkpoints(folder / "run/checkpoints", keep_last=1, keep_best=0)
    state = {"params": {"network": network}, "model_state": statistics}
    saved.save(state, step=7, metrics=None)
    saved.close()
    (folder / "run/config.json").write_text(json.dumps(to_dict(config)))
    return Planted(folder / "run", pretrained, by_name(network, statistics))


def same(name: str, value: np.ndarray) -> np.ndarray:
    return value


def constant(name: str, value: np.ndarray) -> np.ndarray:
    """A backbone with the same features for all images."""
    return value if name.endswith(".var") else np.zeros_like(value)


def shifted(by: float) -> Change:
    """The last map moved so far along a direction that float32 keeps little of it."""
    direction = np.random.default_rng(3).normal(size=(64,)).astype(np.float32)
    return lambda name, value: value + by * direction[: value.size] if name == LAST else value


def noised(name: str, value: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(len(name)).uniform(0.5, 1.5, value.shape)
    return (value * noise + 0.1).astype(value.dtype)


@pytest.fixture(scope="module")
def between(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Both ends are useless in opposite directions; the middle is a network."""
    folder = tmp_path_factory.mktemp("between")
    return plant(folder, first=shifted(1e7), last=shifted(-1e7))


def test_ends_are_exact_and_the_rest_lies_between(tmp_path: Path) -> None:
    planted = plant(tmp_path, first=noised, last=same)
    trained = load_embedder(planted.folder)
    pretrained = pretrained_weights(trained)
    fine_tuned = type(pretrained)(trained.network, trained.model_state)
    for alpha in (0.0, 0.3, 1.0):
        got = by_name(*interpolate(pretrained, fine_tuned, alpha=alpha))
        assert got.keys() == planted.fine_tuned.keys()
        for name, value in got.items():
            end = planted.fine_tuned[name]
            start = planted.pretrained.get(name.removeprefix("backbone."), end)  # none for the head
            assert np.array_equal(start, end) == (not name.startswith("backbone."))
            assert value.dtype == end.dtype
            if alpha in (0, 1) or start is end:
                assert value.tobytes() == (start if alpha == 0 else end).tobytes(), name
            else:
                wanted = 0.7 * start.astype(np.float64) + 0.3 * end.astype(np.float64)
                np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-8)


def test_a_fine_tune_that_made_it_worse_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = plant(tmp_path, first=same, last=constant)
    assert run("interpolate", planted.folder, "--alphas", "0.5") == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split() == ["alpha", "recall@1", "recall@2", "recall@4", "map@r"]
    table = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[1:5]}
    assert list(table) == ["features", "0", "0.5", "1"]
    assert table["1"][0] == 0  # one point for all images
    assert table["0"][0] > 50
    warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4  # of two scores, by two pretrained networks
    for key, column in (("recall@1", 0), ("map@r", 3)):
        for row, name in (("0", "backbone (alpha 0)"), ("features", "features without a head")):
            assert (
                f"warning: fine-tuning made {key} worse: {table[row][column]:.2f} % with the "
                f"pretrained {name}, 0.00 % with the fine-tuned network (alpha 1)"
            ) in warnings


def test_features_are_those_of_the_pretrained_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scored by NumPy: the pooled map of each query, normalised, against those of the gallery."""
    planted = plant(tmp_path, first=same, last=constant)
    run("interpolate", planted.folder, "--alphas", "0")
    shown = capsys.readouterr().out.splitlines()
    trained = load_embedder(planted.folder)
    model = nnx.merge(trained.graphdef, *pretrained_weights(trained))
    dataset = load.load_dataset(trained.config)
    vectors = []
    for split in (dataset.query, dataset.gallery):
        x = (np.asarray(split.images, np.float32) / 255 - 0.5) / 0.5  # crops are whole images
        maps = np.asarray(model.backbone(x, train=False), np.float64)
        pooled = maps.mean((1, 2)) + maps.max((1, 2))
        vectors.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    best = np.argmax(vectors[0] @ vectors[1].T, axis=1)
    recall = np.mean(dataset.gallery.labels[best] == dataset.query.labels)
    assert shown[1].split()[:2] == ["features", f"{100 * recall:.2f}"]


def test_a_fine_tune_that_helped_causes_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = plant(tmp_path, first=constant, last=same)
    assert run("interpolate", planted.folder, "--alphas", "1") == 0
    shown = capsys.readouterr()
    assert "warning" not in shown.err
    assert "recall@1: alpha 1 is best" in shown.out


def test_a_better_point_between_is_named_and_saved(
    between: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("interpolate", between.folder, "--alphas", "0.25,0.5")
    shown = capsys.readouterr().out
    assert "recall@1: alpha 0.5 is best" in shown
    assert "--save 0.5 --output DIRECTORY writes it" in shown

    output = tmp_path / "new/half"
    run("interpolate", between.folder, "--save", "0.5", "--output", output)
    half = load_embedder(output)
    got = by_name(half.network, half.model_state)
    for name, value in between.fine_tuned.items():
        start = between.pretrained.get(name.removeprefix("backbone."), value)
        np.testing.assert_allclose(got[name], (start + value.astype(np.float64)) / 2, rtol=1e-6)
    origin = json.loads((output / "interpolation.json").read_text())
    assert (origin["run"], origin["step"], origin["alpha"]) == ("run", 7, 0.5)
    assert origin["weights"] == load_embedder(between.folder).identity["weights"]
    assert half.identity["weights"] != origin["weights"]
    with pytest.raises(UserError, match=r"--output=.*half exists already; name a new directory"):
        run("interpolate", between.folder, "--save", "1", "--output", output)


def test_a_saved_network_is_embedded_like_a_run(between: Planted, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run("interpolate", between.folder, "--save", "1", "--output", tmp_path / "one")
    vectors = []
    for folder in (between.folder, tmp_path / "one"):
        file = tmp_path / f"{folder.name}.parquet"
        run("embed", folder, "--split", "query", "--output", file)
        vectors.append(parquet.read_table(file)["embedding"].to_pylist())
    assert vectors[0] == vectors[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--alphas", "0.5,1.5"), "--alphas: must be from 0 to 1, found 1.5"),
        (("--alphas", "half"), "--alphas: invalid list of numbers value"),
        (("--save", "0.5"), "--save ALPHA and --output DIRECTORY go together"),
        (("--output", "x"), "--save ALPHA and --output DIRECTORY go together"),
        (("--pretrained", "absent.pth"), "absent.pth"),
    ],
)
def test_wrong_options_are_named(between: Planted, words: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("interpolate", between.folder, *words)


def test_a_run_from_random_weights_has_no_first_end(saved_run: Any) -> None:
    with pytest.raises(UserError, match="run run started from random weights .*name a run that"):
        run("interpolate", saved_run.folder)

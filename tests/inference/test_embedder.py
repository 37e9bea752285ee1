"""A network loaded from its checkpoint equals the trainer's; a damaged run is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import saved
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference.embedder import load_embedder


@pytest.fixture
def copy(saved_run, tmp_path):
    return Path(shutil.copytree(saved_run.folder, tmp_path / "copy"))


@pytest.mark.parametrize("step", saved.STEPS)
def test_embeddings_are_those_of_the_trainers_evaluation(saved_run, step):
    folder, config, states, _ = saved_run
    query = load.load_dataset(config).query
    expected, _ = saved.own_embeddings(saved_run, query, step=step)
    trained = load_embedder(folder, step=step)
    got = np.concatenate(
        [
            np.asarray(trained.embed(batch.images))[np.asarray(batch.valid)]
            for batch in load.eval_batches(query, config, trained.mesh)
        ]
    )
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32


def test_every_weight_is_restored_and_nothing_else(saved_run):
    folder, config, states, _ = saved_run
    trained = load_embedder(folder)
    assert trained.config == config
    assert trained.channels == 1
    expected = states[saved.STEPS[-1]]
    pairs = (
        (trained.network, expected.params["network"]),
        (
            trained.model_state,
            expected.model_state,
        ),
    )
    for got, wanted in pairs:
        assert jax.tree.structure(got) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_the_average_of_the_weights_is_loaded(tmp_path):
    """Where a run has one: its checkpoint's trained weights differ, and are not read."""
    run = saved.write_run(tmp_path, optimizer__ema_decay=0.9)
    trained, expected = load_embedder(run.folder), run.states[saved.STEPS[-1]]
    got = {"network": trained.network, "model_state": trained.model_state}
    jax.tree.map(np.testing.assert_array_equal, got, expected.average)
    pairs = zip(*map(jax.tree.leaves, (got["network"], expected.params["network"])), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)


def test_only_the_networks_files_are_needed(copy):
    """Without the bytes of proxies and optimiser the network is still restored: they are not read.

    Orbax keeps all arrays in one store, so the proof is by its list of what was asked for.
    """
    import orbax.checkpoint as ocp

    asked = []
    before = ocp.PyTreeCheckpointHandler.restore

    def spy(self, *args, **kwargs):
        found = before(self, *args, **kwargs)
        asked.extend(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", spy)
        load_embedder(copy)
    assert asked
    assert all(name.startswith(("params.network.", "model_state.")) for name in asked)


def test_a_path_may_name_the_checkpoints_or_one_of_them(saved_run):
    folder = saved_run.folder
    latest = load_embedder(folder).identity
    assert latest["step"] == 5
    assert load_embedder(folder / "checkpoints").identity == latest
    earlier = load_embedder(folder / "checkpoints" / "3").identity
    assert earlier == load_embedder(folder, step=3).identity
    assert earlier["weights"] != latest["weights"]
    with pytest.raises(UserError, match="names step 3 and --step 5"):
        load_embedder(folder / "checkpoints" / "3", step=5)


def test_images_of_other_kinds_are_refused(saved_run):
    trained = load_embedder(saved_run.folder)
    size = trained.config.data.image_size
    for images in (
        np.zeros((2, size, size, 1), np.float32),
        np.zeros((2, size, size, 3), np.uint8),
        np.zeros((2, size + 1, size, 1), np.uint8),
    ):
        with pytest.raises(UserError, match="images must be uint8"):
            trained.embed(images)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="does not exist; give the --workdir"):
        load_embedder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_embedder(tmp_path)


def test_no_checkpoint_and_no_such_step(copy):
    with pytest.raises(UserError, match="--step=4 is not kept.*kept: 3, 5"):
        load_embedder(copy, step=4)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="no complete checkpoint"):
        load_embedder(copy)


def test_damaged_config(copy):
    path = copy / "config.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_embedder(copy)
    path.write_text("[]")
    with pytest.raises(UserError, match="not a config of this version"):
        load_embedder(copy)
    path.write_text(json.dumps(json.loads(text) | {"sed": 1}))
    with pytest.raises(UserError, match="not a config of this version.*sed is unknown"):
        load_embedder(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("width", 4), ("embedding_size", 8), ("backbone", "resnet18")]
)
def test_a_config_of_another_network(copy, key, value):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["model"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit its config"):
        load_embedder(copy)


@pytest.mark.filterwarnings("ignore")  # orbax warns of what it cannot read
def test_a_torn_checkpoint(copy):
    for file in (copy / "checkpoints/5").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot be read.*name another --step"):
        load_embedder(copy)
    assert load_embedder(copy, step=3).identity["step"] == 3

"""A network as one file, loaded where only jax and numpy can be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.export
import numpy as np
import pytest

import saved
from commands import run
from mmljax import files
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.files import acquire_lock
from mmljax.inference import export

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def exported(saved_run, tmp_path_factory):
    """The folder of an export, and the command's exit code."""
    folder = tmp_path_factory.mktemp("export") / "of the run"
    code = run("export", saved_run.folder, "--output", folder, "--count=20", "--step=3")
    return folder, code


def test_the_receipt_holds(saved_run, exported):
    folder, code = exported
    receipt = json.loads((folder / "receipt.json").read_text())
    assert code == 0
    assert receipt["holds"] is True
    assert receipt["largest_difference"] <= 1e-5
    assert (receipt["images"], receipt["queries_with_equal_neighbors"]) == (20, 20)
    assert (receipt["neighbors"], receipt["step"]) == (10, 3)


def test_the_file_gives_the_trainers_embeddings_for_any_number_of_images(saved_run, exported):
    query = load.load_dataset(saved_run.config).query  # stored at the size of the crop
    expected, _ = saved.own_embeddings(saved_run, query, step=3)
    data = (exported[0] / "embedder.jax").read_bytes()
    loaded = jax.export.deserialize(bytearray(data))
    assert set(loaded.platforms) == {"cpu", "cuda", "tpu"}
    for count in (1, 7, 24):
        got = np.asarray(jax.jit(loaded.call)(query.images[:count]))
        np.testing.assert_allclose(got, expected[:count], atol=1e-5)


def test_the_lines_that_load_it_run_as_written(exported):
    found = json.loads((exported[0] / "embedder.json").read_text())
    assert found["platforms"] == ["cpu", "cuda", "tpu"]
    assert found["refused_platforms"] == {}
    assert len(found["load"]) == 5
    code = "\n".join([*found["load"], "print(embeddings.shape, (embeddings ** 2).sum())"])
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=exported[0], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shape, _, length = done.stdout.strip().rpartition(" ")
    assert shape == "(1, 16)"
    assert float(length) == pytest.approx(1, abs=1e-5)


def test_a_platform_that_cannot_be_lowered_for_is_left_out(saved_run, monkeypatch):
    before = jax.export.export

    def no_tpu(function, *, platforms):
        if "tpu" in platforms:
            raise NotImplementedError("no such thing there")
        return before(function, platforms=platforms)

    monkeypatch.setattr(jax.export, "export", no_tpu)
    lowered = export.lower(saved.load_once(saved_run.folder, step=3))
    assert lowered.exported.platforms == ("cpu", "cuda")
    assert lowered.refused == {"tpu": "no such thing there"}


def test_the_check_sees_a_file_that_differs(saved_run, exported, tmp_path, monkeypatch, capsys):
    other = saved.load_once(saved_run.folder, step=5)
    broken = export.lower(other)
    monkeypatch.setattr(export, "lower", lambda trained: broken)
    code = run("export", saved_run.folder, "--output", tmp_path, "--step=3")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (code, receipt["holds"]) == (1, False)
    assert receipt["largest_difference"] > 1e-3
    assert "does NOT hold" in capsys.readouterr().out


def test_the_check_sees_neighbours_that_differ():
    live = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    moved = live.copy()
    moved[0, 1] = 9e-6  # within the tolerance, but image 2 is now nearer to it than image 3
    moved[0, 2] = 9.5e-6
    receipt = export.parity(live, moved)
    assert receipt["largest_difference"] <= 1e-5
    assert receipt["holds"] is False
    assert receipt["queries_with_equal_neighbors"] < 4
    assert export.parity(live, live)["holds"] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "pooling", "dtype"),
    [("resnet18", "gem", "bfloat16"), ("vit_s16", "token", "bfloat16")],
)
def test_networks_that_round_more(tmp_path, backbone, pooling, dtype):
    folder = saved.write_run(
        tmp_path,
        noise=0.0,  # else all images come so close that their order is chance
        model__backbone=backbone,
        model__pooling=pooling,
        model__compute_dtype=dtype,
        model__width=16,
        data__image_size=32,
        data__resize_size=32,
    ).folder
    assert run("export", folder, "--output", tmp_path / "exported", "--count=24") == 0


@pytest.mark.parametrize("package", ["flax", "mmljax", "optax", "yaml", "tensorflow"])
def test_the_clean_process_can_import_no_more(package):
    code = export.CHECK.format(allowed=export.ALLOWED, blocked=(), artefact="absent", batch=1)
    code = code.partition("import jax, jax.export")[0] + f"import {package}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"No module named '{package}'" in done.stderr


def test_a_file_that_cannot_be_loaded(tmp_path):
    (tmp_path / "embedder.jax").write_bytes(b"nothing of the kind")
    images = np.zeros((2, 4, 4, 1), np.uint8)
    with pytest.raises(UserError, match="cannot be loaded in a process of its own"):
        export.embed_in_clean_process(tmp_path / "embedder.jax", images, batch=2)


@pytest.fixture
def old_export(exported, tmp_path):
    """A copy of a good export, and its contents."""
    folder = Path(shutil.copytree(exported[0], tmp_path / "export"))
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


STAGES = ("lower", "describe", "embed_crops", "embed_in_clean_process", "parity")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["interrupted", "killed", "full disk"])
def test_a_stopped_export_leaves_the_old_files_and_receipt(
    saved_run, old_export, monkeypatch, stage, how
):
    folder, before = old_export
    trained = saved.load_once(saved_run.folder, step=5)
    query = load.load_dataset(saved_run.config).query
    with monkeypatch.context() as patch:
        if how == "killed":  # nothing is cleaned up
            patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        fault = OSError(28, "No space left on device") if how == "full disk" else KeyboardInterrupt
        patch.setattr(export, stage, Mock(side_effect=fault))
        with pytest.raises((KeyboardInterrupt, UserError)):
            export.export_run(trained, query, folder)
    for name, contents in before.items():
        assert (folder / name).read_bytes() == contents
    assert (folder / ".partial").exists() == (how == "killed")
    if how == "killed" and stage == STAGES[-1]:
        assert export.export_run(trained, query, folder)["step"] == 5
        assert sorted(path.name for path in folder.iterdir()) == sorted(before)


@pytest.mark.parametrize("moved", range(3))
def test_an_export_killed_while_it_moves_files_leaves_whole_files(
    saved_run, old_export, monkeypatch, moved
):
    folder, before = old_export
    replace, calls = os.replace, []

    def replace_some(source, target):
        if Path(target).parent == folder:
            if len(calls) == moved:
                raise KeyboardInterrupt
            calls.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        run("export", saved_run.folder, "--output", folder, "--count=20", "--step=5")
    assert not (folder / "receipt.json").exists()  # neither file's receipt beside the other file
    assert calls == ["embedder.jax", "embedder.json"][:moved]
    assert ((folder / "embedder.jax").read_bytes() == before["embedder.jax"]) == (moved == 0)
    jax.export.deserialize(bytearray((folder / "embedder.jax").read_bytes()))
    assert json.loads((folder / "embedder.json").read_text())["step"] in (3, 5)


def test_a_second_export_into_one_folder_is_refused(saved_run, tmp_path):
    with (
        acquire_lock(tmp_path / ".lock"),
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on"),
    ):
        run("export", saved_run.folder, "--output", tmp_path)


def test_a_folder_that_cannot_be_written(saved_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output.*cannot be written"):
        run("export", saved_run.folder, "--output", tmp_path / "file/x")

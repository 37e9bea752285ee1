"""Loading by source name: arrays need no TensorFlow, and files name the package that they need."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import small_runs
from mmljax.config import load_config
from mmljax.data import load
from mmljax.data.fingerprint import dataset_fingerprint
from mmljax.errors import UserError
from mmljax.mesh import make_mesh


def test_arrays_need_no_tensorflow_and_files_name_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = small_runs.write_images(tmp_path / "images.npz")
    config = load_config(str(small_runs.write_config(tmp_path / "small.py", images)))
    dataset = load.load_dataset(config)
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
    next(load.train_batches(dataset, config, make_mesh(), range(1)))
    files = dataset._replace(train=dataset.train._replace(images=np.array(["a.jpg"], object)))
    with pytest.raises(UserError, match=r"needs the package tensorflow: .*mmljax\[data\]"):
        next(load.train_batches(files, config, make_mesh(), range(1)))


def test_distractors_are_the_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "test/b/1.jpg", "test/b/2.jpg", "noise/x.jpg", "noise/y/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    words = [f"data.directory={tmp_path}", f"evaluation.distractors={tmp_path / 'noise'}"]
    config = load_config("finetune", words)
    dataset = load.load_dataset(config)
    assert dataset.distractors is not None
    assert dataset.distractors.names.tolist() == ["x.jpg", "y/z.png"]
    assert set(dataset_fingerprint(dataset)) == {"train", "query", "distractors"}
    assert load.load_dataset(load_config("finetune", words[:1])).distractors is None
    grey = dataset._replace(
        train=dataset.train._replace(images=np.zeros((1, 4, 4, 1), np.uint8)), distractors=None
    )
    with pytest.raises(UserError, match="noise: files are read in colour, .* 1 channels"):
        load.with_distractors(grey, config)
    absent = load_config("finetune", [words[0], "evaluation.distractors=absent"])
    with pytest.raises(UserError, match="--config.evaluation.distractors: absent does not exist"):
        load.load_dataset(absent)


def test_an_unknown_source_names_the_nearest() -> None:
    config = load_config("quickstart", ["data.source=in_shp"])
    with pytest.raises(UserError, match="data.source='in_shp' is unknown.*'in_shop'"):
        load.load_dataset(config)

"""Loading by source name: arrays need no TensorFlow, and files name the package that they need."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import small_runs
from mmljax.config import load_config
from mmljax.data import load
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


def test_an_unknown_source_names_the_nearest() -> None:
    config = load_config("quickstart", ["data.source=in_shp"])
    with pytest.raises(UserError, match="data.source='in_shp' is unknown.*'in_shop'"):
        load.load_dataset(config)

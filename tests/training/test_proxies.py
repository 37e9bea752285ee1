"""Proxies from class means: a slow loop in float64, several devices, what is left random."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import small_runs
from mmljax.config import Config, load_config
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.training.proxies import class_means, init_proxies
from mmljax.training.trainer import make_trainer

CLASSES = 12


def slow_means(x: np.ndarray, labels: np.ndarray, *, centers: int, start: np.ndarray) -> np.ndarray:
    """Image by image, in float64."""
    proxies = start.astype(np.float64)
    for label in set(labels.tolist()):
        own = [x[i].astype(np.float64) for i in range(len(x)) if labels[i] == label]
        for center in range(min(centers, len(own))):
            total = sum(own[center::centers])
            proxies[label * centers + center] = total / np.sqrt(np.sum(total * total))
    return proxies


@pytest.mark.parametrize("centers", [1, 3])
def test_means_are_those_of_a_slow_loop(centers: int) -> None:
    """Classes of unequal size in mixed order, one smaller than its centers, one without images."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([0, 1, 2, 4], [7, 2, 5, 1])).astype(np.int32)
    x = random.normal(1, 1, (len(labels), 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    start = random.normal(size=(8 * centers, 5))
    got = class_means(x, labels, centers=centers, start=start)
    np.testing.assert_allclose(got, slow_means(x, labels, centers=centers, start=start), rtol=1e-12)
    np.testing.assert_array_equal(got[3 * centers : 4 * centers], start[3 * centers : 4 * centers])
    np.testing.assert_array_equal(got[5 * centers :], start[5 * centers :])


def test_embeddings_that_cancel_leave_the_start() -> None:
    start = np.full((2, 2), 0.3, np.float32)
    x = np.array([[1, 0], [-1, 0], [0, 1]], np.float32)
    got = class_means(x, np.array([0, 0, 1]), centers=1, start=start)
    np.testing.assert_array_equal(got, np.array([[0.3, 0.3], [0, 1]], np.float32))
    assert got.dtype == np.float32


def make_config(tmp_path: Path, **changes: Any) -> Config:
    images = small_runs.write_images(tmp_path / "images.npz")
    path = small_runs.write_config(
        tmp_path / "small.py", images, proxies_init="class_means", centers=2, **changes
    )
    return load_config(str(path))


def test_a_run_starts_from_the_means_on_any_number_of_devices(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mmljax")
    config = make_config(tmp_path)
    dataset = load.load_dataset(config)
    found = []
    for devices in (1, 8):
        mesh = make_mesh(jax.devices()[:devices])
        trainer = make_trainer(config, classes=CLASSES, channels=1, train_examples=72, mesh=mesh)
        state = init_proxies(trainer.state, config, dataset, trainer, mesh)
        proxies = state.params["proxies"]
        assert proxies.sharding == trainer.state.params["proxies"].sharding
        found.append(np.asarray(proxies))
        jax.tree.map(
            np.testing.assert_array_equal, state.params["network"], trainer.state.params["network"]
        )
    model = nnx.merge(trainer.graphdef, *trainer.state.evaluated)
    x = np.asarray(model(np.asarray(dataset.train.images), train=False))  # crops are whole images
    start = np.asarray(trainer.state.params["proxies"])
    wanted = slow_means(x, np.asarray(dataset.train.labels), centers=2, start=start)
    assert not np.allclose(wanted[0], start[0], atol=0.1)
    for got in found:
        np.testing.assert_allclose(got[:24], wanted[:24], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got[24:], 0)  # padding
    assert "starts from random weights, so the means" in caplog.text
    assert "proxies start as class means of 72 training images" in caplog.text


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(UserError, match="--config.proxies_init='class_mean' is unknown; did you"):
        make_trainer(
            load_config("quickstart", ["proxies_init=class_mean"]),
            classes=CLASSES,
            channels=1,
            train_examples=72,
            mesh=make_mesh(),
        )

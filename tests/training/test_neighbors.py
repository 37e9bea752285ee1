"""The relations of composed batches equal slow loops; they are refreshed when they are due."""

from __future__ import annotations

import io
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_runs
from mmljax.config import from_mapping, read_config_file
from mmljax.data import load
from mmljax.data.composition import embedded_images
from mmljax.errors import UserError
from mmljax.mesh import make_mesh, replicated
from mmljax.retrieval.evaluate import embed_batches, make_embed
from mmljax.training import neighbors
from mmljax.training.batches import make_batches
from mmljax.training.trainer import make_trainer
from searches import mesh_of


@pytest.mark.parametrize("centers", [1, 3])
def test_nearest_classes_are_those_of_a_loop(centers: int) -> None:
    classes, count = 17, 5
    proxies = np.random.default_rng(0).normal(0.2, 1, (classes * centers, 7)).astype(np.float32)
    directions = []
    for c in range(classes):
        rows = proxies[c * centers : (c + 1) * centers].astype(np.float64)
        mean = sum(row / np.linalg.norm(row) for row in rows)
        directions.append(mean / np.linalg.norm(mean))
    found = neighbors.nearest_classes(proxies, centers=centers, count=count, mesh=make_mesh())
    for c in range(classes):
        others = [k for k in range(classes) if k != c]
        expected = sorted(others, key=lambda k: -(directions[c] @ directions[k]))
        assert found[c].tolist() == expected[:count]


@pytest.mark.parametrize("results", [2**24, 40])
def test_nearest_wrong_images_are_those_of_a_loop(
    results: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in several searches; one class has most of the images, and all are near each other."""
    monkeypatch.setattr(neighbors, "_RESULTS", results)
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([0, 1, 2, 3], [13, 2, 1, 5]))
    x = random.normal(0, 1, (len(labels), 6)) + 3 * random.normal(0, 1, (4, 6))[labels]
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    found = neighbors.nearest_wrong_images(jnp.asarray(x), labels, mesh=make_mesh())
    for i, row in enumerate(x.astype(np.float64)):
        wrong = [j for j in range(len(x)) if labels[j] != labels[i]]
        assert found[i] == max(wrong, key=lambda j: row @ x[j])


@pytest.mark.parametrize("results", [2**24, 40])
def test_nearest_wrong_classes_are_those_of_a_loop(
    results: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in several searches, in a file, with ties, and with classes that have no image."""
    monkeypatch.setattr(neighbors, "_RESULTS", results)
    random = np.random.default_rng(0)
    classes, count = 12, 3
    labels = np.repeat([0, 1, 2, 3, 5, 6, 8, 9], [7, 1, 2, 3, 1, 4, 2, 5])
    x = random.integers(-2, 3, (len(labels), 5)).astype(np.float32)  # exact products, many ties
    with neighbors.in_file(iter([x[:11], x[11:]])) as rows:
        assert isinstance(rows, np.memmap)
        found = neighbors.nearest_wrong_classes(rows, labels, classes=classes, count=count)
    for c in range(classes):
        best: dict[int, float] = {}
        for i, j in itertools.product(np.flatnonzero(labels == c), range(len(x))):
            if labels[j] != c:
                best[labels[j]] = max(best.get(labels[j], -np.inf), float(x[i] @ x[j]))
        expected = sorted(best, key=lambda k: (-best[k], k))[:count]
        assert found[c].tolist() == expected + [-1] * (count - len(expected))


def test_too_few_other_classes_leave_room_in_the_table() -> None:
    x = np.eye(3, dtype=np.float32)
    found = neighbors.nearest_wrong_classes(x, np.array([0, 2, 2]), classes=3, count=2)
    assert found.tolist() == [[2, -1], [-1, -1], [0, -1]]
    every = np.repeat(x, 2, axis=0)  # the images of two classes come before the third
    found = neighbors.nearest_wrong_classes(every, np.repeat([0, 1, 2], 2), classes=3, count=2)
    assert found.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_embeddings_without_room_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    class Full(io.BytesIO):
        write = full

    monkeypatch.setattr(neighbors.tempfile, "TemporaryFile", Full)
    with (
        pytest.raises(UserError, match=r"No space left.*TMPDIR.*lower --config.*images") as error,
        neighbors.in_file(iter([np.eye(2)])),
    ):
        pass
    assert "\n" not in str(error.value)


def composition(**values: Any) -> dict[str, Any]:
    return {f"data__composition__{name}": value for name, value in values.items()}


def built(tmp_path: Path, **changes: Any) -> Any:
    images = small_runs.write_images(tmp_path / "images.npz")
    path = small_runs.write_config(tmp_path / "c.py", images, **changes)
    config, mesh = from_mapping(read_config_file(str(path))), make_mesh()
    dataset = load.load_dataset(config)
    trainer = make_trainer(
        config,
        classes=dataset.classes,
        channels=1,
        train_examples=len(dataset.train.labels),
        mesh=mesh,
    )
    return config, dataset, trainer, mesh


def test_refreshed_where_it_is_due_and_only_there(tmp_path: Path) -> None:
    changes = composition(rule="either", share=1.0, every="4 steps")
    config, dataset, trainer, mesh = built(tmp_path, **changes)
    source = make_batches(config, dataset, trainer, mesh)
    assert [step for step in range(20) if source.begins(step)] == [0, 4, 8, 12, 16]
    state, batches = source.part(trainer.state, 0)
    assert len(list(batches)) == 4
    first = jax.device_get(state.neighbors)
    assert first["classes"].any()
    moved = state.params | {"proxies": jnp.roll(state.params["proxies"], 1, axis=0)}
    state, batches = source.part(state._replace(params=moved), 6)  # a run that resumes
    assert len(list(batches)) == 2
    np.testing.assert_array_equal(first["classes"], state.neighbors["classes"])
    state, batches = source.part(state, 8)
    assert (first["classes"] != jax.device_get(state.neighbors["classes"])).any()


def test_near_classes_are_those_of_the_embedded_images(tmp_path: Path) -> None:
    """The tables depend on the network, the seed and the step, not on the proxies."""
    changes = composition(rule="class", every="4 steps", group=3, images=2)
    config, dataset, trainer, mesh = built(tmp_path, **changes)
    state = trainer.state
    embed = partial(make_embed(trainer.graphdef), *state.evaluated)
    vectors, labels = embed_batches(embed, load.eval_batches(dataset.train, config, mesh))

    def table(step: int, **params: Any) -> np.ndarray:
        objective = state.objective._replace(step=np.int32(step))
        changed = state._replace(objective=objective, params=state.params | params)
        refresh = neighbors.make_refresh(config, dataset, trainer, mesh)
        return jax.device_get(refresh(changed)["classes"])

    first = table(0)
    drawn = embedded_images(labels, seed=config.seed, step=0, count=2)
    assert np.bincount(labels[drawn]).tolist() == [2] * 12
    np.testing.assert_array_equal(
        first,
        neighbors.nearest_wrong_classes(vectors[drawn], labels[drawn], classes=12, count=2),
    )
    np.testing.assert_array_equal(first, table(0, proxies=jnp.zeros_like(state.params["proxies"])))
    assert (first != table(4)).any()  # other images
    mesh = mesh_of(1)
    state = jax.device_put(jax.device_get(state), replicated(mesh))
    np.testing.assert_array_equal(first, table(0))


def test_without_composition_there_is_one_stretch_of_batches(tmp_path: Path) -> None:
    config, dataset, trainer, mesh = built(tmp_path)
    assert neighbors.refresh_every(config, trainer) == 0
    state, batches = make_batches(config, dataset, trainer, mesh).part(trainer.state, 3)
    assert state.neighbors == ()
    assert len(list(batches)) == 17


def test_a_refresh_of_no_step_is_one_line(tmp_path: Path) -> None:
    changes = composition(rule="proxy", every="0.001 epochs")
    config, _, trainer, _ = built(tmp_path, **changes)
    with pytest.raises(UserError, match=r"composition.every='0.001 epochs' is no step"):
        neighbors.refresh_every(config, trainer)


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path: Path) -> None:
    """Twenty steps in float64, batches composed by both relations."""
    images = small_runs.write_images(tmp_path / "images.npz")
    changes = composition(rule="either", share=0.5, group=3, every="4 steps")
    path = small_runs.write_config(
        tmp_path / "c.py", images, **changes, model__compute_dtype="float64"
    )
    states = []
    for count in (1, 8):
        done = small_runs.run(
            path,
            tmp_path / f"run{count}",
            JAX_NUM_CPU_DEVICES=str(count),
            JAX_ENABLE_X64="1",
        )
        assert done.returncode == 0, done.stderr
        states.append(small_runs.final_state(tmp_path / f"run{count}"))
    for name, value in states[0].items():
        if name.startswith(("params", "neighbors")):
            np.testing.assert_allclose(states[1][name], value, atol=1e-9, rtol=1e-7, err_msg=name)

"""The file for Embedding Atlas: its columns, which agree with the evaluation."""

from __future__ import annotations

import importlib.util
import io
import json

import numpy as np
import pytest

import saved
from commands import run
from mmljax.data.load import load_dataset
from mmljax.errors import UserError

pa = pytest.importorskip("pyarrow", reason="pip install 'mmljax[look]' brings PyArrow")
pytest.importorskip("PIL", reason="pip install 'mmljax[look]' brings Pillow")
from pyarrow import parquet  # noqa: E402


@pytest.fixture(scope="module")
def path(saved_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("atlas") / "new" / "atlas.parquet"
    assert run("atlas", saved_run.folder, "--output", path) == 0
    return path


@pytest.fixture(scope="module")
def table(path):
    return parquet.read_table(path)


@pytest.fixture(scope="module")
def dataset(saved_run):
    return load_dataset(saved_run.config)


@pytest.fixture(scope="module")
def vectors(saved_run, dataset):
    """Embeddings of queries and gallery as the trainer's evaluation makes them."""
    splits = dataset.query, dataset.gallery
    step = saved.STEPS[-1]
    return [saved.own_embeddings(saved_run, split, step=step)[0] for split in splits]


def test_schema(path, table):
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "id": "string",
        "split": "string",
        "category": "string",
        "item": "string",
        "hit@1": "bool",
        "average_precision": "float",
        "x": "float",
        "y": "float",
        "thumbnail": "struct<bytes: binary, path: string>",
        "neighbors": "struct<ids: list<element: int64>, distances: list<element: float>>",
    }
    made_from = json.loads(parquet.read_schema(path).metadata[b"mmljax"])
    assert made_from["step"] == saved.STEPS[-1]
    assert made_from["projection"] == "pca"


def test_a_row_per_image_in_order(table, dataset):
    names = np.concatenate([dataset.query.names, dataset.gallery.names])
    assert table["id"].to_pylist() == names.tolist()
    counts = len(dataset.query.names), len(dataset.gallery.names)
    assert table["split"].to_pylist() == ["query"] * counts[0] + ["gallery"] * counts[1]
    labels = np.concatenate([dataset.query.labels, dataset.gallery.labels])
    assert table["item"].to_pylist() == [str(label) for label in labels]


def test_neighbours_are_the_nearest_gallery_rows(table, vectors):
    query, gallery = (x.astype(np.float64) for x in vectors)
    similarity = np.concatenate([query, gallery]) @ gallery.T
    similarity[len(query) :][np.diag_indices(len(gallery))] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    found = table["neighbors"].to_pylist()
    distances = np.array([row["distances"] for row in found])
    expected = 1 - np.take_along_axis(similarity, order, axis=1)
    np.testing.assert_allclose(distances, expected, atol=1e-5)
    ids = np.array([row["ids"] for row in found]) - len(query)
    # Equal up to what rounding may swap: the rows named are as near as the nearest are.
    np.testing.assert_allclose(np.take_along_axis(similarity, ids, axis=1), 1 - expected, atol=1e-5)
    assert all(len(set(row)) == 10 for row in ids.tolist())


def test_hits_and_precision_are_the_queries_own(table, vectors, dataset):
    similarity = vectors[0] @ vectors[1].T
    labels, wanted = dataset.gallery.labels, dataset.query.labels
    queries = len(wanted)
    nearest = labels[similarity.argmax(axis=1)] == wanted
    assert table["hit@1"].to_pylist() == [*nearest.tolist(), *[None] * len(labels)]
    found = table["average_precision"].to_pylist()
    assert found[queries:] == [None] * len(labels)
    for row in range(queries):
        relevant = labels[np.argsort(-similarity[row])] == wanted[row]
        r = int(relevant.sum())
        precisions = [relevant[: k + 1].mean() for k in range(r) if relevant[k]]
        assert found[row] == pytest.approx(sum(precisions) / r, abs=1e-6)


def test_projection_keeps_the_most_variance(table, vectors):
    every = np.concatenate(vectors).astype(np.float64)
    plane = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    singular = np.linalg.svd(every - every.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(plane, axis=0), singular[:2], rtol=1e-4)
    np.testing.assert_allclose(plane.mean(axis=0), 0, atol=1e-5)


def test_thumbnails_are_pictures_of_their_rows(table, dataset):
    from PIL import Image

    for row in (0, len(dataset.query.names) - 1):
        cell = table["thumbnail"][row].as_py()
        assert cell["path"] == table["id"][row].as_py()
        pixels = np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("L"), float)
        stored = dataset.query.images[row][..., 0].astype(float)
        assert np.corrcoef(pixels.ravel(), stored.ravel())[0, 1] > 0.9


def test_command_prints_how_to_open_the_file(saved_run, tmp_path, capsys):
    path = tmp_path / "a.parquet"
    run("atlas", saved_run.folder, "--output", path, "--step", saved.STEPS[0])
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split()[:2] == ["embedding-atlas", str(path)]
    named = shown[-1].split()[3::2]
    assert set(named) <= set(parquet.read_schema(path).names)


def test_wrong_run_and_missing_packages(saved_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the --workdir of"):
        run("atlas", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "umap" or None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        run("atlas", saved_run.folder, "--projection", "umap")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package PIL.*mmljax\[look\]"):
        run("atlas", saved_run.folder)

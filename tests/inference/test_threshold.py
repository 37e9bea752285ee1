"""``mmljax threshold`` and ``search --threshold`` against loops over the run's own embeddings."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pyarrow import parquet

import saved
from commands import run
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference import search
from mmljax.inference.embedding_file import Gallery
from mmljax.inference.threshold import Images, read_report, threshold_report

pytestmark = pytest.mark.usefixtures("loaded_once")


def share(pairs):
    return pytest.approx(sum(pairs) / len(pairs))


def pairs_of(queries, labels, gallery, gallery_labels, *, itself):
    """Similarities of pairs of different items, and of one item."""
    different, matching = [], []
    for i in range(len(queries)):
        for j in range(len(gallery)):
            if not (itself and i == j):
                similarity = float(np.float64(queries[i]) @ np.float64(gallery[j]))
                (matching if labels[i] == gallery_labels[j] else different).append(similarity)
    return different, matching


def test_a_threshold_of_training_items_and_its_rates_on_test_items(saved_run, tmp_path, capsys):
    path = tmp_path / "new" / "t.json"
    flags = ["--chosen-on=train", "--false-match-rate=0.05", "--resamples=50", "--output", path]
    assert run("threshold", saved_run.folder, *flags) == 0
    shown = capsys.readouterr().out
    report = read_report(path)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"threshold {report['threshold']:.5f}, for a false-match rate of 5 %" in shown

    dataset = load.load_dataset(saved_run.config)
    train, query, gallery = (
        saved.own_embeddings(saved_run, getattr(dataset, name), step=5)
        for name in ("train", "query", "gallery")
    )
    chosen, threshold = report["chosen_on"], report["threshold"]
    different, matching = pairs_of(*train, *train, itself=True)
    assert (chosen["different_pairs"], chosen["matching_pairs"]) == (len(different), len(matching))
    assert chosen["false_match_rate"] == share([x >= threshold for x in different])
    assert np.mean([x >= threshold for x in different]) <= 0.05
    assert np.mean([x >= threshold - 2**-15 for x in different]) > 0.05
    assert chosen["false_non_match_rate"] == share([x < threshold for x in matching])

    different, matching = pairs_of(*query, *gallery, itself=False)
    test = report["test"]
    assert (test["classes"], test["queries"], test["gallery"]) == (8, 24, 24)
    rate = test["false_match_rate"]
    assert rate["value"] == share([x >= threshold for x in different])
    assert test["false_non_match_rate"]["value"] == share([x < threshold for x in matching])
    assert report["holds"] == (rate["low"] <= 0.05 <= rate["high"])
    assert report["made_from"]["step"] == 5
    row = report["curve"][4]
    assert row["wanted"] == pytest.approx(0.01)
    assert row["test"]["false_match_rate"] == share([x >= row["threshold"] for x in different])
    assert sum(report["histogram"]["different"]) == len(different)


def test_validation_items_are_no_test_items(saved_run, tmp_path):
    reports = []
    for seed in (0, 0, 1):
        path = tmp_path / f"{len(reports)}.json"
        flags = ["--validation-share=0.4", "--false-match-rate=0.1", f"--seed={seed}"]
        run("threshold", saved_run.folder, *flags, "--resamples=9", "--output", path)
        reports.append(json.loads(path.read_text()))
    chosen, test = reports[0]["chosen_on"], reports[0]["test"]
    assert (chosen["items"], chosen["classes"], test["classes"]) == ("validation", 3, 5)
    assert (chosen["queries"], test["queries"], test["gallery"]) == (9, 15, 15)
    assert reports[0] == reports[1]
    assert reports[0]["threshold"] != reports[2]["threshold"]
    with pytest.raises(UserError, match="0.1 of 8 test items leaves fewer than two"):
        run("threshold", saved_run.folder, "--validation-share=0.1")


def test_a_threshold_of_other_images_need_not_hold():
    """Training pairs of different classes are orthogonal; those of the test are close."""
    apart = Images(np.eye(8, dtype=np.float32), np.arange(8) // 2)
    near = Images(np.sqrt(np.full((6, 4), 0.25, np.float32)), np.arange(6) // 2)
    report = threshold_report(apart, near, false_match_rate=0.1, resamples=20, seed=0)
    assert report["threshold"] == 2**-15
    assert report["test"]["false_match_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert report["holds"] is False
    with pytest.raises(UserError, match="copies of images in several classes"):
        threshold_report(near, apart, false_match_rate=0.9, resamples=20, seed=0)


def test_answers_below_a_threshold_are_left_out():
    import pyarrow as pa

    random = np.random.default_rng(0)
    gallery = np.eye(4, dtype=np.float32)
    ids, labels = pa.array(["a", "b", "c", "d"]), pa.array([0, 1, None, 3])
    opened = Gallery(gallery, None, ids, labels, {})
    queries = np.array([[0.8, 0.6, 0, 0], [0.5, 0.5, 0.5, 0.5], [0, 0, 0.6, -0.8]], np.float32)
    queries = queries[random.permutation(3)]
    table = search.search(opened, np.array(["x", "y", "z"]), queries, k=3, threshold=0.6)
    expected = []
    for name, query in zip("xyz", queries, strict=True):
        order = np.argsort(-(gallery @ query), kind="stable")[:3]
        answers = [(i, float(query[i])) for i in order if query[i] >= np.float32(0.6)]
        for rank, (i, similarity) in enumerate(answers, 1):
            label = None if i == 2 else int(i)
            expected.append((name, rank, pytest.approx(similarity), "abcd"[i], label))
        if not answers:
            expected.append((name, None, pytest.approx(float(query.max())), None, None))
    assert [tuple(row.values()) for row in table.to_pylist()] == expected
    proved = search.search(
        opened, np.array(["x", "y", "z"]), queries, k=3, rescore=4, threshold=0.6
    )
    assert search.count_proved(proved) == (3, 3)  # queries, however many answers are left
    assert table.schema.equals(search.search(opened, np.array(["x"]), queries[:1], k=3).schema)


@pytest.fixture(scope="module")
def gallery(saved_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("gallery") / "gallery.parquet"
    run("embed", saved_run.folder, "--split=gallery", "--output", path)
    return path


def test_queries_of_a_search_without_a_match(saved_run, gallery, tmp_path, capsys):
    path = tmp_path / "t.json"
    run("threshold", saved_run.folder, "--false-match-rate=0.1", "--output", path)
    capsys.readouterr()
    threshold = read_report(path)["threshold"]
    words = ["search", saved_run.folder, "--embeddings", gallery, "--split=query", "--k=4"]

    def answers(*more):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        run(*words, "--output", output, *more)
        return parquet.read_table(output).to_pylist()

    every, found = answers(), answers("--threshold", path)
    expected = []
    for first in range(0, len(every), 4):
        rows = [row for row in every[first : first + 4] if row["similarity"] >= threshold]
        none = every[first] | {"rank": None, "id": None, "label": None}
        expected += rows or [none]
    assert found == expected
    assert answers(f"--threshold={threshold}") == expected
    run(*words, "--threshold=1")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 25
    assert all(line.split()[1] == "-" and "no match" in line for line in lines[1:])


def test_thresholds_that_cannot_be_used(saved_run, gallery, tmp_path):
    words = ["search", saved_run.folder, "--embeddings", gallery, "--split=query", "--k=4"]
    with pytest.raises(UserError, match="--threshold=1.5 is no cosine similarity"):
        run(*words, "--threshold=1.5")
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"format": "mmljax threshold 1"}'):
        bad.write_text(text)
        with pytest.raises(UserError, match=r"bad\.json is not a file of mmljax threshold"):
            run(*words, "--threshold", bad)
    with pytest.raises(UserError, match=r"absent\.json is not a file"):
        run(*words, "--threshold", tmp_path / "absent.json")
    path = tmp_path / "t.json"
    run("threshold", saved_run.folder, "--false-match-rate=0.1", "--step=3", "--output", path)
    with pytest.raises(UserError, match=r"t\.json was made by another network \(step 3, of"):
        run(*words, "--threshold", path)
    for wrong in ("--false-match-rate=0", "--validation-share=1", "--false-match-rate=nan"):
        with pytest.raises(UserError, match="must be above 0 and below 1"):
            run("threshold", saved_run.folder, wrong)

"""Tables of runs: every number of the rows, once, under its run, seed, quantity and objective."""

from __future__ import annotations

import json
import math

import pytest

from mmljax.errors import UserError
from mmljax.runs.reader import load_run_data, read_run, read_runs
from mmljax.runs.table import COLUMNS

pytest.importorskip("pandas", reason="needs pandas")

ROWS = (
    {"step": 0, "kind": "evaluation", "recall@1": 0.25},
    {"step": 1, "kind": "train", "loss": 1.5, "loss/pair": 1.0, "conflict/pair_proxy": None},
    {"step": 1, "kind": "rates", "images_per_second": 100.0, "compilations": 2},
)
CONFIG = {
    "seed": 3,
    "objectives": {"pair": {}, "proxy": {}},
    "combination": {
        "name": "share",
        "embedding_shares": {"pair": 0.8, "proxy": 0.2},
        "proxy_shares": {},
    },
}


def write(folder, rows=ROWS, *, tail="", **changes):
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + tail)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def lines_of(table):
    return [tuple(row) for row in table.itertuples(index=False)]


def test_a_run_is_a_line_per_number_and_its_targets(tmp_path):
    table = read_run(write(tmp_path / "a"))
    assert tuple(table.columns) == COLUMNS
    lines = lines_of(table)
    assert math.isnan(lines[3][-1])
    assert [line[2:] for line in lines[:3] + lines[4:]] == [
        (0, "evaluation", "recall@1", "", 0.25),
        (1, "train", "loss", "", 1.5),
        (1, "train", "loss", "pair", 1.0),
        (1, "rates", "images_per_second", "", 100.0),
        (1, "rates", "compilations", "", 2.0),
        (0, "target", "share_embeddings", "pair", 0.8),
        (0, "target", "share_embeddings", "proxy", 0.2),
    ]
    assert {line[:2] for line in lines} == {("a", 3)}
    assert lines[3][2:-1] == (1, "train", "conflict", "pair_proxy")


def test_a_run_that_is_still_going_is_read_up_to_its_last_whole_line(tmp_path):
    table = read_run(write(tmp_path / "a", tail='{"step": 2, "kind": "train", "loss": 9'))
    assert 9 not in set(table["value"])
    assert table["step"].max() == 1


def test_a_run_without_rows_is_an_empty_table(tmp_path):
    combination = {"name": "fixed"}
    table = read_run(write(tmp_path / "a", rows=(), combination=combination))
    assert (len(table), tuple(table.columns)) == (0, COLUMNS)


def test_only_the_combination_with_targets_has_them(tmp_path):
    combination = CONFIG["combination"] | {"name": "fixed"}
    table = read_run(write(tmp_path / "a", combination=combination))
    assert "target" not in set(table["kind"])


def test_runs_are_labelled_by_name_or_as_one_says(tmp_path):
    paths = [write(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    assert list(read_runs(paths)["run"].unique()) == ["a", "b", "c"]
    table = read_runs({"ours": paths[:2], "theirs": paths[2]})
    found = table.groupby("run")["seed"].unique().map(list).to_dict()
    assert found == {"ours": [0, 1], "theirs": [2]}
    assert len(table) == 3 * len(read_run(paths[0]))


def test_one_seed_twice_under_one_label_is_refused(tmp_path):
    paths = [write(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError, match=r"b is a second run 'x' of seed 3"):
        read_runs({"x": paths})
    with pytest.raises(UserError, match="no run is named"):
        read_runs([])


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.*--workdir of a run"):
        read_run(tmp_path / "none")
    folder = write(tmp_path / "a")
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"a/config.json is no config of a run"):
        read_run(folder)
    with pytest.raises(UserError, match=r"none.config.json.* name the --workdir"):
        load_run_data(tmp_path / "none")


def test_a_run_in_a_bucket_is_read_through_tensorflow(tmp_path):
    """``ram://`` is TensorFlow's own file system in memory, reached as ``gs://`` is."""
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    folder = write(tmp_path / "a", tail='{"torn')
    for name in ("metrics.jsonl", "config.json"):
        with tf.io.gfile.GFile(f"ram://bucket/run/{name}", "w") as file:
            file.write((folder / name).read_text())
    table = read_run("ram://bucket/run/")
    assert set(table["run"]) == {"run"}
    local = read_run(folder).drop(columns="run")
    assert lines_of(table.drop(columns="run").fillna(-1)) == lines_of(local.fillna(-1))


def test_an_address_that_holds_no_run_is_named(tmp_path):
    pytest.importorskip("tensorflow", reason="needs TensorFlow")
    with pytest.raises(UserError, match=r"ram://nowhere/metrics.jsonl cannot be read"):
        read_run("ram://nowhere")

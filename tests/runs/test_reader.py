"""Tables of runs hold each number of the rows once, with its run, seed, quantity and objective."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import mock_store
from mmljax.errors import UserError
from mmljax.runs import writer
from mmljax.runs.reader import COLUMNS, load_run_data, read_run, read_runs, tidy

pytest.importorskip("pandas", reason="needs pandas")

ROWS = (
    {"step": 0, "kind": "evaluation", "recall@1": 0.25},
    {"step": 1, "kind": "train", "loss": 1.5, "loss/pair": 1.0, "conflict/pair_proxy": None},
    {"step": 1, "kind": "rates", "images_per_second": 100.0, "compilations": 2},
)
CONFIG = {
    "seed": 3,
    "objectives": {
        "pair": {"embedding_share": 0.4, "proxy_share": 0.0},
        "proxy": {"embedding_share": 0.1, "proxy_share": 0.0},
    },
    "combination": {"name": "share"},
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
    shares = [line[-1] for line in lines[6:]]
    assert shares == pytest.approx([0.8, 0.2])  # 0.4 and 0.1 of 0.5
    assert [line[2:] for line in lines[:3] + lines[4:]] == [
        (0, "evaluation", "recall@1", "", 0.25),
        (1, "train", "loss", "", 1.5),
        (1, "train", "loss", "pair", 1.0),
        (1, "rates", "images_per_second", "", 100.0),
        (1, "rates", "compilations", "", 2.0),
        (0, "target", "share_embeddings", "pair", shares[0]),
        (0, "target", "share_embeddings", "proxy", shares[1]),
    ]
    assert {line[:2] for line in lines} == {("a", 3)}
    assert lines[3][2:-1] == (1, "train", "conflict", "pair_proxy")


def test_a_run_that_is_still_training_is_read_up_to_its_last_whole_line(tmp_path):
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


def test_runs_are_labelled_by_name_or_explicitly(tmp_path):
    paths = [write(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    assert list(read_runs(paths)["run"].unique()) == ["a", "b", "c"]
    table = read_runs({"ours": paths[:2], "theirs": paths[2]})
    found = table.groupby("run", observed=True)["seed"].unique().map(list).to_dict()
    assert found == {"ours": [0, 1], "theirs": [2]}
    assert len(table) == 3 * len(read_run(paths[0]))


def test_one_seed_twice_under_one_label_is_refused(tmp_path):
    paths = [write(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError, match=r"b is a second run 'x' of seed 3"):
        read_runs({"x": paths})
    with pytest.raises(UserError, match="no run is given"):
        read_runs([])


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.*--workdir of a run"):
        read_run(tmp_path / "none")
    folder = write(tmp_path / "a")
    for contents in ("[]", "null", '{"seed": 1e999}', '{"seed": 9' + "9" * 30 + "}"):
        (folder / "config.json").write_text(contents)
        with pytest.raises(UserError, match=r"a/config.json is not the config of a run"):
            read_run(folder)
    for contents in ("[]", "null"):
        (folder / "config.json").write_text(contents)
        with pytest.raises(UserError, match=r"a/config.json"):
            load_run_data(folder)
    with pytest.raises(UserError, match=r"none.config.json.* give the --workdir"):
        load_run_data(tmp_path / "none")


def test_a_run_in_a_bucket_is_read_as_it_is_now(tmp_path, monkeypatch):
    store = mock_store.make(tmp_path, monkeypatch)
    folder = write(tmp_path / "a", tail='{"torn')
    (store / "bucket/run").mkdir()
    (store / "bucket/run/config.json").write_text((folder / "config.json").read_text())
    (store / "bucket/run/metrics.jsonl").write_text("")
    assert set(read_run("mock://bucket/run")["kind"]) == {"target"}
    (store / "bucket/run/metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    table = read_run("mock://bucket/run/")
    assert set(table["run"]) == {"run"}
    local = read_run(folder).drop(columns="run")
    assert table.drop(columns="run").equals(local)


def test_an_address_that_holds_no_run_is_named(tmp_path, monkeypatch):
    store = mock_store.make(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"run mock://bucket/none does not exist"):
        read_run("mock://bucket/none")
    (store / "bucket/run").mkdir()
    (store / "bucket/run/config.json").write_text("{")
    with pytest.raises(UserError, match=r"^mock://bucket/run/config.json is not the config"):
        read_run("mock://bucket/run")
    with pytest.raises(UserError, match=r"^gs:/bucket/run is .* as the text 'gs://bucket/run'"):
        read_run(Path("gs://bucket/run"))


# Long runs.


def noisy(steps):
    """Rows of a noisy curve with two spikes and a value that is missing for a while."""
    random = np.random.default_rng(0)
    rows = [
        {"step": s, "kind": "train", "loss": float(random.random()), "conflict/a_b": 0.5}
        for s in range(1, steps + 1)
    ]
    rows[steps // 7]["loss"], rows[steps // 3]["loss"] = 9.0, -9.0
    for row in rows[: steps // 2]:
        row["conflict/a_b"] = math.nan
    return rows


def extremes(rows, ranges):
    """Steps of the least and the greatest loss in each of equal ranges of steps; a slow loop."""
    first, last = rows[0]["step"], rows[-1]["step"]
    found = {first, last}
    for k in range(ranges):
        inside = [
            row
            for row in rows
            if k == min(ranges - 1, int((row["step"] - first) * ranges / (last - first)))
        ]
        found.add(min(inside, key=lambda row: row["loss"])["step"])
        found.add(max(inside, key=lambda row: row["loss"])["step"])
    return found


@pytest.mark.parametrize("points", [10, 64, 99])
def test_a_long_curve_keeps_its_extremes_range_by_range(points):
    rows = noisy(500)
    table = tidy(rows, run="a", seed=0, points=points)
    loss = table[table["quantity"] == "loss"]
    assert set(loss["step"]) == extremes(rows, points // 2 - 1)
    assert len(loss) <= points
    value = {row["step"]: row["loss"] for row in rows}
    assert [value[step] for step in loss["step"]] == list(loss["value"])
    assert loss["step"].is_monotonic_increasing


def test_missing_values_of_a_long_curve_stay_missing():
    table = tidy(noisy(500), run="a", seed=0, points=20)
    conflict = table[table["quantity"] == "conflict"]
    early = conflict["step"] < 200
    assert conflict["value"][early].isna().all()
    assert early.sum() >= 3
    assert (conflict["value"][conflict["step"] > 300] == 0.5).all()


def test_a_long_run_is_read_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK", 500)
    rows = [{k: v for k, v in row.items() if v == v} for row in noisy(3000)]
    folder = write(tmp_path / "a", rows=rows)
    table = read_run(folder, points=40)
    loss = table[table["quantity"] == "loss"]
    assert len(loss) <= 40
    steps = dict(zip(loss["step"], loss["value"], strict=True))
    assert steps[1 + 3000 // 7] == 9.0
    assert steps[1 + 3000 // 3] == -9.0
    assert {1, 3000} <= steps.keys()
    assert np.diff([*steps]).max() < 400  # no part of the run is missing
    whole = read_runs([folder], points=None)
    assert len(whole) == sum(len(row) - 2 for row in rows) + 2
    assert list(whole[whole["quantity"] == "loss"]["value"]) == [row["loss"] for row in rows]


def test_columns_of_text_are_categories_and_others_numbers(tmp_path):
    paths = [write(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for table in (read_run(paths[0]), read_runs(paths), read_run(write(tmp_path / "e", rows=()))):
        kinds = {name: str(kind) for name, kind in table.dtypes.items()}
        texts = dict.fromkeys(("run", "kind", "quantity", "name"), "category")
        assert kinds == {"seed": "int64", "step": "int64", "value": "float64", **texts}


def test_a_curve_of_less_than_four_points_is_refused(tmp_path):
    with pytest.raises(UserError, match="points=3"):
        read_run(write(tmp_path / "a"), points=3)


def test_rows_out_of_order_are_sorted(tmp_path):
    rows = [{"step": step, "kind": "train", "loss": float(step)} for step in (3, 1, 2)]
    assert list(tidy(rows, run="a", seed=0)["value"]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 5000, "1e999"])
def test_absurd_numbers_are_infinite(tmp_path, number):
    folder = write(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 2, "kind": "train", "loss": {number}}}\n')
    assert math.isinf(read_run(folder)["value"].abs().max())


@pytest.mark.parametrize("number", ["9" * 400, "9" * 20, "1.0", "1e3", "null", '"2"'])
def test_absurd_steps_are_refused(tmp_path, number):
    folder = write(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {number}, "kind": "train", "loss": 1}}\n')
    with pytest.raises(UserError, match=r"a/metrics.jsonl, line 4 is not a row"):
        read_run(folder)

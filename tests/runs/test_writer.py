"""Rows of metrics survive a kill, JSON stays valid, and results hold where scores come from."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.runs import progress, writer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_reporter(workdir, *, step=0, stream=None, **options):
    options = {"total_steps": 10, "batch_size": 8, **options}
    stream = io.StringIO() if stream is None else stream
    return writer.Reporter(workdir, start_step=step, stream=stream, **options)


def write_steps(workdir, steps, *, step=0):
    reporter = open_reporter(workdir, step=step)
    for s in steps:
        reporter.train(s, {"loss": 1 / s, "loss/pair": np.float32(0.1) * s})
    reporter.close()


def strict(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


# Rows.


def test_rows_come_back_as_they_were_written(tmp_path):
    reporter = open_reporter(tmp_path / "new" / "run")
    reporter.evaluation(0, {"recall@1": 0.25, "queries": 7})
    reporter.train(1, {"loss/pair": np.float32(0.1), "weight/pair": np.array(2.0)})
    reporter.close()
    assert writer.read_metrics(tmp_path / "new" / "run") == [
        {"step": 0, "kind": "evaluation", "recall@1": 0.25, "queries": 7},
        {"step": 1, "kind": "train", "loss/pair": float(np.float32(0.1)), "weight/pair": 2.0},
    ]


def test_rows_are_on_disk_before_the_reporter_closes(tmp_path):
    reporter = open_reporter(tmp_path)
    reporter.train(1, {"loss": 3.0})
    assert [row["loss"] for row in writer.read_metrics(tmp_path)] == [3.0]
    reporter.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_stays_valid_json_and_reads_as_nan(tmp_path, value):
    reporter = open_reporter(tmp_path)
    reporter.train(1, {"loss": value, "fine": 1.5})
    reporter.close()
    (line,) = (tmp_path / writer.METRICS).read_text().splitlines()
    assert strict(line) == {"step": 1, "kind": "train", "loss": None, "fine": 1.5}
    (row,) = writer.read_metrics(tmp_path)
    assert math.isnan(row["loss"])
    assert row["fine"] == 1.5


def test_a_resumed_run_drops_what_it_computes_again_and_nothing_else(tmp_path):
    write_steps(tmp_path, range(1, 5))
    before = (tmp_path / writer.METRICS).read_bytes()
    write_steps(tmp_path, range(5, 8), step=4)  # killed at 7, last checkpoint at 4
    write_steps(tmp_path, [5, 6], step=4)
    assert (tmp_path / writer.METRICS).read_bytes().startswith(before)
    assert [row["step"] for row in writer.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_file_equals_an_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole", range(1, 9))
    write_steps(tmp_path / "broken", range(1, 7))
    with (tmp_path / "broken" / writer.METRICS).open("a") as file:
        file.write('{"step": 7, "kind": "tr')  # killed in the middle of a write
    write_steps(tmp_path / "broken", range(4, 9), step=3)
    whole, broken = (tmp_path / name / writer.METRICS for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()


def test_the_untrained_score_survives_a_resume(tmp_path):
    reporter = open_reporter(tmp_path)
    reporter.evaluation(0, {"recall@1": 0.1})
    reporter.pretrained({"recall@1": 0.3})
    before = reporter.before_training
    assert [row["recall@1"] for row in before.values()] == [0.1, 0.3]
    reporter.close()
    resumed = open_reporter(tmp_path, step=2)
    assert resumed.before_training == before
    resumed.close()
    assert [row["step"] for row in writer.read_metrics(tmp_path)] == [0, 0]


def test_a_run_that_starts_again_keeps_no_row(tmp_path):
    reporter = open_reporter(tmp_path)
    reporter.evaluation(0, {"recall@1": 0.1})
    reporter.train(1, {"loss": 1.0})
    reporter.close()
    open_reporter(tmp_path, step=0).close()
    assert writer.read_metrics(tmp_path) == []


def test_a_row_that_is_being_written_is_not_read(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / writer.METRICS).open("a") as file:
        file.write('{"step": 3')
    assert [row["step"] for row in writer.read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("line", ["{broken", "3", '{"kind": "train"}'])
def test_damage_in_the_middle_is_named_and_left_alone(tmp_path, line):
    path = tmp_path / writer.METRICS
    path.write_text(f'{{"step": 1, "kind": "train"}}\n{line}\n{{"step": 3, "kind": "train"}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a row"):
        open_reporter(tmp_path, step=3)
    assert path.read_bytes() == before


def test_a_kill_while_rows_are_dropped_leaves_the_old_file(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 7))
    before = (tmp_path / writer.METRICS).read_bytes()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_reporter(tmp_path, step=2)
    assert (tmp_path / writer.METRICS).read_bytes() == before


def test_metrics_of_no_run(tmp_path):
    with pytest.raises(UserError, match="--workdir"):
        writer.read_metrics(tmp_path)


def test_a_reporter_that_is_not_enabled_does_nothing(tmp_path):
    stream = io.StringIO()
    reporter = open_reporter(tmp_path / "run", stream=stream, enabled=False)
    reporter.train(1, {"loss": 1.0})
    reporter.evaluation(1, {"recall@1": 0.5})
    reporter.progress(seconds=1.0, steps=1, waited=0.0, compilations=0)
    reporter.close()
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


def test_rates_are_rows_of_their_own(tmp_path):
    reporter = open_reporter(tmp_path)
    reporter.train(4, {"loss": 1.0})
    reporter.progress(seconds=2.0, steps=4, waited=0.5, compilations=7)
    reporter.close()
    assert writer.read_metrics(tmp_path)[1:] == [
        {
            "step": 4,
            "kind": "rates",
            "images_per_second": 16.0,
            "input_wait": 0.25,
            "compilations": 7,
        }
    ]


def test_loggers_get_the_same_scalars_and_are_closed(tmp_path):
    class Kept(list):
        def scalars(self, step, values):
            self.append((step, dict(values)))

        def close(self):
            self.append("closed")

    kept = Kept()
    reporter = open_reporter(tmp_path, loggers=[kept])
    reporter.train(5, {"loss/pair": np.float32(0.5)})
    reporter.evaluation(5, {"recall@1": 0.75})
    reporter.close()
    reporter.close()
    assert kept == [(5, {"loss/pair": 0.5}), (5, {"evaluation/recall@1": 0.75}), "closed"]


def test_a_long_file_is_truncated_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK", 100)
    reporter = open_reporter(tmp_path)
    for step in range(1, 301):
        reporter.train(step, {"loss": step / 7})
        if step % 100 == 0:
            reporter.evaluation(step, {"recall@1": step / 1000, "mrr": math.nan})
    reporter.close()
    lines = (tmp_path / writer.METRICS).read_text().splitlines()
    resumed = open_reporter(tmp_path, step=250)
    assert (tmp_path / writer.METRICS).read_text().splitlines() == lines[:252]
    assert {step: row["recall@1"] for step, row in resumed.evaluations.items()} == {
        100: 0.1,
        200: 0.2,
    }
    assert all(math.isnan(row["mrr"]) for row in resumed.evaluations.values())
    resumed.close()


def test_rows_of_one_kind_are_read_alone(tmp_path):
    reporter = open_reporter(tmp_path)
    for step in (1, 2):
        reporter.train(step, {"loss": 1.0, "loss/evaluation": 2.0})
        reporter.evaluation(step, {"recall@1": 0.5})
    reporter.close()
    rows = writer.read_metrics(tmp_path, kind="evaluation")
    assert [(row["step"], row["kind"]) for row in rows] == [(1, "evaluation"), (2, "evaluation")]
    with (tmp_path / writer.METRICS).open("a") as file:
        file.write('{"step": 3, "kind": "evaluation"\n')
    with pytest.raises(UserError, match="line 5 is not a row"):
        writer.read_metrics(tmp_path, kind="evaluation")


def test_evaluations_of_this_process_need_no_file(tmp_path):
    reporter = open_reporter(tmp_path)
    reporter.evaluation(3, {"recall@1": np.float32(0.5), "mrr": math.inf})
    (tmp_path / writer.METRICS).rename(tmp_path / "away")
    row = reporter.evaluations[3]
    assert (row["step"], row["recall@1"]) == (3, 0.5)
    assert math.isnan(row["mrr"])
    reporter.close()


def test_a_deleted_workdir_is_named(tmp_path):
    reporter = open_reporter(tmp_path / "run")
    reporter.train(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "run")
    reporter.train(2, {"loss": 1.0})  # into a file that has no name any more
    with pytest.raises(UserError, match="run was deleted or moved during training"):
        reporter.progress(seconds=1.0, steps=2, waited=0.0, compilations=0)
    reporter.close()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    reporter = open_reporter(tmp_path)
    reporter.train(1, {"loss": 1.0})
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="No space left on device.*make room.*resumes"):
        reporter.progress(seconds=1.0, steps=1, waited=0.0, compilations=0)
    reporter.close()


# Progress.


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_progress_in_a_log_file_is_lines(tmp_path, clock):
    stream = io.StringIO()
    reporter = open_reporter(tmp_path, step=60, total_steps=600, batch_size=96, stream=stream)
    reporter.train(90, {"loss": 3.214159})
    clock.seconds += 15.0  # 30 steps, of which the last 20 took 4 s
    reporter.progress(seconds=4.0, steps=20, waited=0.08, compilations=31)
    reporter.evaluation(90, {"recall@10": 0.5, "recall@1": 0.25, "map@r": 0.125, "queries": 3})
    reporter.close()
    assert stream.getvalue() == (
        "step 90/600  loss 3.214  images/s 480  input wait 2%  compilations 31  eta 0:04:15\n"
        "step 90/600  Recall@1 25.0%  Recall@10 50.0%  MAP@R 12.5%\n"
    )


def test_progress_in_a_terminal_is_a_bar_that_lines_do_not_break(tmp_path):
    stream = Terminal()
    reporter = open_reporter(tmp_path, step=2, stream=stream)
    reporter.train(6, {"loss": 0.5})
    reporter.progress(seconds=2.0, steps=4, waited=1.0, compilations=3)
    reporter.evaluation(6, {"recall@1": 1.0})
    reporter.close()
    shown = stream.getvalue().replace("\n", "\r").split("\r")
    assert any(s.startswith(" 20%") and "2/10" in s for s in shown)
    bars = [s for s in shown if "6/10" in s and "loss=0.5" in s]
    assert bars
    facts = ("images/s=16", "input wait=50%", "compilations=3")
    assert all(fact in s for s in bars for fact in facts)
    assert "step 6/10  Recall@1 100.0%" in shown


# Results.


SESSIONS = [
    {"start_step": 0, "last_step": 5, "seconds": 2.5},
    {"start_step": 5, "last_step": 10, "seconds": 1.25},
]


def write_results(workdir, **changes):
    options = {"scores": {"recall@1": 0.5}, "config": {"seed": 1}, "sessions": SESSIONS}
    return writer.write_results(workdir, **options | changes)


def test_results_hold_scores_config_and_sessions(tmp_path):
    returned = write_results(
        tmp_path,
        scores={"recall@1": np.float32(0.5), "broken": math.nan},
        config={"seed": 1, "data": {"crop": (0.5, 1.0)}},
        extra={"untrained": None, "checkpoint": tmp_path / "checkpoints"},
    )
    results = strict((tmp_path / "results.json").read_text())
    assert results == returned == writer.read_results(tmp_path)
    assert results["scores"] == {"recall@1": 0.5, "broken": None}
    assert results["config"] == {"seed": 1, "data": {"crop": [0.5, 1.0]}}
    assert results["sessions"] == SESSIONS
    assert results["seconds"] == 3.75
    assert results["untrained"] is None
    assert results["checkpoint"] == str(tmp_path / "checkpoints")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_results_of_equal_content_are_equal_files(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_results(tmp_path / name)
    a, b = ((tmp_path / name / "results.json").read_bytes() for name in "ab")
    assert a == b


def test_results_are_replaced_whole(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path)
    assert (tmp_path / "results.json").read_text() == "old"


@pytest.mark.parametrize("contents", [None, "", "[]", "{}", '{"scores": 3}', "\xff", "[" * 100_000])
def test_results_without_scores_are_none(tmp_path, contents):
    if contents is not None:
        (tmp_path / "results.json").write_bytes(contents.encode("latin-1"))
    assert writer.read_results(tmp_path) is None


# The table.

SCORES = {
    "step": 600,
    "kind": "evaluation",
    "recall@10": 0.964,
    "recall@1": 0.9008,
    "r_precision": 0.5,
    "map@r": 0.375,
    "queries": 14218.0,
    "gallery": 12612.0,
    "lone_queries": 2.0,
    "chance": 0.0004,
}


def test_recall_table_with_all_columns():
    untrained = {"recall@1": 0.05, "recall@10": 0.1, "r_precision": 0.02}
    assert writer.recall_table(
        {"trained": SCORES, "untrained": untrained, "pretrained": None}
    ).splitlines() == [
        "%            trained  untrained  chance",
        "Recall@1        90.1        5.0     0.0",
        "Recall@10       96.4       10.0       -",
        "R-precision     50.0        2.0       -",
        "MAP@R           37.5          -       -",
        "14218 queries, 12612 gallery images; 2 queries without a match are excluded from all "
        "scores",
    ]


def test_scores_of_a_variant_are_rows_of_their_own():
    scores = {
        "recall@10/distractors": 0.2,
        "map@r": 0.5,
        "recall@1": 0.75,
        "tie_rate/distractors": 0,
    }
    scores |= {"recall@2/distractors": 0.1, "distractors": 9, "queries": 3, "gallery": 4}
    scores["mrr/query_expansion"] = 0.625
    assert writer.recall_table({"trained": scores | {"lone_queries": 1}}).splitlines() == [
        "%                       trained",
        "Recall@1                   75.0",
        "MAP@R                      50.0",
        "Recall@2, distractors      10.0",
        "Recall@10, distractors     20.0",
        "MRR, query expansion       62.5",
        "3 queries, 4 gallery images and 9 distractors; 1 queries without a match are excluded "
        "from all scores",
    ]


def test_recall_table_reports_ties_if_there_are_any():
    ties = {"mrr": 0.5, "tie_rate": 0.25, "recall_expected@1": 0.125, "recall_optimistic@1": 1.0}
    assert writer.recall_table({"trained": {"recall@1": 0.0, **ties}}).splitlines() == [
        "%         trained",
        "Recall@1      0.0",
        "MRR          50.0",
        "25.0 % of the queries have ties, scored here in their worst order; "
        "Recall@1 in the mean order: 12.5",
    ]
    none = writer.recall_table({"trained": {"recall@1": 0.0, **ties, "tie_rate": 0.0}})
    assert "ties" not in none


def test_recall_table_of_scores_alone():
    assert writer.recall_table({"trained": {"recall@1": 1.0}}).splitlines() == [
        "%         trained",
        "Recall@1    100.0",
    ]


def test_sizes_are_in_rising_order_and_all_dimensions_last():
    scores = {"recall@1": 0.9, "recall@10": 0.99, "map@r": 0.5, "queries": 7.0}
    cut = {"recall@1@128": 0.8, "map@r@128": 0.375, "recall@1@64": 0.7, "map@r@64": math.nan}
    assert writer.size_table({**scores, **cut}) == [
        ["dimensions", "Recall@1", "MAP@R"],
        ["64", "70.0", "-"],
        ["128", "80.0", "37.5"],
        ["all", "90.0", "50.0"],
    ]
    assert writer.size_table(scores) == []
    assert "128" not in writer.recall_table({"trained": {**scores, **cut}})


# Imports.


def test_reading_a_run_needs_neither_an_accelerator_nor_the_extras():
    code = (
        "import sys, mmljax.runs.writer; "
        "print([m for m in ('jax', 'matplotlib', 'tensorboardX', 'tqdm', 'tensorflow') "
        "if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"

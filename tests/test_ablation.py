"""The configs, choices and intervals of the ablation study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation, ablation_table
from mmljax.training.trainer import make_objective


def record(row: str, seed: int, recall: float, *, tuning: bool, setting: dict | None = None):
    return {
        "row": row,
        "group": "single",
        "tuning": tuning,
        "setting": setting or {},
        "seed": seed,
        "recall@1": recall,
        "map@r": recall / 2,
    }


def test_every_setting_of_every_row_is_a_config_that_builds() -> None:
    chosen: dict = {}
    for stage in ablation.STAGES:
        rows = ablation.rows_of(stage, chosen)
        for name, row in rows.items():
            for setting in row.settings:
                config = ablation.make_config(row, setting, seed=3, steps=7)
                assert config.seed == 3
                make_objective(config, classes=9)
            chosen[name] = row.settings[0]
    assert len(chosen) > 30


def test_the_best_setting_by_validation_is_chosen_whatever_the_test_says() -> None:
    records = [
        record("a", 100, 0.5, tuning=True, setting={"x": 1}),
        record("a", 100, 0.6, tuning=True, setting={"x": 2}),
        record("b", 100, 0.55, tuning=True),
        record("b", 0, 0.9, tuning=False),
        record("a", 0, 0.9, tuning=False, setting={"x": 1}),
    ]
    assert ablation_table.choose(records) == {"a": {"x": 2}, "b": {}}
    assert ablation_table.best_single(records) == "a"


def test_the_interval_is_students_of_the_paired_differences() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array([0.7, 0.72, 0.69, 0.75, 0.71]), np.array([0.69, 0.73, 0.66, 0.7, 0.7])
    one, other = (
        {seed: record("r", seed, value, tuning=False) for seed, value in enumerate(values)}
        for values in (a, b)
    )
    interval = stats.ttest_rel(100 * a, 100 * b).confidence_interval(0.95)
    expected = f"{100 * np.mean(a - b):+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
    assert ablation_table.difference(one, other, "recall@1") == expected


def test_the_table_holds_what_was_tested(tmp_path: Path) -> None:
    records = [record("a", 100, 0.5, tuning=True), record("b", 100, 0.4, tuning=True)]
    for seed in range(5):
        records.append(record("a", seed, 0.5 + seed / 100, tuning=False))
        records.append(record("b", seed, 0.4 + seed / 100, tuning=False, setting={"c.d": 1.0}))
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "results.jsonl").write_text(text)
    lines = ablation_table.markdown(tmp_path).splitlines()
    assert lines[-2] == "| a |  | 52.0 ± 1.6 | 0 | 26.0 ± 0.8 | 0 |"
    assert lines[-1].startswith("| b | d 1.0 | 42.0 ± 1.6 | -10.0 [-10.0, -10.0] | 21.0 ± 0.8 |")

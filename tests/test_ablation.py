"""The configs, choices and intervals of the ablation study."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablation, ablation_table, matryoshka, pretrained_ablation
from mmljax.durations import RunSize
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
                make_objective(config, classes=9, size=RunSize(32, 320, 7))
            chosen[name] = row.settings[0]
    assert len(chosen) > 30


@pytest.mark.parametrize("data", pretrained_ablation.SETS)
def test_every_setting_of_the_study_on_a_pretrained_network_builds(data: str) -> None:
    own = pretrained_ablation.SETS[data]
    chosen: dict = {}
    scores: dict = {}
    for stage in pretrained_ablation.STAGES:
        for name, row in pretrained_ablation.ROWS[stage](chosen, scores).items():
            for setting in row.settings[:: max(len(row.settings) // 3, 1)]:
                for recipe in ("heads", "finetune"):
                    config = pretrained_ablation.make_config(recipe, row, setting, own, seed=3)
                    assert config.data.images_per_class == own["data.images_per_class"]
                    make_objective(config, classes=9, size=RunSize(32, 320, 7))
            chosen[name], scores[name] = row.settings[-1], 0.01 * len(scores)
    assert len(chosen) > 30
    best = pretrained_ablation.batch_rows(chosen, scores)["all, share, batches proxy"]
    config = pretrained_ablation.make_config("heads", best, best.settings[0], own, seed=0)
    assert config.data.composition.rule == "proxy"
    assert config.proxies_init == "class_means"
    assert set(config.objectives) == {"pair", "proxy", "separation"}


def test_tuning_set_has_training_classes_only(tmp_path: Path) -> None:
    source = tmp_path / "features"
    source.mkdir()
    labels = np.repeat(np.arange(8), 3).astype(np.int32)
    rows = np.random.default_rng(0).normal(size=(3, 24, 5)).astype(np.float32)
    np.save(source / "train.npy", rows)
    np.savez(
        source / "images.npz",
        **{"train labels": labels, "train names": labels.astype(str), "query labels": labels},
    )
    identity = {"classes": 8, "views": {"train": 3, "query": 1, "gallery": 1}, "features": 5}
    (source / "features.json").write_text(json.dumps(identity))
    pretrained_ablation.make_tuning_set(source, tmp_path / "tuning")
    found = json.loads((tmp_path / "tuning" / "features.json").read_text())
    assert found == {"classes": 6, "views": {"train": 3, "query": 1}, "features": 5}
    np.testing.assert_array_equal(np.load(tmp_path / "tuning" / "train.npy"), rows[:, :18])
    np.testing.assert_array_equal(np.load(tmp_path / "tuning" / "query.npy"), rows[:1, 18:])
    images = np.load(tmp_path / "tuning" / "images.npz")
    assert images["query labels"].tolist() == [6, 6, 6, 7, 7, 7]


@pytest.mark.parametrize("name", ["foods", "groceries", "omniglot"])
def test_the_page_shows_the_results_that_are_kept(name: str) -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "ablation.md").read_text().splitlines()
    table = ablation_table.markdown(root / "benchmarks" / "results" / name).splitlines()
    assert len(table) > 16
    assert [line for line in table[2:] if line not in page] == []


def test_a_setting_is_judged_by_its_mean_over_the_seeds() -> None:
    records = [
        record("a", 100, 0.9, tuning=True, setting={"x": 1}),
        record("a", 101, 0.5, tuning=True, setting={"x": 1}),
        record("a", 100, 0.75, tuning=True, setting={"x": 2}),
        record("a", 101, 0.74, tuning=True, setting={"x": 2}),
    ]
    assert ablation_table.choose(records) == {"a": {"x": 2}}
    assert ablation_table.validation_scores(records) == {"a": pytest.approx(0.3725)}


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
        records.append(record("b", seed, 0.4 + seed / 100, tuning=False, setting={"c.d": 1.5}))
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "results.jsonl").write_text(text)
    lines = ablation_table.markdown(tmp_path).splitlines()
    assert lines[-2] == "| a |  | 52.0 ± 1.6 | 0 | 26.0 ± 0.8 | 0 |  |"
    assert lines[-1].startswith("| b | d 1.5 | 42.0 ± 1.6 | -10.0 [-10.0, -10.0] | 21.0 ± 0.8 |")


@pytest.mark.parametrize("weights", matryoshka.ROWS.values())
def test_every_row_of_the_study_of_fewer_dimensions_builds(weights: tuple[float, ...]) -> None:
    options = argparse.Namespace(set="foods", features=Path("f"), size=64, rate=1e-3)
    config = matryoshka.make_config(options, weights, seed=3)
    assert (config.seed, config.optimizer.proxies.learning_rate) == (3, 1e-2)
    objective = make_objective(config, classes=9, size=RunSize(32, 320, 400))
    assert objective.prefixes == ((8, 16, 32, 64), weights or (1, 1, 1, 1))


def test_cells_of_a_size_are_compared_by_seed() -> None:
    plain = {seed: {"recall@1": 0.5 + 0.1 * seed} for seed in range(2)}
    cut = {seed: {"recall@1": 0.6 + 0.1 * seed, "recall@1@8": 0.4 + 0.1 * seed} for seed in plain}
    found = matryoshka.cells(cut, plain, "recall@1@8")
    assert found == ["45.0", "-10.0 [-10.0, -10.0]", "-20.0 [-20.0, -20.0]"]

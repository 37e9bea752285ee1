"""The schema is strict: unknown, missing and ill-typed keys are named, with the nearest name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from mmljax import config as config_lib
from mmljax.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


def load(name: str) -> Any:
    """The ConfigDict of a file in configs/."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(f"configs_{name}", ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fills_the_schema(name: str) -> None:
    config = config_lib.from_mapping(load(name))
    assert config_lib.from_mapping(config_lib.to_dict(config)) == config


def test_unknown_key_names_the_nearest() -> None:
    mapping = load("common").to_dict()
    mapping["optimizer"]["shedule"] = "cosine"
    with pytest.raises(UserError, match=r"--config.optimizer.shedule .*'schedule'"):
        config_lib.from_mapping(mapping)


def test_missing_key_is_named() -> None:
    mapping = load("common").to_dict()
    del mapping["data"]["flip"]
    with pytest.raises(UserError, match=r"--config.data lacks flip"):
        config_lib.from_mapping(mapping)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", -1, r"--config.seed must be from 0"),
        ("seed", "0", r"--config.seed must be of type int, found '0'"),
        ("seed", True, r"--config.seed must be of type int, found True"),
        ("data.flip", 1, r"--config.data.flip must be of type bool"),
        ("data.crop_scale", (0.1,), r"--config.data.crop_scale must hold 2 values"),
        ("data.crop_scale", 0.1, r"--config.data.crop_scale must be a tuple"),
        ("data.crop_scale", ("a", 1), r"--config.data.crop_scale must be of type float"),
        ("evaluation.recall_at", (1, 2.5), r"recall_at must be of type int"),
        ("evaluation.recall_at", (), r"recall_at must hold one or more values"),
        ("evaluation.recall_at", (1, 0), r"recall_at must be at least 1, found 0"),
        ("data.batch_size", 0, r"--config.data.batch_size must be at least 1, found 0"),
        ("data.test_share", 1.5, r"test_share must be at least 0 and at most 1, found 1.5"),
        ("optimizer.epsilon", 0, r"epsilon must be above 0, found 0"),
        ("optimizer.clip_norm", float("nan"), r"clip_norm must be finite, found nan"),
        ("losses.circle.gamma", float("inf"), r"losses.circle.gamma must be finite, found inf"),
        ("optimizer", 3, r"--config.optimizer must be a group of keys"),
        ("objectives.pair.loss", 3, r"--config.objectives.pair.loss must be of type str"),
        ("combination.weights", 3, r"--config.combination.weights must be a group"),
    ],
)
def test_ill_typed_value_is_named(path: str, value: Any, message: str) -> None:
    mapping = load("common").to_dict()
    group = mapping
    *parents, last = path.split(".")
    for name in parents:
        group = group[name]
    group[last] = value
    with pytest.raises(UserError, match=message):
        config_lib.from_mapping(mapping)


def test_integers_do_as_floats_and_lists_as_tuples() -> None:
    mapping = load("common").to_dict()
    mapping["optimizer"]["b1"] = 0
    mapping["data"]["crop_scale"] = [1, 1]
    config = config_lib.from_mapping(mapping)
    assert (config.optimizer.b1, config.data.crop_scale) == (0.0, (1.0, 1.0))
    assert isinstance(config.optimizer.b1, float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("600 steps", 600), ("1 step", 1), ("2.5 epochs", 50), ("640 examples", 20), ("10%", 30)],
)
def test_durations(text: str, expected: int) -> None:
    size = config_lib.RunSize(batch_size=32, train_examples=640, total_steps=300)
    assert config_lib.steps(text, size, key="config.duration") == expected


@pytest.mark.parametrize("text", ["", "600", "six steps", "-3 steps", "3 hours", "3 steps 2"])
def test_bad_duration_is_named(text: str) -> None:
    with pytest.raises(UserError, match="--config.optimizer.warmup"):
        config_lib.steps(text, config_lib.RunSize(1, 1), key="config.optimizer.warmup")


def test_percentage_needs_a_total() -> None:
    with pytest.raises(UserError, match="--config.duration='10%'"):
        config_lib.steps("10%", config_lib.RunSize(1, 1), key="config.duration")


def test_fingerprint_follows_every_value() -> None:
    mapping = load("common").to_dict()
    before = config_lib.from_mapping(mapping)
    mapping["losses"]["proxy_anchor"]["alpha"] = 33.0
    after = config_lib.from_mapping(mapping)
    assert config_lib.fingerprint(before) != config_lib.fingerprint(after)
    assert config_lib.differences(config_lib.to_dict(before), config_lib.to_dict(after)) == [
        "config.losses.proxy_anchor.alpha: 32.0 -> 33.0"
    ]

"""The schema is strict: unknown, missing and ill-typed keys are named, with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmljax import config as config_lib
from mmljax import durations
from mmljax.errors import UserError
from mmljax.text import differences

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fills_the_schema(name: str) -> None:
    config = config_lib.load_config(name)
    assert config_lib.from_mapping(config_lib.to_dict(config)) == config


def test_unknown_key_names_the_nearest() -> None:
    mapping = config_lib.default_config().to_dict()
    mapping["optimizer"]["shedule"] = "cosine"
    with pytest.raises(UserError, match=r"--config.optimizer.shedule .*'schedule'"):
        config_lib.from_mapping(mapping)


def test_missing_key_is_named() -> None:
    mapping = config_lib.default_config().to_dict()
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
        ("model.matryoshka", (64, 0), r"matryoshka must be at least 1, found 0"),
        ("model.matryoshka", 64, r"matryoshka must be of type tuple|matryoshka must be a tuple"),
        ("evaluation.recall_at", (1, 0), r"recall_at must be at least 1, found 0"),
        ("data.batch_size", 0, r"--config.data.batch_size must be at least 1, found 0"),
        ("data.composition.share", 1.5, r"composition.share must be at least 0 and at most 1"),
        ("data.composition.group", 0, r"composition.group must be at least 1, found 0"),
        ("data.composition.images", 0, r"composition.images must be at least 1, found 0"),
        ("data.test_share", 1.5, r"test_share must be at least 0 and at most 1, found 1.5"),
        ("optimizer.epsilon", 0, r"epsilon must be above 0, found 0"),
        ("optimizer.clip_norm", float("nan"), r"clip_norm must be finite, found nan"),
        (
            "objectives.pair.params",
            {"alpha": float("inf")},
            r"pair.params.alpha must be finite, found",
        ),
        ("optimizer", 3, r"--config.optimizer must be a group of keys"),
        ("objectives.pair.loss", 3, r"--config.objectives.pair.loss must be of type str"),
        ("combination.params", 3, r"--config.combination.params must be a group"),
        ("objectives", {"a b": {"loss": "circle"}}, r"a name has letters, digits, _ and -"),
        ("objectives", {"a": {}}, r"--config.objectives.a lacks loss"),
        ("objectives.pair.weight", -1.0, r"pair.weight must be at least 0, found -1"),
    ],
)
def test_ill_typed_value_is_named(path: str, value: Any, message: str) -> None:
    mapping = config_lib.default_config().to_dict()
    group = mapping
    *parents, last = path.split(".")
    for name in parents:
        group = group[name]
    group[last] = value
    with pytest.raises(UserError, match=message):
        config_lib.from_mapping(mapping)


def test_integers_do_as_floats_and_lists_as_tuples() -> None:
    mapping = config_lib.default_config().to_dict()
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
    size = durations.RunSize(batch_size=32, train_examples=640, total_steps=300)
    assert durations.steps(text, size, key="config.duration") == expected


@pytest.mark.parametrize("text", ["", "600", "six steps", "-3 steps", "3 hours", "3 steps 2"])
def test_bad_duration_is_named(text: str) -> None:
    with pytest.raises(UserError, match="--config.optimizer.warmup"):
        durations.steps(text, durations.RunSize(1, 1), key="config.optimizer.warmup")


@pytest.mark.parametrize("text", ["9" * 400 + " steps", "3000000000 examples"])
def test_a_duration_beyond_32_bits_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--config.duration is .* beyond 2e.09; lower it"):
        durations.steps(text, durations.RunSize(1, 1), key="config.duration")


def test_percentage_needs_a_total() -> None:
    with pytest.raises(UserError, match="--config.duration='10%'"):
        durations.steps("10%", durations.RunSize(1, 1), key="config.duration")


def test_fingerprint_follows_every_value() -> None:
    mapping = config_lib.default_config().to_dict()
    before = config_lib.from_mapping(mapping)
    mapping["objectives"]["proxy"]["params"]["alpha"] = 33.0
    after = config_lib.from_mapping(mapping)
    assert config_lib.fingerprint(before) != config_lib.fingerprint(after)
    assert differences(config_lib.to_dict(before), config_lib.to_dict(after), prefix="config") == [
        "config.objectives.proxy.params.alpha: None -> 33.0"
    ]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("duration=7 steps", "duration", "7 steps"),
        ("model.pretrained=12", "model.pretrained", "12"),
        ("data.flip=false", "data.flip", False),
        ("data.crop_scale=(0.5, 1)", "data.crop_scale", (0.5, 1.0)),
        ("evaluation.recall_at=1,2", "evaluation.recall_at", (1, 2)),
        ("optimizer.head.learning_rate=3e-4", "optimizer.head.learning_rate", 3e-4),
        ("objectives.pair.params.alpha=3", "objectives.pair.params", {"alpha": 3}),
        ("objectives.pair.params.ks=(1, 2)", "objectives.pair.params", {"ks": (1, 2)}),
        ("objectives.pair.params.ks=[4]", "objectives.pair.params", {"ks": (4,)}),
        ("objectives.proxy.least_margin=0.1", "objectives.proxy.least_margin", 0.1),
        ("objectives.proxy.least_margin=None", "objectives.proxy.least_margin", None),
        ("objectives.pair.mining_params={}", "objectives.pair.mining_params", {}),
        ("objectives.extra.loss=circle", "objectives.extra.loss", "circle"),
    ],
)
def test_overrides(override: str, path: str, value: Any) -> None:
    config: Any = config_lib.load_config("quickstart", [override])
    for name in path.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batchsize=3", r"--config.data.batchsize is unknown.*'batch_size'"),
        ("data.batch_size=many", r"--config.data.batch_size must be of type int, found 'many'"),
        ("data.batch_size", r"must have the form --config.KEY=VALUE"),
        ("seed.x=3", r"--config.seed.x is unknown: --config.seed is a value"),
        ("objectives.extra.weight=3", r"--config.objectives.extra lacks loss"),
        ("objectives.pair.params.ks=(1, 2.5)", r"pair.params.ks must be of type int, found 2.5"),
        ("objectives.proxy.least_margin=-1", r"proxy.least_margin must be at least 0, found -1"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_lib.load_config("quickstart", [override])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("def get_config(): pass", r"get_config\(\) must return the config, returned None"),
        ("x = 1", r"defines no get_config\(\)"),
        ("\n\nraise KeyError('no')", r"mine.py, line 3: KeyError: 'no'"),
        ("def get_config(:", r"mine.py, line 1: SyntaxError"),
    ],
)
def test_a_config_file_that_fails_is_named(tmp_path: Path, program: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(program)
    with pytest.raises(UserError, match=message):
        config_lib.load_config(str(path))


def test_a_recipe_that_is_misspelled_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--config=quikstart is no recipe.*'quickstart'"):
        config_lib.load_config("quikstart")
    with pytest.raises(UserError, match=r"--config=nowhere/mine.py: there is no such file"):
        config_lib.load_config("nowhere/mine.py")

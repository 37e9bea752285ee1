"""The schema of a run: frozen dataclasses, filled strictly from a config file's mapping.

Config files (``configs/*.py``) are programs that state every value; the classes here have no
defaults. A key that is unknown, missing or of the wrong type is an error that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmljax.errors import UserError
from mmljax.ranges import (
    Count,
    Decay,
    Natural,
    NotNegative,
    Positive,
    PositiveShare,
    Range,
    Share,
)

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|examples?|%)\s*")


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Size of the generated garment set; used when ``data.source`` is ``synthetic``."""

    train_items: Count
    test_items: Count
    views: Count  # images per item
    image_size: Count  # pixels
    seed: Natural


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they become a batch."""

    source: str  # a key of build.SOURCES
    directory: str  # of the images; "" where the source needs none
    check_counts: bool  # of TFDS's benchmarks: whether other numbers of images are an error
    test_share: Share  # of the classes of a folder without train/, held out for the test
    corrupt: str  # training images that cannot be decoded: error, or skip (and warn)
    image_size: Count  # side of a training or evaluation crop, pixels
    resize_size: Count  # short side before the evaluation crop, pixels
    crop_scale: tuple[PositiveShare, PositiveShare]  # share of the area that a training crop covers
    crop_ratio: tuple[Positive, Positive]  # width over height of a training crop
    flip: bool
    rotate: NotNegative  # degrees, uniform within +-; array sources only
    shear: NotNegative  # uniform within +-; array sources only
    batch_size: Count  # global, training
    images_per_class: Count  # K of P x K
    eval_batch_size: Count  # global
    threads: Natural  # of decoding; 0: one per core
    prefetch: Natural  # batches made ahead on the host
    synthetic: SyntheticConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Backbone and embedding head."""

    backbone: str  # a key of models.backbones.BACKBONES
    width: Count  # channels of a ResNet's first stage, of a ViT's attention heads; published: 64
    pretrained: str  # a file of weights, or hf:OWNER/NAME@COMMIT; "" to start from random ones
    pixel_norm: str  # imagenet (mean, deviation) or half (0.5, 0.5), as the weights were trained
    embedding_size: Count
    pooling: str  # of a ResNet: average, max, average+max; of a ViT: token, average
    layer_norm: str  # none, before (the projection), after
    batch_norm: str  # global (over the whole batch) or frozen (running statistics)
    compute_dtype: str  # of the backbone: float32 or bfloat16


@dataclasses.dataclass(frozen=True)
class MiningConfig:
    """Which pairs reach an objective."""

    rule: str  # a key of build.MINERS
    margin: float
    blend: Share  # weight of the sample view under rule blend


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """One objective: a row of ``build.OBJECTIVES``, what it sees and how it is set."""

    loss: str
    params: Mapping[str, float | int | str]  # in place of those of ``losses``
    mining: MiningConfig
    memory: bool  # whether the cross-batch memory joins its references
    sampled_proxies: (
        Natural  # of a loss between proxies: columns drawn at a step; 0 for all proxies
    )


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Cross-batch memory: a ring buffer of past embeddings as further references."""

    size: Natural  # embeddings; 0 for none
    start: str  # duration before its references count


@dataclasses.dataclass(frozen=True)
class CombinationConfig:
    """How contribution weights come about: a row of ``build.COMBINATIONS``."""

    name: str
    weights: Mapping[str, NotNegative]  # of each objective: fixed, or where learning starts
    embedding_shares: Mapping[str, Share]  # targets at the embeddings (share)
    proxy_shares: Mapping[str, Share]  # targets at the proxies (share)
    cap: Positive  # largest weight (uncertainty)
    alpha: NotNegative  # exponent of the training rates (gradnorm)
    surgery: str  # none or pcgrad, at the embeddings


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """One optimiser group."""

    learning_rate: NotNegative
    weight_decay: NotNegative


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optax optimiser, its groups, schedule and clipping."""

    name: str  # adamw, sgd
    b1: Decay  # of adamw; the momentum of sgd
    b2: Decay
    epsilon: Positive
    backbone: GroupConfig
    head: GroupConfig
    proxies: GroupConfig
    weights: GroupConfig  # contribution weights
    schedule: str  # constant, cosine, step
    step_every: str  # duration, of schedule step
    step_factor: Positive
    warmup: str  # duration of a linear rise of every rate
    freeze_backbone: str  # duration in which head and proxies train alone
    clip_norm: NotNegative  # largest norm of each group's gradient; 0 for no clipping


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and what to evaluate."""

    every: str  # duration; the last step is always evaluated
    recall_at: tuple[Count, ...]
    gallery_chunk: Count  # rows of the gallery per matrix product
    untrained: bool  # also score the network before the first step
    geometry: bool  # also measure the embeddings' density and spectral decay
    clustering: bool  # also cluster them, for NMI and AMI: needs scikit-learn, and takes long


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: str  # duration
    keep_last: Count
    keep_best: Natural  # by R@1 at evaluations


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written beside the ledger's rows."""

    every: Natural  # steps between fetches of the ledger from the device
    input_wait_warning: NotNegative  # share of the time without input above which a warning says so
    tensorboard: bool
    wandb: bool  # also to Weights & Biases
    mlflow: bool  # also to MLflow
    plot: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int
    duration: str
    data: DataConfig
    model: ModelConfig
    objectives: Mapping[str, ObjectiveConfig]
    losses: Mapping[str, Mapping[str, float | int | str]]  # hyperparameters of each loss
    centers: Count  # proxies per class
    row_block: Natural  # rows of similarities held at once; 0 for all
    memory: MemoryConfig
    combination: CombinationConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    log: LogConfig


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Fill the schema from a ConfigDict or any nested mapping.

    Raises:
      UserError: on an unknown, missing or ill-typed key, with its full path.
    """
    config: Config = _fill(Config, mapping, "config")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--config.seed must be from 0 to 2**32 - 1, found {config.seed}")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested dict of a config, for JSON."""
    return json.loads(json.dumps(config, default=_plain))


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits that change whenever a value of the config does."""
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "config") -> list[str]:
    """One line ``config.a.b: old -> new`` per leaf in which two nested dicts differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b, where = old.get(key), new.get(key), f"{path}.{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, where)
        elif a != b:
            lines.append(f"{where}: {a!r} -> {b!r}")
    return lines


class RunSize(NamedTuple):
    """What durations are measured in."""

    batch_size: int  # global
    train_examples: int  # an epoch
    total_steps: int | None = None  # what a percentage is of; None where none can be


def steps(duration: str, size: RunSize, *, key: str) -> int:
    """Turn ``"600 steps"``, ``"60 epochs"``, ``"5000 examples"`` or ``"10%"`` into steps.

    Args:
      duration: a number and a unit.
      size: of the run.
      key: the config key, for the error.

    Raises:
      UserError: if the text is not such a duration.
    """
    match = _DURATION.fullmatch(duration)
    if not match or (match[2] == "%" and size.total_steps is None):
        raise UserError(
            f"--{key}={duration!r} is no duration: write a number and a unit, "
            "such as '600 steps', '60 epochs', '5000 examples'"
            + ("" if size.total_steps is None else " or '10%'")
        )
    number = float(match[1])
    unit = match[2].rstrip("s")
    if unit == "epoch":
        return round(number * size.train_examples / size.batch_size)
    if unit == "example":
        return round(number / size.batch_size)
    if unit == "%":
        return round(number / 100 * (size.total_steps or 0))
    return round(number)


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or the list of names where none is near."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(names))


def choose(table: Mapping[str, Any], name: str, *, key: str) -> Any:
    """``table[name]``, or an error that names the config key and the nearest name."""
    if name not in table:
        raise UserError(f"--{key}={name!r} is unknown; {nearest(name, table)}")
    return table[name]


def _fill(cls: type, mapping: Any, path: str) -> Any:
    if not hasattr(mapping, "items"):
        raise UserError(f"--{path} must be a group of keys, found {mapping!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    given = dict(mapping.items())
    for name in given:
        if name not in hints:
            raise UserError(f"--{path}.{name} is unknown; {nearest(name, hints)}")
    missing = [name for name in hints if name not in given]
    if missing:
        raise UserError(f"--{path} lacks {', '.join(missing)}; configs/common.py states them all")
    return cls(**{name: _coerce(hints[name], given[name], f"{path}.{name}") for name in hints})


def _coerce(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        number, allowed = _coerce(arguments[0], value, path), arguments[1]
        if isinstance(allowed, Range) and not allowed.holds(number):
            raise UserError(f"--{path} must be {allowed}, found {value!r}")
        return number
    if dataclasses.is_dataclass(kind):
        return _fill(typing.cast(type, kind), value, path)
    if origin in (typing.Union, types.UnionType):
        for member in arguments:
            if type(value) is member:
                return _coerce(member, value, path)
        return _coerce(arguments[0], value, path)
    if origin is Mapping:
        if not hasattr(value, "items"):
            raise UserError(f"--{path} must be a group of keys, found {value!r}")
        return {str(k): _coerce(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise UserError(f"--{path} must be a tuple, found {value!r}")
        if arguments[-1] is Ellipsis and value:
            return tuple(_coerce(arguments[0], v, path) for v in value)
        if len(value) != len(arguments) or Ellipsis in arguments:
            number = "one or more" if Ellipsis in arguments else len(arguments)
            raise UserError(f"--{path} must hold {number} values, found {value!r}")
        return tuple(_coerce(a, v, path) for a, v in zip(arguments, value, strict=True))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"--{path} must be of type {kind.__name__}, found {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"--{path} must be finite, found {value!r}")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"{value!r} has no JSON form")

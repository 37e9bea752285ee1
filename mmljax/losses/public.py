"""Checked points from a caller's arrays, and public functions made from block functions."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from numpy.typing import ArrayLike

from mmljax.errors import UserError
from mmljax.losses.mining import pair_masks
from mmljax.numerics import l2_normalize, promote
from mmljax.text import nearest
from mmljax.types import PairMasks, Points

Labels = jax.Array | np.ndarray

EMBEDDINGS = "``[n d]`` floating-point array; need not be unit length."
LABELS = "``[n]`` integers, any values."
CLASS_LABELS = """\
``[n]`` integers from 0 to ``classes - 1``. Under ``jit`` the range is not checked, and a label out
of range matches no proxy."""
PROXIES = """\
``[classes * centers, d]`` floating-point array, the rows of a class contiguous; need not be unit
length."""
REFERENCES = {
    "reference_embeddings": """\
``[m d]``, what the anchors are compared with (a memory, a second view). Default: the embeddings
themselves, each without itself.""",
    "reference_labels": "``[m]`` integers, with ``reference_embeddings``.",
}

EXAMPLE_SAMPLES = (
    "embeddings = jnp.array([[2.0, 0.4], [0.8, 0.5], [-0.3, 1.0], [0.5, 0.9]])",
    "labels = jnp.array([0, 0, 1, 1])",
)
EXAMPLE_PROXIES = "proxies = jnp.array([[1.0, 0.2], [0.4, 0.7]])"


def example(module: str, *lines: str, prints: str) -> str:
    """A doctest with the lines of code; the last one prints ``prints``."""
    code = ("import jax.numpy as jnp", f"from mmljax import {module}", *lines)
    return "\n".join([*(f">>> {line}" for line in code), prints])


def sample_block(
    embeddings: ArrayLike,
    labels: ArrayLike,
    pairs: PairMasks | None,
    reference_embeddings: ArrayLike | None,
    reference_labels: ArrayLike | None,
) -> tuple[Points, Points, PairMasks]:
    """Anchors, references (the anchors where none are given) and the caller's pairs or all.

    Raises:
      UserError: if an array has the wrong shape or dtype, or only one of the references is given.
    """
    anchors = _vectors(embeddings, "embeddings")
    own = _labels(labels, "labels", anchors, "embeddings")
    if reference_embeddings is None and reference_labels is None:
        (own,) = _as_int32(own)
        rows = columns = _points(anchors, own)
    elif reference_embeddings is None or reference_labels is None:
        raise UserError("give both reference_embeddings and reference_labels, or neither")
    else:
        references = _vectors(reference_embeddings, "reference_embeddings", size=anchors.shape[1])
        others = _labels(reference_labels, "reference_labels", references, "reference_embeddings")
        own, others = _as_int32(own, others)
        rows, columns = _points(anchors, own), _points(references, others)
    if pairs is None:
        return rows, columns, pair_masks(rows, columns, same_kind=rows is columns)
    return rows, columns, _checked_pairs(pairs, (len(rows.labels), len(columns.labels)))


def proxy_points(proxies: ArrayLike, centers: int, *, size: int | None = None) -> Points:
    """Proxies, labelled by class.

    Raises:
      UserError: if the array has the wrong shape or dtype, or is no whole number of classes.
    """
    vectors = _vectors(proxies, "proxies", size=size)
    rows = vectors.shape[0]
    if centers < 1 or rows % centers:
        raise UserError(f"centers={centers}: the {rows} rows of proxies are no multiple of it")
    return _points(vectors, jnp.arange(rows) // centers)


def class_labelled_points(embeddings: ArrayLike, labels: ArrayLike, *, classes: int) -> Points:
    """Samples whose labels are the numbers of classes.

    Raises:
      UserError: if an array has the wrong shape or dtype, or a label is out of range.
    """
    vectors = _vectors(embeddings, "embeddings")
    own = _labels(labels, "labels", vectors, "embeddings")
    if not isinstance(own, jax.core.Tracer) and not 0 <= own.min() <= own.max() < classes:
        raise UserError(
            f"labels must lie in 0 .. {classes - 1}, one class for each group of proxies, "
            f"found {own.min()} .. {own.max()}"
        )
    return _points(vectors, jnp.asarray(own, jnp.int32))


def _checked_pairs(pairs: PairMasks, shape: tuple[int, int]) -> PairMasks:
    masks = PairMasks(*(jnp.asarray(mask) for mask in pairs))
    for name, mask in masks._asdict().items():
        if mask.shape != shape or mask.dtype != bool:
            raise UserError(
                f"pairs.{name} must be bool of shape {shape}, found {mask.dtype} {mask.shape}"
            )
    return masks


def _vectors(x: ArrayLike, name: str, *, size: int | None = None) -> Array:
    array = x if isinstance(x, jax.Array) else np.asarray(x)
    if array.ndim != 2 or not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(
            f"{name} must be a floating-point array [rows, dimensions], "
            f"found {array.dtype} {array.shape}"
        )
    if size is not None and array.shape[1] != size:
        raise UserError(f"{name} must have the embeddings' {size} columns, found {array.shape}")
    return l2_normalize(promote(jnp.asarray(array)))


def _labels(labels: ArrayLike, name: str, vectors: Array, owner: str) -> Labels:
    array = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if array.shape != vectors.shape[:1] or not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(
            f"{name} must be {vectors.shape[0]} integers, one for each row of {owner}, "
            f"found {array.dtype} {array.shape}"
        )
    return array


def _as_int32(*labels: Labels) -> list[Array]:
    """Labels that are equal where the given ones are; NumPy's may use all 64 bits."""
    wide = [x for x in labels if isinstance(x, np.ndarray) and x.dtype.itemsize > 4]
    if len(wide) == len(labels):
        _, numbers = np.unique(np.concatenate(wide), return_inverse=True)
        ends = np.cumsum([len(x) for x in wide])
        return [jnp.asarray(x, jnp.int32) for x in np.split(numbers, ends[:-1])]
    limits = np.iinfo(np.int32)
    for x in wide:
        if x.min() < limits.min or x.max() > limits.max:
            raise UserError("labels beyond 32 bits: give all labels as NumPy arrays of 64 bits")
    return [jnp.asarray(x) for x in labels]


def _points(vectors: Array, labels: Array) -> Points:
    count = vectors.shape[0]
    valid: Bool[Array, " n"] = jnp.ones(count, bool)
    return Points(vectors, labels, jnp.arange(count), valid)


def publish(
    core: Callable[..., Any],
    block: Callable[..., Any],
    *,
    name: str,
    module: str,
    arguments: Mapping[str, str],
    notes: str,
    returns: str,
    example: str,
    hidden: Sequence[str] = (),
) -> Callable[..., Any]:
    """Make a public function from a block function.

    The public function is ``core(block, ...)`` with the arguments of ``core`` and the keywords of
    ``block``, in a signature of its own.

    Args:
      core: what turns arrays into blocks; takes the block function first.
      block: the function of blocks.
      name: public name.
      module: where it is exported.
      arguments: the docstring of each argument of ``core``.
      notes: a paragraph after the description of the block function.
      returns: what it returns.
      example: a doctest.
      hidden: keywords of ``block`` that ``core`` supplies.
    """
    signature = _joined_signature(core, block, hidden)

    def public(*args: Any, **kwargs: Any) -> Any:
        for key in kwargs:
            if key not in signature.parameters:
                hint = nearest(key, signature.parameters)
                raise TypeError(f"{name}() has no argument {key!r}; {hint}")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        return core(block, *bound.args, **bound.kwargs)

    description, documented = _parse_docstring(inspect.getdoc(block) or "")
    texts = {key: documented.get(key) or arguments[key] for key in signature.parameters}
    sections = {
        "Args": "\n".join(_fill(f"{key}: {text}", "  ") for key, text in texts.items()),
        "Returns": returns,
        "Raises": "UserError: if an array has the wrong shape, dtype or labels.\n"
        "TypeError: if a keyword is unknown or missing.",
        "Examples": example,
    }
    parts = [f"{key}:\n{textwrap.indent(text, '  ')}" for key, text in sections.items()]
    public.__doc__ = "\n\n".join([description, _fill(notes), *parts]) + "\n"
    public.__name__ = public.__qualname__ = name
    public.__module__ = module
    public.__signature__ = signature  # type: ignore[attr-defined]
    return public


def _joined_signature(
    core: Callable[..., Any], block: Callable[..., Any], hidden: Sequence[str]
) -> inspect.Signature:
    """The arguments of ``core`` after the first, with the keywords of ``block``."""
    outer = inspect.signature(core, eval_str=True)
    inner = inspect.signature(block, eval_str=True).parameters.values()
    positional = [p for p in outer.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = {p.name: p for p in inner if p.kind is p.KEYWORD_ONLY and p.name not in hidden}
    for key, parameter in outer.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options.setdefault(key, parameter)
    return outer.replace(parameters=[*positional[1:], *options.values()])


def _parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description of a Google-style docstring, and the text of each argument."""
    description, *sections = re.split(r"\n\n(?=(?:Args|Returns|Raises):\n)", text)
    arguments = [s.removeprefix("Args:\n") for s in sections if s.startswith("Args:")]
    entries = re.split(r"^  (?=\w)", "".join(arguments), flags=re.M)[1:]
    pairs = (entry.split(":", 1) for entry in entries)
    return description, {key: " ".join(value.split()) for key, value in pairs}


def _fill(text: str, hang: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), 96, subsequent_indent=hang)

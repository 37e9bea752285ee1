"""Arithmetic of a function, counted in its traced form: products of matrices and convolutions.

XLA's own count has a loop's body once; here it counts as often as it runs. Element-wise work is not
counted: on these chips it is done beside the matrix units and is bound by memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax import lax

_PASSES = {lax.Precision.HIGHEST: 6, lax.Precision.HIGH: 3}  # of bfloat16, for a float32 product


class Operations(NamedTuple):
    """Multiplications and additions."""

    number: float
    passes: float  # the same as a TPU does them in bfloat16: a float32 product is up to six

    def __add__(self, other: Any) -> Operations:
        return Operations(self.number + other.number, self.passes + other.passes)

    def __sub__(self, other: Any) -> Operations:
        return Operations(self.number - other.number, self.passes - other.passes)

    def __mul__(self, factor: Any) -> Operations:
        return Operations(self.number * factor, self.passes * factor)


def operations(function: Callable[..., Any], *arguments: Any, platform: str) -> Operations:
    """Operations of one call, of one device within ``jax.shard_map``.

    Args:
      function: of arrays.
      arguments: arrays or their shapes.
      platform: which branch of ``lax.platform_dependent`` counts. Of another condition the
        branch with the most operations does, and a loop of unknown length counts once.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, platform)


def _count(jaxpr: Any, platform: str) -> Operations:
    total = Operations(0.0, 0.0)
    used = {id(x) for x in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if not (equation.effects or any(id(x) in used for x in equation.outvars)):
            continue  # the compiler removes it too
        used |= {id(x) for x in equation.invars}
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _conv(equation)
        elif name == "cond":
            branches = [_count(branch.jaxpr, platform) for branch in params["branches"]]
            total += _branch(branches, params.get("branches_platforms"), platform)
        else:
            times = params["length"] if name == "scan" else 1
            for inner in _inner(params):
                total += _count(inner, platform) * times
    return total


def _branch(branches: list[Operations], platforms: Any, platform: str) -> Operations:
    if platforms is None:
        return min(branches)  # which a step takes at least
    return next(
        found
        for found, names in zip(branches, platforms, strict=True)
        if names is None or platform in names
    )


def _inner(params: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _dot(equation: Any) -> Operations:
    left, right = (x.aval for x in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    number = 2.0 * equation.outvars[0].aval.size * math.prod(left.shape[i] for i in contracted)
    return Operations(number, number * _passes(equation.params["precision"], left, right))


def _conv(equation: Any) -> Operations:
    """Products of values; the zeros between dilated inputs, of a strided gradient, do not count."""
    left, right = (x.aval for x in equation.invars)
    params = equation.params
    outputs = right.shape[params["dimension_numbers"].rhs_spec[0]]
    number = 2.0 * equation.outvars[0].aval.size * (right.size // outputs)
    number /= math.prod(params["lhs_dilation"])
    return Operations(number, number * _passes(params["precision"], left, right))


def _passes(precision: Any, *operands: Any) -> int:
    if any(x.dtype.itemsize < 4 for x in operands):
        return 1
    pair = precision if isinstance(precision, tuple) else (precision,)
    return max(_PASSES.get(one, 1) for one in pair)

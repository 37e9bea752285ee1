"""Dataclasses filled strictly from nested mappings: an unknown key or a wrong type is an error."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmljax.errors import UserError
from mmljax.text import nearest


class Range(NamedTuple):
    """Finite numbers from ``least`` to ``most``, without ``least`` itself where it is excluded."""

    least: float
    most: float = math.inf
    excluded: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        enough = value > self.least if self.excluded else value >= self.least
        return enough and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        start = f"{'above' if self.excluded else 'at least'} {self.least:g}"
        return start if self.most == math.inf else f"{start} and at most {self.most:g}"


def fill(cls: type, mapping: Any, *, path: str, partly: tuple[type, ...] = ()) -> Any:
    """An instance of a dataclass from a nested mapping, each value checked by its type hint.

    Args:
      cls: a dataclass of numbers, text, tuples, mappings and other dataclasses. A hint
        ``Annotated[int, Range(1)]`` also checks the range; ``tuple[int, ...]`` holds one value or
        more, ``tuple[int, ...] | tuple[()]`` may be empty.
      mapping: a ConfigDict, or any mapping.
      path: of the mapping in the config, for errors.
      partly: classes of which fields with a default may be absent; of others none may.

    Raises:
      UserError: on an unknown, missing or ill-typed key, with its full path.
    """
    if not hasattr(mapping, "items"):
        raise UserError(f"--{path} must be a group of keys, found {mapping!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    given = dict(mapping.items())
    for name in given:
        if name not in hints:
            raise UserError(f"--{path}.{name} is unknown; {nearest(name, hints)}")
    needed = [f.name for f in dataclasses.fields(cls) if cls not in partly or not _has_default(f)]
    if missing := [name for name in needed if name not in given]:
        raise UserError(f"--{path} lacks {', '.join(missing)}; start from mmljax.default_config()")
    return cls(
        **{name: _coerce(hints[name], given[name], f"{path}.{name}", partly) for name in given}
    )


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _coerce(kind: Any, value: Any, path: str, partly: tuple[type, ...]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        number, allowed = _coerce(arguments[0], value, path, partly), arguments[1]
        if isinstance(allowed, Range) and not allowed.holds(number):
            raise UserError(f"--{path} must be {allowed}, found {value!r}")
        return number
    if dataclasses.is_dataclass(kind):
        return fill(typing.cast(type, kind), value, path=path, partly=partly)
    if origin in (typing.Union, types.UnionType):
        found = tuple if type(value) is list else type(value)  # JSON has lists alone
        if found is tuple and not value and tuple[()] in arguments:
            return ()
        for member in arguments:
            if found is (typing.get_origin(member) or member):
                return _coerce(member, value, path, partly)
        return _coerce(arguments[0], value, path, partly)
    if origin is Mapping:
        if not hasattr(value, "items"):
            raise UserError(f"--{path} must be a group of keys, found {value!r}")
        return {str(k): _coerce(arguments[1], v, f"{path}.{k}", partly) for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise UserError(f"--{path} must be a tuple, found {value!r}")
        if arguments[-1] is Ellipsis and value:
            return tuple(_coerce(arguments[0], v, path, partly) for v in value)
        if len(value) != len(arguments) or Ellipsis in arguments:
            number = "one or more" if Ellipsis in arguments else len(arguments)
            raise UserError(f"--{path} must hold {number} values, found {value!r}")
        return tuple(_coerce(a, v, path, partly) for a, v in zip(arguments, value, strict=True))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"--{path} must be of type {kind.__name__}, found {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"--{path} must be finite, found {value!r}")
    return value

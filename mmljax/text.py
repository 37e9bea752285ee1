"""Text for messages: one-line errors, aligned tables, differences, the nearest name, sizes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def one_line(error: BaseException, *, limit: int = 200) -> str:
    """The text of an error as one line of at most ``limit`` characters, or its type if empty."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def text_table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Rows of cells as aligned plain text, two spaces between columns.

    Args:
      rows: the header first; all of one length.
      left: the columns that are aligned to the left; the others are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """One line ``prefix.a.b: old -> new`` for each leaf in which two nested mappings differ."""
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, prefix=name)
        elif a != b:
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines


def nearest(name: str, names: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest of ``names``, or all of them where none is near."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(names))


def size_text(count: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped: safe on a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def as_json(contents: Any) -> str:
    """The text of a JSON file that people read."""
    return json.dumps(contents, indent=2) + "\n"

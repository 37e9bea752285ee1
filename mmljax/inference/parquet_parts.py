"""Parquet tables that are made piece by piece, so that a command that was broken off goes on.

The pieces lie in ``OUTPUT.parts/`` beside a manifest of what they are made from, and are joined
when all are there. Each is written aside and renamed when whole. So the same command, killed at any
moment and started again, makes the file that it would have made at once, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmljax.errors import UserError

METADATA = b"mmljax"
"""The key of the file metadata whose value, JSON, says what a table was made from."""

_MANIFEST = "manifest.json"


class Parts:
    """The pieces of one table."""

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        """Begin, or go on where the same command was broken off.

        Args:
          output: the file that shall be.
          identity: all that the table follows from, as plain JSON.

        Raises:
          UserError: if there is a file or a folder of pieces made from something else, or the
            folder cannot be written.
        """
        self._output, self._identity = output, dict(identity)
        self._folder = output.with_name(output.name + ".parts")
        manifest = self._folder / _MANIFEST
        self.finished = output.exists() and not manifest.exists()
        if self.finished:
            _check_same(_made_from(output), self._identity, f"--output={output} is there already,")
            return
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if manifest.exists():
                made_from = _parse(manifest.read_bytes())
                _check_same(made_from, self._identity, f"{self._folder} holds pieces")
                return
            for stale in self._folder.glob("part-*"):  # of a table whose removal was broken off
                stale.unlink()
            text = json.dumps(self._identity, indent=2)
            _write_whole(manifest, lambda path: path.write_text(text, encoding="utf-8"))

    def has(self, number: int) -> bool:
        """Whether a piece is there."""
        return self._path(number).exists()

    def rows(self, number: int) -> int:
        """How many rows a piece has."""
        from pyarrow import parquet

        with self._reading(number) as path:
            return parquet.read_metadata(path).num_rows

    def write(self, number: int, table: Any) -> None:
        """Keep a piece, a ``pyarrow.Table``."""
        from pyarrow import parquet

        with _writing(self._folder):
            _write_whole(self._path(number), lambda path: parquet.write_table(table, path))

    def join(self, count: int, *, facts: Mapping[str, Any] | None = None) -> None:
        """Make the file of all pieces, one row group each, and remove them.

        Args:
          count: of pieces.
          facts: what the metadata tells beside the identity.
        """
        from pyarrow import parquet

        text = json.dumps({**self._identity, **(facts or {})})
        schema = self._read(0).schema.with_metadata({METADATA: text.encode()})

        def write(path: Path) -> None:
            with parquet.ParquetWriter(path, schema) as writer:
                for table in map(self._read, range(count)):
                    writer.write_table(table, row_group_size=max(1, table.num_rows))

        self._finish(write)

    def join_lines(self, count: int) -> None:
        """Make a file of one JSON object per row of all pieces, and remove them."""

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8") as file:
                for table in map(self._read, range(count)):
                    for row in table.to_pylist():
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")

        self._finish(write)

    def _finish(self, write: Callable[[Path], Any]) -> None:
        with _writing(self._output):
            _write_whole(self._output, write)
            (self._folder / _MANIFEST).unlink()  # first: without it the pieces count no more
            shutil.rmtree(self._folder)

    def _read(self, number: int) -> Any:
        from pyarrow import parquet

        with self._reading(number) as path:
            return parquet.read_table(path)

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[Path]:
        try:
            yield self._path(number)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._path(number)} is damaged ({error}); remove it and start the same command "
                "again"
            ) from error

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"


def metadata(path: Path) -> dict[str, Any]:
    """What the metadata of a Parquet file says that it was made from.

    Raises:
      UserError: if the file is absent, damaged, or not made by this package.
    """
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"{path} does not exist; make it by python -m mmljax.cli.embed")
    try:
        found = (parquet.read_schema(path).metadata or {})[METADATA]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is no table of mmljax ({' '.join(str(error).split())[:200]}); make it by "
            "python -m mmljax.cli.embed"
        ) from error
    return _parse(found)


def _made_from(output: Path) -> dict[str, Any]:
    try:
        return metadata(output)
    except UserError as error:
        raise UserError(
            f"--output={output} is there already; name another --output, or remove it"
        ) from error


def _parse(text: bytes) -> dict[str, Any]:
    """A manifest; empty, and so like no other, if it is damaged."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    differing = [
        f"{key} {found.get(key)!r}, now {value!r}"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if differing:
        raise UserError(
            f"{what} made from something else ({'; '.join(differing)}); finish that by its own "
            "command, name another --output, or remove it"
        )


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write aside, to the disk, and rename."""
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output: {path} cannot be written ({error}); free the disk or name another place; "
            "what was finished before is kept"
        ) from error

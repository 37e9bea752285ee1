"""A resumable Parquet writer: a command that was killed resumes and makes the same file.

The parts are in ``OUTPUT.parts/`` beside a manifest of what they are made from and a lock, and are
joined when all are complete. Each file is written atomically.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mmljax.errors import UserError
from mmljax.files import Locked, acquire_lock, write_atomically, written_atomically
from mmljax.text import differences, one_line

METADATA = b"mmljax"
"""The key of the file metadata whose value, JSON, says what a table was made from."""

_MANIFEST, _LOCK = "manifest.json", "lock"


class Parts:
    """The parts of one table; as a context manager, it locks them until the block ends."""

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        """Start a table, or resume one.

        Args:
          output: the file to make.
          identity: everything that the table depends on, as plain JSON.

        Raises:
          UserError: if the file or its parts are made from something else, another process writes
            them, or the folder cannot be written.
        """
        self._output, self._identity = output, dict(identity)
        self._folder = output.with_name(output.name + ".parts")
        self._lock: IO[str] | None = None
        manifest = self._folder / _MANIFEST
        self.finished = output.exists() and not manifest.exists()
        if self.finished:
            _check_same(_made_from(output), self._identity, f"--output={output} exists already,")
            return
        with _writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = acquire_lock(self._folder / _LOCK)
            except Locked as holder:
                raise UserError(
                    f"--output={output} is being written by {holder}; wait for it to end, or name "
                    "another --output"
                ) from None
            try:
                self._start(manifest)
            except BaseException:
                self._lock.close()
                raise

    def _start(self, manifest: Path) -> None:
        if manifest.exists():
            made_from = _parse(manifest.read_bytes())
            _check_same(made_from, self._identity, f"{self._folder} holds parts")
            return
        for stale in self._folder.glob("part-*"):  # of a table whose removal was interrupted
            stale.unlink()
        write_atomically(manifest, json.dumps(self._identity, indent=2))

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def has(self, number: int) -> bool:
        """Whether a part is complete."""
        return self._path(number).exists()

    def rows(self, number: int) -> int:
        """The number of rows of a part."""
        from pyarrow import parquet

        with self._reading(number) as path:
            return parquet.read_metadata(path).num_rows

    def write(self, number: int, table: Any) -> None:
        """Save a part, a ``pyarrow.Table``."""
        from pyarrow import parquet

        with _writing(self._folder), written_atomically(self._path(number)) as partial:
            parquet.write_table(table, partial)

    def join(self, count: int, *, facts: Mapping[str, Any] | None = None) -> None:
        """Make the file from all parts, one row group each, and remove them.

        Args:
          count: the number of parts.
          facts: metadata beside the identity.
        """
        from pyarrow import parquet

        text = json.dumps({**self._identity, **(facts or {})})
        schema = self.read(0).schema.with_metadata({METADATA: text.encode()})

        def write(path: Path) -> None:
            with parquet.ParquetWriter(path, schema) as writer:
                for table in map(self.read, range(count)):
                    writer.write_table(table, row_group_size=max(1, table.num_rows))

        self._finish(write)

    def join_lines(self, count: int) -> None:
        """Make a file of one JSON object per row of all parts, and remove them."""

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8") as file:
                for table in map(self.read, range(count)):
                    for row in table.to_pylist():
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")

        self._finish(write)

    def _finish(self, write: Callable[[Path], Any]) -> None:
        with _writing(self._output):
            with written_atomically(self._output) as partial:
                write(partial)
            (self._folder / _MANIFEST).unlink()  # first: without it the parts are stale
            shutil.rmtree(self._folder)

    def read(self, number: int) -> Any:
        """A part that is complete."""
        from pyarrow import parquet

        with self._reading(number) as path:
            return parquet.read_table(path)

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[Path]:
        try:
            yield self._path(number)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._path(number)} is damaged ({one_line(error)}); remove it and run the same "
                "command again"
            ) from error

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"


def metadata(path: Path) -> dict[str, Any]:
    """What a Parquet file was made from, by its own metadata.

    Raises:
      UserError: if the file is absent, damaged, or not made by this package.
    """
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"{path} does not exist; make it by mmljax embed")
    try:
        found = (parquet.read_schema(path).metadata or {})[METADATA]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a table of mmljax ({one_line(error)}); make it by mmljax embed"
        ) from error
    return _parse(found)


def _made_from(output: Path) -> dict[str, Any]:
    try:
        return metadata(output)
    except UserError as error:
        raise UserError(
            f"--output={output} exists already; name another --output, or remove it"
        ) from error


def _parse(text: bytes) -> dict[str, Any]:
    """A manifest; empty, and so equal to no other, if it is damaged."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    differing = differences({key: found.get(key) for key in wanted}, wanted)
    if differing:
        raise UserError(
            f"{what} made from something else ({'; '.join(differing)}); finish it by its own "
            "command, name another --output, or remove it"
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output: {path} cannot be written ({one_line(error)}); free disk space, or name "
            "another --output; parts that are complete are kept"
        ) from error

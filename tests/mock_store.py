"""``mock://``: a bucket for fsspec in a local folder, whose writes can be made to fail.

The folder is that of ``MOCK_STORE`` in the environment, so other processes see the same store; as a
program this is ``mmljax train`` with it. Files are replaced whole, as those of a bucket are, and
checkpoints lie in the folder itself (``local_file``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from mmljax.files import write_atomically


class MockFileSystem(LocalFileSystem):
    """Files below ``MOCK_STORE``."""

    protocol = "mock"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).replace("mock://", os.environ["MOCK_STORE"] + "/").rstrip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Write a file whole; one that must not exist is written by one process of many."""
        root = Path(os.environ["MOCK_STORE"])
        if _fails(root):
            raise OSError("the network is down")
        target = Path(self._strip_protocol(path))
        if not (root / target.relative_to(root).parts[0]).exists():
            raise FileNotFoundError("no such bucket")
        handle, name = tempfile.mkstemp(dir=root)
        with os.fdopen(handle, "wb") as file:
            file.write(value)
        if mode == "create":
            try:
                os.link(name, target)
            finally:
                os.unlink(name)
        else:
            os.replace(name, target)
        with (root / "writes").open("a") as file:
            file.write(f"{target.relative_to(root)}\n")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made, but no bucket is."""
        root = Path(os.environ["MOCK_STORE"])
        if (root / Path(path).relative_to(root).parts[0]).exists():
            super().makedirs(path, exist_ok=exist_ok)


@contextlib.contextmanager
def _counting(root: Path) -> Iterator[Path]:
    """The file that counts the failures to come, for one thread of one process at a time."""
    with (root / "failures.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root / "failures"


def _fails(root: Path) -> bool:
    """Whether this write is to fail; it is counted."""
    with _counting(root) as counter:
        left = int(counter.read_text()) if counter.exists() else 0
        if left:
            write_atomically(counter, str(left - 1))
        return left > 0


def fail(root: Path, times: int) -> None:
    """Let so many writes fail."""
    with _counting(root) as counter:
        write_atomically(counter, str(times))


def writes(root: Path) -> list[str]:
    """The names of the files that were written, in order, without the locks."""
    names = (root / "writes").read_text().split() if (root / "writes").exists() else []
    return [name for name in names if not name.endswith("running.lock")]


def register() -> None:
    """Make ``mock://`` known."""
    fsspec.register_implementation("mock", MockFileSystem, clobber=True)


def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one bucket named ``bucket``, and quick locks and repetitions."""
    from mmljax.runs import remote

    store = folder / "store"
    (store / "bucket").mkdir(parents=True)
    monkeypatch.setenv("MOCK_STORE", str(store))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    register()
    for name, value in (("BEAT", 0.1), ("DEAD", 2.0), ("PAUSES", (0.01, 0.01))):
        monkeypatch.setattr(remote, name, value)
    return store


if __name__ == "__main__":
    from mmljax.cli import main
    from mmljax.runs import remote

    register()
    remote.BEAT, remote.DEAD, remote.PAUSES = 0.2, 8.0, (0.1,)
    if name := os.environ.get("MOCK_MACHINE"):
        remote._machine = lambda: name  # type: ignore[assignment]
    sys.exit(main(["train", *sys.argv[1:]]))

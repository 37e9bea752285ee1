"""Files in a local folder or on another file system, and what a reader made of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmljax.data import paths as files
from mmljax.types import Dataset


def write(root: str, *names: str, contents: bytes = b"not decoded here") -> None:
    for name in names:
        path = f"{root}/{name}"
        if files.is_remote(root):
            import tensorflow as tf

            tf.io.gfile.makedirs(os.path.dirname(path))
            with tf.io.gfile.GFile(path, "wb") as file:
                file.write(contents)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(contents)


def rows(data: Dataset) -> dict[str, list[tuple[str, int]]]:
    """Names and labels of each split; every path must lead to the image of that name."""
    found = {}
    for split in ("train", "query", "gallery"):
        part = getattr(data, split)
        if part is not None:
            assert part.labels.dtype == np.int32
            assert all(str(p).endswith(n) for p, n in zip(part.images, part.names, strict=True))
            assert all(files.read(str(path)) == b"not decoded here" for path in part.images)
            found[split] = list(zip(part.names.tolist(), part.labels.tolist(), strict=True))
    return found


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a folder be listed by nobody, root included."""
    scandir = os.scandir

    def refuse(path: str | Path) -> Any:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)

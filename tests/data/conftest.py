"""A folder on the local disk and one on another file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(params=["local", "remote"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder: on the disk, or in TensorFlow's own file system in memory."""
    if request.param == "local":
        return str(tmp_path)
    pytest.importorskip("tensorflow", reason="reads other file systems")
    return f"ram://{tmp_path.name}-{os.getpid()}"

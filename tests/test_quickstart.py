"""The README's first run: it learns, and ends with what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import runs


@pytest.mark.slow
def test_quickstart_learns(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mmljax.main", "--config=configs/quickstart.py"),
            f"--config.data.directory={tmp_path / 'images'}",
            f"--workdir={tmp_path / 'run'}",
        ],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    assert "eta" in done.stderr
    results = runs.results(tmp_path / "run")
    trained, untrained = results["scores"], results["untrained"]
    print("trained", trained, "untrained", untrained)
    assert trained["recall@1"] >= 3 * untrained["recall@1"]
    assert trained["recall@1"] >= 10 * trained["chance"]
    for line in ("Recall@1 ", "checkpoint ", "results ", "plot "):
        assert line in done.stdout
    for name in ("contributions.png", "results.json", "metrics.jsonl", "tensorboard"):
        assert (tmp_path / "run" / name).exists()

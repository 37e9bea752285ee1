"""Killed with SIGKILL and started again with the same command: nothing differs, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning"),
]


def test_killed_at_random_steps_equals_uninterrupted(tmp_path: Path) -> None:
    images = runs.write_images(tmp_path / "images.npz")
    config = runs.write_config(tmp_path / "small.py", images, duration="60 steps")
    assert runs.run(config, tmp_path / "whole").returncode == 0

    choose = random.Random(int.from_bytes(os.urandom(4), "big"))
    targets = sorted(choose.sample(range(1, 55), 3))
    print("killed after steps", targets)
    for target in targets:
        process = subprocess.Popen(
            runs.command(config, tmp_path / "parts"),
            cwd=runs.ROOT,
            env=runs.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        path = tmp_path / "parts/metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            lines = path.read_text().count('"train"') if path.exists() else 0
            if lines >= target:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert runs.run(config, tmp_path / "parts").returncode == 0

    assert runs.metrics(tmp_path / "whole") == runs.metrics(tmp_path / "parts")
    whole, parts = (runs.final_state(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, parts[name], err_msg=name)
    assert runs.results(tmp_path / "whole")["scores"] == runs.results(tmp_path / "parts")["scores"]

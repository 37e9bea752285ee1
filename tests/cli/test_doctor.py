"""The doctor as a user meets it: a line per check, and exit code 2 where one failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import small_runs
from mmljax.cli.doctor import examine
from mmljax.training import checks


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmljax.cli.doctor", "--seconds=0.1", *arguments],
        cwd=small_runs.ROOT,
        env=small_runs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def verdicts(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()]


def test_a_run_that_can_go(tmp_path: Path) -> None:
    config = small_runs.write_config(
        tmp_path / "small.py", small_runs.write_images(tmp_path / "images.npz")
    )
    done = doctor(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout
    assert len(verdicts(done)) == 8
    assert set(verdicts(done)) <= {"ok", "warn"}
    assert not (tmp_path / "run").exists()


def test_faults_are_all_told_with_exit_code_2(tmp_path: Path) -> None:
    config = small_runs.write_config(tmp_path / "small.py", tmp_path / "none.npz")
    (tmp_path / "file").write_text("")
    done = doctor(f"--config={config}", f"--workdir={tmp_path / 'file'}")
    assert done.returncode == 2
    assert verdicts(done)[3:] == ["FAIL", "FAIL", "skip", "skip", "skip"]
    assert "none.npz" in done.stdout


def test_without_a_config_the_run_is_skipped_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "visible_accelerators", list)
    found = list(examine(None, tmp_path, seconds=0.1))
    assert [x.verdict for x in found if x.name != "devices"] == ["ok"] * 3 + ["skip"] * 4
    assert {x.text for x in found if x.verdict == "skip"} == {"no --config is given"}


def test_a_mistake_in_the_config_is_one_line(tmp_path: Path) -> None:
    config = small_runs.write_config(tmp_path / "small.py", tmp_path / "none.npz")
    done = doctor(f"--config={config}", "--config.data.batchsize=3")
    assert done.returncode == 2
    assert done.stderr.startswith("mmljax: error:")
    assert "batch_size" in done.stderr

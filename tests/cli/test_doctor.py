"""``mmljax doctor``: a line per check, and exit code 2 if one fails."""

from __future__ import annotations

from pathlib import Path

import pytest

import small_runs
from mmljax.cli import main
from mmljax.cli.doctor import examine
from mmljax.training import checks


@pytest.fixture(autouse=True)
def no_accelerator_for_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "visible_accelerators", list)


def verdicts(shown: str) -> list[str]:
    return [line.split()[0] for line in shown.splitlines()]


def test_a_run_that_can_start(tmp_path: Path, capsys) -> None:
    config = small_runs.write_config(
        tmp_path / "small.py", small_runs.write_images(tmp_path / "images.npz")
    )
    code = main(["doctor", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--seconds=0.1"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert len(verdicts(shown)) == 8
    assert set(verdicts(shown)) <= {"ok", "warn"}
    assert not (tmp_path / "run").exists()


def test_all_faults_are_printed_with_exit_code_2(tmp_path: Path, capsys) -> None:
    config = small_runs.write_config(tmp_path / "small.py", tmp_path / "none.npz")
    (tmp_path / "file").write_text("")
    assert main(["doctor", f"--config={config}", f"--workdir={tmp_path / 'file'}"]) == 2
    shown = capsys.readouterr().out
    assert verdicts(shown)[3:] == ["FAIL", "FAIL", "skip", "skip", "skip"]
    assert "none.npz" in shown


def test_without_a_config_the_checks_of_a_run_are_skipped(tmp_path: Path) -> None:
    found = list(examine(None, tmp_path, seconds=0.1))
    assert [x.verdict for x in found if x.name != "devices"] == ["ok"] * 3 + ["skip"] * 4
    assert {x.text for x in found if x.verdict == "skip"} == {"no --config is given"}


def test_a_mistake_in_the_config_is_one_line(tmp_path: Path, capsys) -> None:
    config = small_runs.write_config(tmp_path / "small.py", tmp_path / "none.npz")
    assert main(["doctor", f"--config={config}", "--config.data.batchsize=3"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("mmljax: error:")
    assert "batch_size" in shown


def test_generated_images_are_not_written(tmp_path: Path, capsys) -> None:
    images = tmp_path / "images"
    options = [f"--config.data.directory={images}", f"--workdir={tmp_path / 'run'}"]
    assert main(["doctor", "--config", "quickstart", *options]) == 0
    assert verdicts(capsys.readouterr().out)[4:] == ["skip"] * 4
    assert not images.exists()

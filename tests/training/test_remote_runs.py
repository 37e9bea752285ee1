"""Whole runs at an address equal local ones, also broken off and on other machines."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mock_store
import small_runs
from mmljax.cli import main
from mmljax.config import load_config
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.files import working_copy
from mmljax.inference.embedder import load_embedder
from mmljax.training import loop

pytestmark = pytest.mark.filterwarnings(
    # orbax reads checkpoints without shardings in small_runs.final_state, on purpose
    "ignore:Sharding info not provided when restoring:UserWarning"
)
RUN = "mock://bucket/run"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return mock_store.make(tmp_path, monkeypatch)


def test_a_run_in_a_bucket_equals_a_local_one_and_is_read_from_there(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Broken off where the store fails, and resumed with another cache."""
    images = small_runs.write_images(tmp_path / "images.npz")
    config = load_config(str(small_runs.write_config(tmp_path / "small.py", images)))
    loop.train(config, tmp_path / "whole")

    original, made = load.train_batches, itertools.count()

    def failing(*arguments: Any, **options: Any) -> Any:
        for batch in original(*arguments, **options):
            if next(made) == 12:
                mock_store.fail(store, 1000)
            yield batch

    monkeypatch.setattr(load, "train_batches", failing)
    with pytest.raises(UserError, match="cannot be written .*the network is down.*remain in"):
        loop.train(config, RUN)
    monkeypatch.setattr(load, "train_batches", original)
    bucket = store / "bucket/run"
    rows = len((bucket / "metrics.jsonl").read_text().splitlines())
    assert rows < len((working_copy(RUN, kind="runs") / "metrics.jsonl").read_text().splitlines())

    mock_store.fail(store, 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    capsys.readouterr()
    loop.train(config, RUN)
    small_runs.assert_same_run(tmp_path / "whole", bucket)
    assert f"results    {RUN}/results.json" in capsys.readouterr().out
    sessions = small_runs.results(bucket)["sessions"]
    assert [session["start_step"] for session in sessions] == [0, 10]
    assert not (bucket / "running.lock").exists()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reader's cache"))
    there, here = load_embedder(RUN), load_embedder(tmp_path / "whole")
    assert there.identity == here.identity | {"run": "run"}
    assert main(["compare", RUN, str(tmp_path / "whole"), "--resamples", "10"]) == 0
    assert "0.00" in capsys.readouterr().out


def command(config: Path, *, machine: str, folder: Path) -> dict[str, Any]:
    """Arguments of a process that trains at the address, on a machine with its own cache."""
    return {
        "args": [sys.executable, "tests/mock_store.py", f"--config={config}", f"--workdir={RUN}"],
        "cwd": small_runs.ROOT,
        "env": small_runs.environment(
            PYTHONPATH=str(small_runs.ROOT),
            MOCK_MACHINE=machine,
            XDG_CACHE_HOME=str(folder / machine),
        ),
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
    }


@pytest.mark.slow
def test_killed_stopped_and_resumed_on_other_machines(store: Path, tmp_path: Path) -> None:
    """SIGKILL leaves a lock that the next machine watches; a second run is refused meanwhile."""
    images = small_runs.write_images(tmp_path / "images.npz")
    config = small_runs.write_config(
        tmp_path / "small.py", images, duration="200 steps", evaluation__every="100 steps"
    )
    done = small_runs.run(config, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    steps = store / "bucket/run/checkpoints"

    first = subprocess.Popen(**command(config, machine="a", folder=tmp_path))
    small_runs.wait_for(first, (steps / "15").exists)
    second = subprocess.run(**command(config, machine="b", folder=tmp_path), check=False)
    assert second.returncode == 2, second.stderr
    assert f"mmljax: error: --workdir={RUN} is in use by another run (process" in second.stderr
    first.kill()
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL  # it was still at work

    third = subprocess.Popen(**command(config, machine="c", folder=tmp_path))
    at = max(int(path.name) for path in steps.iterdir() if path.name.isdigit())
    small_runs.wait_for(third, (steps / str(at + 10)).exists)
    third.send_signal(signal.SIGTERM)
    said = third.communicate(timeout=200)[1]
    assert third.returncode == 75, said
    assert "is taken over from a run that ended" in said
    assert not (store / "bucket/run/running.lock").exists()

    last = subprocess.run(**command(config, machine="d", folder=tmp_path), check=False)
    assert last.returncode == 0, last.stderr
    small_runs.assert_same_run(tmp_path / "whole", store / "bucket/run")

"""Runs resume after SIGKILL, SIGTERM, SIGINT, damage, other device counts and a full disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import small_runs
from mmljax.training.preemption import SIGNALS

pytestmark = pytest.mark.slow

KILLS = 20
DOUBLE = {"JAX_ENABLE_X64": "1"}


def start(
    config: Path, workdir: Path, *, largest_file: int | None = None, **changes: str
) -> subprocess.Popen[str]:
    """Begin a run; no file of it may grow beyond so many KiB."""
    limit = [] if largest_file is None else ["bash", "-c", f'ulimit -f {largest_file}; "$@"', ""]
    return subprocess.Popen(
        [*limit, *small_runs.command(config, workdir)],
        cwd=small_runs.ROOT,
        env=small_runs.environment(**changes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(
    config: Path,
    workdir: Path,
    *,
    after: int,
    number: signal.Signals = signal.SIGTERM,
    **changes: str,
) -> str:
    """Run until a step, send a signal, and return the standard error."""
    process = start(config, workdir, **changes)
    small_runs.wait_for(process, lambda: small_runs.trained(workdir) >= after)
    process.send_signal(number)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == SIGNALS[number], said
    return said


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty steps, saved every second one: many kills fall into a save."""
    folder = tmp_path_factory.mktemp("survival")
    images = small_runs.write_images(folder / "images.npz")
    changes = {
        "duration": "40 steps",
        "checkpoint__every": "2 steps",
        "optimizer__ema_decay": 0.9,
        "proxies_init": "class_means",
    }
    return small_runs.write_config(folder / "small.py", images, **changes)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The uninterrupted run."""
    workdir = config.parent / "whole"
    done = small_runs.run(config, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def last_step(workdir: Path) -> Path:
    steps = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name))


def test_killed_twenty_times(config: Path, whole: Path, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    choose = random.Random(seed)
    workdir = tmp_path / "killed"
    kills = saving = 0
    at = []
    while kills < KILLS:
        before = small_runs.trained(workdir)
        more = choose.randint(1, 3)
        process = start(config, workdir)
        # Rows after the last checkpoint are dropped first, so count from what is left.
        small_runs.wait_for(process, lambda: small_runs.trained(workdir) < before or before == 0)  # noqa: B023
        low = small_runs.trained(workdir)
        small_runs.wait_for(process, lambda: small_runs.trained(workdir) >= low + more)  # noqa: B023
        time.sleep(choose.uniform(0, 0.05))
        if process.poll() is not None:
            process.communicate()
            break
        folder = workdir / "checkpoints"
        saving += any("tmp" in path.name for path in folder.iterdir()) if folder.exists() else 0
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        at.append(small_runs.trained(workdir))
        kills += 1
    print(f"seed {seed}: killed {kills} times, {saving} of them in a save, after rows {at}")
    done = small_runs.run(config, workdir)
    assert done.returncode == 0, done.stderr
    assert kills >= 10
    small_runs.assert_same_run(whole, workdir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(
    number: signal.Signals, config: Path, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "stopped"
    said = stop(config, workdir, after=7, number=number)
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert "saved at step" in last
    assert "the same command resumes the run" in last
    assert int(last_step(workdir).name) >= 7
    assert small_runs.run(config, workdir).returncode == 0
    small_runs.assert_same_run(whole, workdir)


@pytest.mark.parametrize("damage", ["truncated", "missing", "emptied"])
def test_a_torn_checkpoint_is_reported_and_passed_over(
    damage: str, config: Path, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "torn"
    stop(config, workdir, after=9)
    torn = last_step(workdir)
    data = max(torn.rglob("d/*"), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        os.truncate(data, 100)
    elif damage == "missing":
        data.unlink()
    else:
        for path in torn.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    done = small_runs.run(config, workdir)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint of step {torn.name} cannot be read and is skipped" in done.stderr
    assert "Traceback" not in done.stderr
    assert any((workdir / "checkpoints/torn").iterdir())
    small_runs.assert_same_run(whole, workdir)


@pytest.mark.parametrize(("first", "then"), [(8, 1), (1, 8)])
def test_goes_on_with_another_number_of_devices(first: int, then: int, tmp_path: Path) -> None:
    images = small_runs.write_images(tmp_path / "images.npz")
    double = small_runs.write_config(
        tmp_path / "double.py", images, model__compute_dtype="float64", optimizer__ema_decay=0.9
    )
    alone = small_runs.run(double, tmp_path / "alone", **DOUBLE)
    assert alone.returncode == 0, alone.stderr
    stop(double, tmp_path / "moved", after=6, JAX_NUM_CPU_DEVICES=str(first), **DOUBLE)
    done = small_runs.run(double, tmp_path / "moved", JAX_NUM_CPU_DEVICES=str(then), **DOUBLE)
    assert done.returncode == 0, done.stderr
    assert f"devices: {then} x cpu" in done.stderr
    expected = small_runs.final_state(tmp_path / "alone")
    for name, value in small_runs.final_state(tmp_path / "moved").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_full_disk_loses_nothing(config: Path, whole: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "full"
    stop(config, workdir, after=5)
    kept = last_step(workdir).name

    process = start(config, workdir, largest_file=60)  # so the next checkpoint cannot be written
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "could not be written" in said
    assert f"the last whole one is of step {kept}" in said
    assert small_runs.run(config, workdir).returncode == 0
    small_runs.assert_same_run(whole, workdir)


def test_a_second_run_in_the_same_workdir_is_refused(config: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "shared"
    first = start(config, workdir)
    small_runs.wait_for(first, lambda: small_runs.trained(workdir) >= 1)
    second = small_runs.run(config, workdir)
    assert second.returncode == 2
    assert "in use by another run" in second.stderr
    assert f"process {first.pid}" in second.stderr
    first.communicate(timeout=200)
    assert first.returncode == 0

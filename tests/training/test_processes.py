"""Several processes on one machine, joined by jax.distributed: as one, and none is left hanging."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import small_runs
from mmljax.mesh import HEARTBEAT_SECONDS

pytestmark = pytest.mark.slow

DOUBLE = {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(
    config: Path, workdir: Path, *, processes: int, store: Path | None = None
) -> list[subprocess.Popen[str]]:
    """Start them; in a store each is a machine of its own, and the run is at an address."""
    port = free_port()
    command = small_runs.command(config, workdir)
    if store is not None:
        address = f"--workdir=mock://bucket/{workdir.name}"
        command = [sys.executable, "tests/mock_store.py", f"--config={config}", address]
    started = []
    for index in range(processes):
        environment = small_runs.environment(
            MMLJAX_COORDINATOR=f"localhost:{port}",
            MMLJAX_NUM_PROCESSES=str(processes),
            MMLJAX_PROCESS_ID=str(index),
            **DOUBLE,
        )
        if store is not None:
            environment |= {
                "PYTHONPATH": str(small_runs.ROOT),
                "MOCK_STORE": str(store),
                "MOCK_MACHINE": f"{index} {port}",
                "XDG_CACHE_HOME": str(store / f"cache {index} {port}"),
            }
        with (config.parent / f"{workdir.name}_{index}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command,
                    cwd=small_runs.ROOT,
                    env=environment,
                    stderr=log,
                    stdout=subprocess.DEVNULL,
                    text=True,
                )
            )
    return started


def logs(config: Path, workdir: Path) -> list[str]:
    return [path.read_text() for path in sorted(config.parent.glob(f"{workdir.name}_*.log"))]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    images = small_runs.write_images(folder / "images.npz")
    return small_runs.write_config(
        folder / "double.py",
        images,
        model__compute_dtype="float64",
        duration="12 steps",
        data__composition__rule="either",
        data__composition__share=0.5,
        data__composition__every="4 steps",
    )


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    done = small_runs.run(config, config.parent / "alone", **DOUBLE)
    assert done.returncode == 0, done.stderr
    return config.parent / "alone"


def assert_near(workdir: Path, alone: Path) -> None:
    expected = small_runs.final_state(alone)
    for name, value in small_runs.final_state(workdir).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-9, err_msg=name)
    assert small_runs.results(workdir)["scores"] == pytest.approx(
        small_runs.results(alone)["scores"]
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_are_as_one(processes: int, config: Path, alone: Path) -> None:
    workdir = config.parent / f"of_{processes}"
    started = start(config, workdir, processes=processes)
    codes = [process.wait(timeout=400) for process in started]
    assert codes == [0] * processes, logs(config, workdir)
    assert len(small_runs.metrics(workdir)) == len(
        small_runs.metrics(alone)
    )  # only the first one writes
    assert_near(workdir, alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_one_alone_goes_on(
    victim: int, config: Path, alone: Path
) -> None:
    workdir = config.parent / f"killed_{victim}"
    started = start(config, workdir, processes=2)
    small_runs.wait_for(started[0], lambda: small_runs.trained(workdir) >= 6)
    started[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    code = started[1 - victim].wait(timeout=HEARTBEAT_SECONDS + 30)
    assert started[victim].wait() == -signal.SIGKILL
    print(f"the other one ended after {time.monotonic() - begin:.1f} s with code {code}")
    assert code not in (0, None)
    assert logs(config, workdir)[1 - victim].strip()  # and says something
    done = small_runs.run(config, workdir, **DOUBLE)
    assert done.returncode == 0, done.stderr
    assert_near(workdir, alone)


def test_asked_to_stop_all_save_and_go_on(config: Path, alone: Path) -> None:
    workdir = config.parent / "asked"
    started = start(config, workdir, processes=2)
    small_runs.wait_for(started[0], lambda: small_runs.trained(workdir) >= 3)
    started[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=200) for process in started]
    assert codes == [75, 75], logs(config, workdir)
    started = start(config, workdir, processes=2)
    assert [process.wait(timeout=400) for process in started] == [0, 0], logs(config, workdir)
    assert_near(workdir, alone)


def test_several_machines_at_an_address(config: Path, alone: Path, tmp_path: Path) -> None:
    """Only the first one writes small files there; others with empty caches go on."""
    (tmp_path / "bucket").mkdir()
    workdir = tmp_path / "bucket/run"
    started = start(config, workdir, processes=2, store=tmp_path)
    small_runs.wait_for(started[0], lambda: small_runs.trained(workdir) >= 3)
    started[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=200) for process in started]
    assert codes == [75, 75], logs(config, workdir)
    assert not (workdir / "running.lock").exists()
    started = start(config, workdir, processes=2, store=tmp_path)
    assert [process.wait(timeout=400) for process in started] == [0, 0], logs(config, workdir)
    assert len(small_runs.metrics(workdir)) == len(small_runs.metrics(alone))
    assert_near(workdir, alone)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("metrics.jsonl")}
    assert {name[:7] for name in written} == {"bucket", "cache 0"}

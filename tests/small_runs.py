"""Whole runs small enough for tests, fed by arrays: the config, the data, what a run left."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PIXELS = 12


def write_images(path: Path, *, train_items: int = 12, test_items: int = 8) -> Path:
    """An ``.npz`` of items, each a fixed pattern under noise: train, query and gallery."""
    random = np.random.default_rng(0)
    items = train_items + test_items
    patterns = random.integers(0, 180, (items, PIXELS, PIXELS))
    images, labels, split = [], [], []
    for item in range(items):
        for view in range(6):
            noise = random.integers(0, 76, (PIXELS, PIXELS))
            images.append((patterns[item] + noise).astype(np.uint8))
            labels.append(item)
            test = "query" if view < 3 else "gallery"
            split.append("train" if item < train_items else test)
    np.savez(path, images=np.array(images), labels=np.array(labels, np.int32), split=split)
    return path


def write_dishes(folder: Path, *, train: int, test: int) -> Path:
    """Write the shared photographs of some dishes in class folders; skip the test without them."""
    archive = ROOT.parent / "shared" / "data" / "foods" / "foods.zip"
    if not archive.exists():
        pytest.skip(f"needs {archive}")
    with zipfile.ZipFile(archive) as file:
        for split, items in {"train": train, "test": test}.items():
            names = [n for n in file.namelist() if n.startswith(split) and n.endswith(".jpg")]
            kept = sorted({name.split("/")[1] for name in names})[:items]
            file.extractall(folder, [name for name in names if name.split("/")[1] in kept])
    return folder


def write_config(path: Path, images: Path, **changes: Any) -> Path:
    """A config file over the defaults; changes are dotted keys with ``__`` for the dot."""
    lines = [
        "import mmljax",
        "def get_config():",
        "    config = mmljax.default_config()",
    ]
    settings = {
        "duration": "20 steps",
        "data.source": "arrays",
        "data.directory": str(images),
        "data.image_size": PIXELS,
        "data.resize_size": PIXELS,
        "data.batch_size": 16,
        "data.images_per_class": 4,
        "data.eval_batch_size": 16,
        "model.backbone": "small",
        "model.width": 8,
        "model.embedding_size": 16,
        "model.compute_dtype": "float32",
        "optimizer.warmup": "2 steps",
        "evaluation.every": "10 steps",
        "evaluation.recall_at": (1, 2, 4),
        "evaluation.gallery_chunk": 8,
        "checkpoint.every": "5 steps",
        "log.every": 1,
        "log.tensorboard": False,
        "log.plot": False,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    lines += [f"    config.{key} = {value!r}" for key, value in settings.items()]
    path.write_text("\n".join([*lines, "    return config", ""]))
    return path


def command(config: Path, workdir: Path, *overrides: str) -> list[str]:
    """The command line of such a run."""
    start = [sys.executable, "-m", "mmljax.main", f"--config={config}", f"--workdir={workdir}"]
    return [*start, *overrides]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with changes."""
    return {**os.environ, **changes}


def run(*arguments: Any, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``command(...)`` to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class Quickstart(NamedTuple):
    """What ``configs/quickstart.py`` left, and what it printed."""

    folder: Path
    stdout: str
    stderr: str


def run_quickstart(folder: Path) -> Quickstart:
    """The README's first run, as it stands there but for the folders that it writes.

    The first process that asks for it in a folder runs it; others wait, and read what it left.
    """
    printed = folder / "printed.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            done = subprocess.run(
                command(
                    Path("configs/quickstart.py"),
                    folder / "run",
                    f"--config.data.directory={folder / 'images'}",
                ),
                cwd=ROOT,
                env=environment(XLA_FLAGS=""),
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            printed.write_text(json.dumps([done.stdout, done.stderr]))
    return Quickstart(folder / "run", *json.loads(printed.read_text()))


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Wait until something is so, the process has ended, or 300 seconds have passed."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not ready():
        time.sleep(0.002)


def metrics(workdir: Path) -> list[str]:
    """The lines of ``metrics.jsonl`` but for those of the clock, which no two runs share."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if '"kind": "rates"' not in line]


def results(workdir: Path) -> dict[str, Any]:
    """What ``results.json`` holds."""
    return json.loads((workdir / "results.json").read_text())


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by name, read without the package's own code.

    The rows of proxies that are padding, which depend on the number of devices, are cut.
    """
    import jax
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(read_only=True)
    directory, handler = workdir.absolute() / "checkpoints", ocp.PyTreeCheckpointHandler()
    with ocp.CheckpointManager(directory, item_handlers=handler, options=options) as manager:
        step = manager.latest_step()
        found = manager.item_metadata(step)
        # As NumPy, so that it does not matter which devices wrote it.
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(found))
        restored = manager.restore(step, args=ocp.args.PyTreeRestore(restore_args=kinds))

    def plain(x: Any) -> np.ndarray:
        key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    state = {name: plain(x) for name, x in restored.items()}
    rows = int(np.flatnonzero((state["params.proxies"] != 0).any(axis=1))[-1]) + 1
    return {name: x[:rows] if "proxies" in name and x.ndim else x for name, x in state.items()}


def trained(workdir: Path) -> int:
    """The last step with a row."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def assert_same_run(a: Path, b: Path) -> dict[str, np.ndarray]:
    """Rows, scores and every array of the last checkpoint are equal bit for bit; those arrays."""
    assert metrics(a) == metrics(b)
    whole, parts = final_state(a), final_state(b)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, parts[name], err_msg=name)
    assert results(a)["scores"] == results(b)["scores"]
    return whole


class Stop(Exception):
    """Breaks a run off."""


def train_broken_off(config: Any, workdir: Path, *, steps: int, monkeypatch: Any) -> None:
    """Train in this process, and break the run off after some steps."""
    import pytest

    from mmljax.data import load
    from mmljax.training import loop

    original, made = load.train_batches, itertools.count()

    def broken(*arguments: Any, **options: Any) -> Any:
        for batch in original(*arguments, **options):
            if next(made) == steps:
                raise Stop
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(load, "train_batches", broken)
        with pytest.raises(Stop):
            loop.train(config, workdir)


TINY_VIT = "vit_tiny"


def add_tiny_vit(monkeypatch: Any) -> dict[str, Any]:
    """Add a ViT of three blocks to the backbones of this test; returns the changes that use it."""
    import dataclasses
    from functools import partial

    from mmljax.models import architectures, backbones

    vit = architectures.ARCHITECTURES["vit_s16"]
    kind = dataclasses.replace(
        vit, depth=3, heads=2, head_dim=8, mlp_dim=24, patch_size=4, grid_size=3
    )
    monkeypatch.setitem(backbones.BACKBONES, TINY_VIT, partial(architectures._build, kind))
    return {"model__backbone": TINY_VIT, "model__width": 64, "model__pooling": "token"}

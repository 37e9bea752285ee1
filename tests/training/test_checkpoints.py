"""Checkpoints: between numbers of devices real rows stay; torn ones; addresses out of reach."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import small_runs
import tiny
from mmljax.errors import Unreachable, UserError
from mmljax.runs.throughput import Compilations
from mmljax.training import checkpoints
from mmljax.training.checkpoints import Checkpoints, PartialCheckpoint, steps_in
from mmljax.training.state import real_rows

REAL = {"proxies": tiny.CLASSES * 2, "memory": 30}  # rows of 2 centers a class, and slots


def make(devices: int, **options: Any) -> Any:
    rows = tiny.objectives(memory=True)
    kind = {"memory_size": REAL["memory"], "centers": 2, **options}
    step, state, place, _ = tiny.make(devices, rows=rows, **kind)
    kind.pop("proxies_dtype", None)
    objective = tiny.make_objective(rows, **kind)
    return step, state, place, real_rows(state, objective)


def move(folder: Path, state: Any, target: Any, rows: Any) -> Any:
    """Save a state, and restore it as another."""
    saved = Checkpoints(folder, keep_last=1, keep_best=0)
    try:
        saved.save(state, step=1, metrics=None)
        saved._manager.wait_until_finished()
        return saved.restore(target, rows=rows)
    finally:
        saved.close()


def test_saving_compiles_nothing(tmp_path: Path) -> None:
    """There is no program for each shape and device, as orbax's default has."""
    mesh = jax.make_mesh((8,), ("devices",))
    copied = jax.NamedSharding(mesh, jax.P())
    state = {f"w{n}": jax.device_put(np.ones((8, n), np.float32), copied) for n in range(3, 9)}
    counter = Compilations()
    try:
        move(tmp_path, state, state, None)
    finally:
        counter.close()
    assert counter.count == 0, counter.last


def plain(state: Any) -> dict[str, np.ndarray]:
    """Every array by name, without padding."""
    arrays = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        value = np.asarray(jax.random.key_data(x) if "key" in name else x)
        count = next((n for part, n in REAL.items() if part in name), None)
        arrays[name] = value[:count] if value.ndim else value
    return arrays


def assert_equal(one: Any, other: Any) -> None:
    one, other = plain(one), plain(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def trained(devices: int, **options: Any) -> Any:
    step, state, place, _ = make(devices, **options)
    for index in range(5):
        state, _ = step(state, place(tiny.batch(index, size=24 if devices == 3 else 32)))
    return state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_rows_stay_bit_for_bit_from_eight_devices_to_three_to_one_to_eight(
    dtype: str, tmp_path: Path
) -> None:
    """Proxies, their moments and the memory; the way ends with the next step of a straight run."""
    start = state = trained(8, proxies_dtype=dtype)
    assert np.abs(plain(start)[".params['proxies']"]).min(axis=1).all()
    for devices in (3, 1, 8):
        step, target, place, rows = make(devices, proxies_dtype=dtype)
        found = move(tmp_path / str(devices), state, target, rows)
        assert_equal(found, start)
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
            assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
            assert leaf.sharding == wanted.sharding
        np.testing.assert_array_equal(found.params["proxies"][REAL["proxies"] :], 0)
        state = found
    first, _ = step(start, place(tiny.batch(5)))
    moved, _ = step(state, place(tiny.batch(5)))
    assert_equal(moved, first)


@pytest.mark.parametrize("devices", [1, 3])
def test_old_checkpoints_with_padding_to_128(devices: int, tmp_path: Path) -> None:
    """Their padded proxies were random; slots of the memory beyond its size are never read."""
    old = trained(8, multiple_of=128)
    proxies, memory = old.params["proxies"], old.objective.memory
    assert proxies.shape == (256, tiny.SIZE)
    padding = np.arange(256)[:, None] >= REAL["proxies"]
    old.params["proxies"] = jax.numpy.where(padding, 0.3, proxies)
    memory["labels"] = jax.numpy.where(np.arange(128) < 30, memory["labels"], 2)
    step, target, place, rows = make(devices)
    found = move(tmp_path, old, target, rows)
    assert_equal(found, old)
    size = 24 if devices == 3 else 32
    batch = place(tiny.batch(5, size=size))
    clean = target._replace(
        params={**found.params, "proxies": found.params["proxies"].at[REAL["proxies"] :].set(0)},
        objective=found.objective._replace(
            memory={
                **found.objective.memory,
                "labels": found.objective.memory["labels"].at[30:].set(-1),
            }
        ),
        model_state=found.model_state,
        optimizer_state=found.optimizer_state,
    )
    clean = jax.tree.map(lambda x, like: jax.device_put(x.copy(), like.sharding), clean, found)
    assert_equal(step(clean, batch)[0], step(found, batch)[0])


def test_fewer_rows_than_classes_and_other_arrays_are_refused(tmp_path: Path) -> None:
    _, target, _, rows = make(3)
    _, small, _, _ = tiny.make(3, rows=tiny.objectives(memory=True), memory_size=30, centers=1)
    with pytest.raises(UserError, match=r"params.proxies \(12, 6\) in place of \(24, 6\)"):
        move(tmp_path / "proxies", small, target, rows)
    _, large, _, _ = make(3, memory_size=12)
    with pytest.raises(UserError, match=r"memory.labels \(12,\) in place of \(30,\)"):
        move(tmp_path / "memory", large, target, rows)
    with pytest.raises(UserError, match=r"params.proxies \(24, 6\) in place of \(20, 6\)"):
        move(tmp_path / "strict", target, make(1)[1], None)


def saved(folder: Path, *steps: int) -> None:
    """Checkpoints of a small state."""
    manager = Checkpoints(folder, keep_last=9, keep_best=0)
    for step in steps:
        manager.save({"weights": jax.numpy.arange(6.0) + step}, step=step, metrics=None)
    manager.close()


def tear(folder: Path, step: int) -> None:
    for path in (folder / str(step)).rglob("d/*"):
        path.write_bytes(b"torn")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two checkpoints that counts as an address."""
    saved(tmp_path / "checkpoints", 1, 2)
    monkeypatch.setattr(checkpoints, "is_remote", lambda path: True)
    monkeypatch.setattr(checkpoints, "PAUSE", 0)
    return tmp_path / "checkpoints"


def test_torn_checkpoints_are_moved_only_if_another_one_is_whole(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        tear(tmp_path, step)
    Checkpoints(tmp_path, keep_last=9, keep_best=0).close()
    assert steps_in(tmp_path) == [1]
    assert len(list((tmp_path / "torn").iterdir())) == 2
    tear(tmp_path, 1)
    with pytest.raises(UserError, match="no checkpoint of .*step 1: .*restore them from a copy"):
        Checkpoints(tmp_path, keep_last=9, keep_best=0)
    assert steps_in(tmp_path) == [1]
    assert len(list((tmp_path / "torn").iterdir())) == 2


@pytest.mark.parametrize("failures", [1, 2, 4])
def test_a_checkpoint_at_an_address_is_torn_after_two_reads(
    failures: int, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If none can be read, the network is at fault, or each of them: all stay where they are."""
    check, left = PartialCheckpoint.check, iter(range(failures))

    def failing(self: PartialCheckpoint) -> None:
        if next(left, None) is not None:
            raise UserError("the network is down")
        check(self)

    monkeypatch.setattr(PartialCheckpoint, "check", failing)
    if failures == 4:
        with pytest.raises(Unreachable, match="step 2: the network is down; step 1: .*; check the"):
            Checkpoints(bucket, keep_last=9, keep_best=0)
    else:
        Checkpoints(bucket, keep_last=9, keep_best=0).close()
    assert steps_in(bucket) == ([1] if failures == 2 else [1, 2])


def test_a_bucket_out_of_reach_is_one_line_with_the_cure(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its steps are listed, the manager starts, and a checkpoint is read or written."""

    def broken(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no route to host")

    cure = r"\(no route to host\); check the network, that the bucket exists, and that the account"
    read, written = (f"{bucket} cannot be {done} {cure}" for done in ("read", "written"))
    manager = Checkpoints(bucket, keep_last=9, keep_best=0)
    with monkeypatch.context() as patch:
        patch.setattr(manager._manager, "save", broken)
        patch.setattr(manager._manager, "restore", broken)
        with pytest.raises(Unreachable, match=written):
            manager.save({"weights": jax.numpy.zeros(6)}, step=3, metrics=None)
        with pytest.raises(Unreachable, match=read):
            manager.restore({"weights": jax.numpy.zeros(6)})
        patch.setattr(manager._manager, "wait_until_finished", broken)
        with pytest.raises(Unreachable, match=written):
            manager.close()
    manager.close()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp, "CheckpointManager", broken)
        with pytest.raises(Unreachable, match=read):
            Checkpoints(bucket, keep_last=9, keep_best=0)
    monkeypatch.setattr(checkpoints.ocp.utils, "checkpoint_steps", broken)
    for use in (steps_in, checkpoints.is_in):
        with pytest.raises(Unreachable, match=read):
            use(bucket)


def test_a_damaged_checkpoint_at_an_address_may_also_be_out_of_reach(bucket: Path) -> None:
    tear(bucket, 2)
    said = f"checkpoint {bucket}/2 cannot be read .*check the network.*if this one is damaged, name"
    with pytest.raises(Unreachable, match=said):
        PartialCheckpoint(bucket, step=2).check()


@pytest.mark.parametrize("installed", [True, False])
def test_paths_go_through_gcsfs_where_it_is_installed(installed: bool, tmp_path: Path) -> None:
    """Etils asks for it once; otherwise TensorFlow's own file system serves, as TFDS needs it."""
    if installed:
        (tmp_path / "gcsfs.py").write_text("")
    elif importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed")
    program = (
        "import mmljax.training.checkpoints\n"
        "from etils.epath import gpath\n"
        "print(gpath._epath_use_tf(), gpath._is_tf_installed())"
    )
    environment = small_runs.environment(PYTHONPATH=f"{tmp_path}:{small_runs.ROOT}")
    environment.pop("EPATH_USE_TF", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    tensorflow = importlib.util.find_spec("tensorflow") is not None
    assert done.stdout.split() == [str(not installed), str(tensorflow and not installed)]

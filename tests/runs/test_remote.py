"""A run's files at an address: what is copied, when, and who may write."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import mock_store
from mmljax.cli import main
from mmljax.errors import Unreachable, UserError
from mmljax.files import working_copy
from mmljax.runs import remote

RUN = "mock://bucket/run"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return mock_store.make(tmp_path, monkeypatch)


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on this is another machine."""
    monkeypatch.setattr(remote, "_machine", lambda: "another machine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "other cache"))


def run(write: Callable[[remote.RunFiles], None] = lambda files: None, address: str = RUN) -> None:
    """A run that does so with its files."""
    with remote.opened(address) as files:
        write(files)


def test_changed_files_are_copied_and_come_back_elsewhere(store, tmp_path, monkeypatch):
    with remote.opened(f"{RUN}/") as files:
        assert files.local.name == "run"  # what loggers name the run
        assert files.checkpoints == store / "bucket/run/checkpoints"
        (files.local / "metrics.jsonl").write_text("1\n")
        (files.local / "tensorboard").mkdir()
        (files.local / "tensorboard/events").write_bytes(b"\0\xff")
        (files.local / "running.lock").write_text("of this machine")
        (files.local / "results.json.partial").write_text("half")
        files.push()
        files.push()
        (files.local / "metrics.jsonl").write_text("1\n2\n")
        files.push()
        (files.local / "results.json").write_text("{}")
    assert mock_store.writes(store) == [
        "bucket/run/metrics.jsonl",
        "bucket/run/tensorboard/events",
        "bucket/run/metrics.jsonl",
        "bucket/run/results.json",
    ]
    bucket = store / "bucket/run"
    assert sorted(p.name for p in bucket.iterdir()) == [
        "metrics.jsonl",
        "results.json",
        "tensorboard",
    ]
    elsewhere(monkeypatch, tmp_path)
    with remote.opened(RUN) as files:
        assert (files.local / "metrics.jsonl").read_text() == "1\n2\n"
        assert (bucket / "tensorboard/events").read_bytes() == b"\0\xff"
    assert len(mock_store.writes(store)) == 4  # nothing that was only read


def test_files_of_this_machine_give_way_to_those_at_the_address(store):
    with remote.opened(RUN) as files:
        (files.local / "metrics.jsonl").write_text("old\n")
    (store / "bucket/run/metrics.jsonl").write_text("of another machine\n")
    (files.local / "metrics.jsonl").write_text("not copied\n")
    (files.local / "mlflow.id").write_text("not copied")
    with remote.opened(RUN) as files:
        assert (files.local / "metrics.jsonl").read_text() == "of another machine\n"
        assert not (files.local / "mlflow.id").exists()


def test_a_run_that_fails_copies_its_files_and_names_the_address(store):
    def broken(files):
        (files.local / "metrics.jsonl").write_text("nan\n")
        raise UserError(f"--workdir={files.local} holds a run of another config")

    with pytest.raises(UserError) as error:
        run(broken)
    assert str(error.value) == f"--workdir={RUN} holds a run of another config"
    assert (store / "bucket/run/metrics.jsonl").read_text() == "nan\n"
    assert not (store / "bucket/run/running.lock").exists()


def test_a_second_run_is_refused_while_the_first_lives(store, tmp_path, monkeypatch):
    with remote.opened(RUN) as files:
        (files.local / "metrics.jsonl").write_text("first\n")
        elsewhere(monkeypatch, tmp_path)
        with pytest.raises(UserError, match=f"--workdir={RUN} is in use by another run") as error:
            run()
        assert f"to take over, delete {RUN}/running.lock" in str(error.value)
        time.sleep(3 * remote.BEAT)
        files.push()
    assert (store / "bucket/run/metrics.jsonl").read_text() == "first\n"


def left_behind(store: Path, **changes: object) -> None:
    """The lock of a run whose machine vanished."""
    folder = store / "bucket/run"
    folder.mkdir()
    holder = {"token": "x", "host": "h", "machine": "gone", "process": 1, "time": time.time()}
    (folder / "running.lock").write_text(json.dumps(holder | changes))


@pytest.mark.parametrize("age", [0.0, 1e6, -1e6])
def test_the_lock_of_a_machine_that_vanished_is_watched_then_taken(store, age):
    """However its clock differs from ours."""
    left_behind(store, time=time.time() - age)
    before = time.monotonic()
    with remote.opened(RUN) as files:
        files.push()
    waited = time.monotonic() - before
    assert waited > 0.9 * (1.5 * remote.BEAT if age > 0 else remote.DEAD)


@pytest.mark.parametrize("process", [2**30, "own"])
def test_the_lock_of_a_process_that_ended_here_is_taken_at_once(store, monkeypatch, process):
    """Its own id is that of a container's process before this one."""
    monkeypatch.setattr(remote, "DEAD", 1e6)
    left_behind(
        store, machine=remote._machine(), process=os.getpid() if process == "own" else process
    )
    with remote.opened(RUN) as files:
        files.push()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"time": "x"}'])
def test_a_damaged_lock_counts_as_left_behind(store, text):
    (store / "bucket/run").mkdir()
    (store / "bucket/run/running.lock").write_text(text)
    with remote.opened(RUN) as files:
        files.push()


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "replaced"])
def test_a_run_that_lost_its_lock_stops_and_writes_nothing(store, deleted):
    """To delete the lock is how a user takes over."""

    def losing(files):
        (files.local / "metrics.jsonl").write_text("late\n")
        (store / "bucket/run/running.lock").unlink()
        if not deleted:
            (store / "bucket/run").rmdir()
            left_behind(store)
        time.sleep(3 * remote.BEAT)
        files.push()

    with pytest.raises(remote.LockLost) as error:
        run(losing)
    assert error.value.exit_code == 2  # a second run must not be restarted into a fight
    said = "was deleted" if deleted else "was taken over by process 1 on h"
    assert said in str(error.value)
    assert f"files of this session remain in {working_copy(RUN, kind='runs')} until the" in str(
        error.value
    )
    assert mock_store.writes(store) == []
    assert (store / "bucket/run/running.lock").exists() == (not deleted)


def test_a_lock_that_is_released_while_it_is_watched_is_not_overwritten(store, monkeypatch):
    """A third run may have it by then."""
    left_behind(store)
    lock = store / "bucket/run/running.lock"
    read, reads = remote._Store.read, itertools.count()

    def released(self, name):
        number = next(reads)
        if number == 1:
            lock.unlink()
        found = read(self, name)
        if number >= 1 and (number == 1 or _holder(lock) == "third"):
            lock.write_text(json.dumps({"token": "third", "process": 3, "time": number}))
        return found

    monkeypatch.setattr(remote._Store, "read", released)
    with pytest.raises(UserError, match="is in use by another run .process 3 on"):
        run()
    assert _holder(lock) == "third"


def _holder(lock: Path) -> str:
    return json.loads(lock.read_text())["token"]


def test_a_file_that_vanishes_while_it_is_copied_is_passed_over(store, monkeypatch):
    mark = remote._Push._mark

    def vanishing(path):
        found = mark(path)
        if path.name == "gone":
            path.unlink()
        return found

    monkeypatch.setattr(remote._Push, "_mark", staticmethod(vanishing))
    with remote.opened(RUN) as files:
        (files.local / "gone").write_text("")
        (files.local / "metrics.jsonl").write_text("kept\n")
        files.push()
        files.push()
    assert mock_store.writes(store) == ["bucket/run/metrics.jsonl"]


def test_a_failed_write_is_repeated(store):
    with remote.opened(RUN) as files:
        (files.local / "metrics.jsonl").write_text("kept\n")
        mock_store.fail(store, 2)
        files.push()
    assert (store / "bucket/run/metrics.jsonl").read_text() == "kept\n"


def test_a_store_that_stays_away_is_one_line_and_the_files_are_kept(store, monkeypatch):
    monkeypatch.setattr(remote, "BEAT", 100)

    def cut_off(files):
        (files.local / "metrics.jsonl").write_text("kept\n")
        mock_store.fail(store, 1000)
        files.push()

    with pytest.raises(Unreachable) as error:
        run(cut_off)
    assert error.value.exit_code == 1  # started again, it may succeed
    text = str(error.value)
    assert text.startswith(f"--workdir={RUN} cannot be written (the network is down); check")
    kept = f"the files of this session remain in {working_copy(RUN, kind='runs')}"
    assert f"{kept} until the run is started again here; the same command resumes" in text
    assert (working_copy(RUN, kind="runs") / "metrics.jsonl").read_text() == "kept\n"


def test_a_missing_bucket_is_one_line(store):
    with pytest.raises(UserError, match="mock://other/run cannot be written .*that the bucket ex"):
        run(address="mock://other/run")


def test_addresses_that_cannot_hold_a_run_are_refused(store):
    with pytest.raises(UserError, match="checkpoints cannot be kept on memory://; use gs://"):
        remote.fetched("memory://bucket/run")
    with pytest.raises(UserError, match="nosuch://bucket/run cannot be used"):
        remote.checkpoint_folder("nosuch://bucket/run")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(UserError, match=r"needs the package gcsfs: pip install 'mmljax\[gcs\]"):
            remote.fetched("gs://bucket/run")
    assert remote.checkpoint_folder("gs://bucket/run") == "gs://bucket/run/checkpoints"


def test_any_file_system_of_fsspec_mirrors_the_small_files(tmp_path):
    """``memory://`` has no folders and no local files, as a bucket."""
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm("/bucket", recursive=True)
    with remote._mirrored("memory://bucket/run", tmp_path / "a") as push:
        (tmp_path / "a/metrics.jsonl").write_text("1\n")
        (tmp_path / "a/tensorboard").mkdir()
        (tmp_path / "a/tensorboard/events").write_text("2")
        push()
    with remote._mirrored("memory://bucket/run", tmp_path / "b"):
        assert (tmp_path / "b/metrics.jsonl").read_text() == "1\n"
    assert fsspec.filesystem("memory").cat_file("/bucket/run/tensorboard/events") == b"2"
    assert not fsspec.filesystem("memory").exists("/bucket/run/running.lock")


def test_reading_commands_get_a_copy_that_knows_its_checkpoints(store):
    folder = store / "bucket/run"
    (folder / "checkpoints/5").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    run = remote.fetched(RUN)
    assert (run / "config.json").read_text() == "{}"
    assert remote.checkpoints_of(run) == folder / "checkpoints"
    assert remote.checkpoints_of(store) == store / "checkpoints"  # of a local run
    assert remote.fetched(store) == store
    with pytest.raises(UserError, match="run mock://bucket/none does not exist"):
        remote.fetched("mock://bucket/none")


def test_the_copy_has_no_file_that_is_no_longer_at_the_address(store):
    """What a command wrote into it here stays."""
    folder = store / "bucket/run"
    folder.mkdir()
    for name in ("config.json", "results.json"):
        (folder / name).write_text("{}")
    run = remote.fetched(RUN)
    (run / "atlas.parquet").write_text("here")
    (folder / "results.json").unlink()
    assert remote.fetched(RUN) == run
    names = {path.name for path in run.iterdir()}
    assert names == {"address.txt", "config.json", "atlas.parquet"}


def test_many_read_at_once(store):
    folder = store / "bucket/run"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.json").write_text("{}")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(remote.fetched, [RUN] * 40))) == 1


@pytest.mark.parametrize("use", [lambda path: run(address=path), remote.fetched])
def test_an_address_that_was_made_a_path_is_refused(use):
    with pytest.raises(UserError) as error:
        use(Path("gs://bucket/run"))
    said = "gs:/bucket/run is an address with one /; give it as the text 'gs://bucket/run'"
    assert str(error.value) == said


@pytest.mark.parametrize("verb", ["doctor", "sweep"])
def test_verbs_that_need_a_folder_say_so(verb, capsys):
    assert main([verb, "--config", "quickstart", "--workdir", RUN]) == 2
    said = capsys.readouterr().err
    assert said == f"mmljax: error: --workdir={RUN}: mmljax {verb} takes a folder of this machine\n"

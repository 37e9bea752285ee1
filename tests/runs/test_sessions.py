"""Every session of a run is kept: its code, versions, devices, steps and seconds."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.runs import sessions, writer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A clock that the test sets; closes the reporters that a test leaves open."""
    now = types.SimpleNamespace(seconds=100.0, opened=[])
    fake = types.SimpleNamespace(monotonic=lambda: now.seconds)
    monkeypatch.setattr(sessions, "time", fake)
    yield now
    for reporter in now.opened:
        reporter.close()


def train(
    workdir: Path, clock: types.SimpleNamespace, steps: range, *, flush_at: tuple[int, ...] = ()
) -> writer.Reporter:
    """A process that trains ``steps``, one second each, and closes nothing."""
    reporter = writer.Reporter(
        workdir,
        start_step=steps.start,
        total_steps=10,
        batch_size=1,
        started=clock.seconds,
        stream=io.StringIO(),
    )
    clock.opened.append(reporter)
    for step in steps:
        clock.seconds += 1.0
        reporter.train(step + 1, {"loss": 1.0})
        if step + 1 in flush_at:
            reporter.progress(seconds=1.0, steps=1, waited=0.0, compilations=0)
    return reporter


def stored(workdir: Path) -> list[tuple[int, int, float]]:
    found = json.loads((workdir / "sessions.json").read_text())
    return [(s["start_step"], s["last_step"], s["seconds"]) for s in found]


def test_a_session_is_stored_at_each_flush_and_survives_a_kill(
    tmp_path: Path, clock: types.SimpleNamespace
) -> None:
    train(tmp_path, clock, range(3))
    assert not (tmp_path / "sessions.json").exists()  # nothing was flushed
    train(tmp_path, clock, range(5), flush_at=(2, 4))
    assert stored(tmp_path) == [(0, 4, 4.0)]
    reporter = train(tmp_path, clock, range(4, 10), flush_at=(6, 10))
    assert stored(tmp_path) == [(0, 4, 4.0), (4, 10, 6.0)]
    clock.seconds += 2.5
    reporter.evaluation(10, {"recall@1": 0.5})
    assert stored(tmp_path) == [(0, 4, 4.0), (4, 10, 8.5)]
    assert reporter.sessions == json.loads((tmp_path / "sessions.json").read_text())
    assert (
        writer.write_results(tmp_path, scores={}, config={}, sessions=reporter.sessions)["seconds"]
        == 12.5
    )


def test_a_process_that_trains_no_step_is_no_session(
    tmp_path: Path, clock: types.SimpleNamespace
) -> None:
    train(tmp_path, clock, range(10), flush_at=(10,))
    before = (tmp_path / "sessions.json").read_bytes()
    reporter = train(tmp_path, clock, range(10, 10))
    reporter.evaluation(10, {"recall@1": 0.5})
    assert (tmp_path / "sessions.json").read_bytes() == before
    assert len(reporter.sessions) == 1


def test_the_clock_of_the_day_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = writer.Reporter(
        tmp_path, start_step=0, total_steps=2, batch_size=1, stream=io.StringIO()
    )
    monkeypatch.setattr("time.time", lambda: -1e9)  # set back
    reporter.train(1, {"loss": 1.0})
    reporter.progress(seconds=1.0, steps=1, waited=0.0, compilations=0)
    reporter.close()
    ((_, _, seconds),) = stored(tmp_path)
    assert 0 <= seconds < 60


def test_a_session_says_what_it_ran_on(tmp_path: Path, clock: types.SimpleNamespace) -> None:
    (session,) = train(tmp_path, clock, range(1), flush_at=(1,)).sessions
    kind = jax.devices()[0].device_kind
    assert session["devices"] == {"kind": kind, "count": 8, "processes": 1}
    assert session["versions"]["jax"] == jax.__version__
    assert session["versions"]["numpy"] == np.__version__
    assert session["versions"]["python"] == sys.version.split()[0]
    assert session["git"] == sessions.git_revision()
    assert session["date"].endswith("+00:00")


@pytest.mark.parametrize("contents", ["", "{}", "null", "[3]", '[{"start_step": 1}]', "\xff"])
def test_a_damaged_file_is_refused_before_training(tmp_path: Path, contents: str) -> None:
    (tmp_path / "sessions.json").write_bytes(contents.encode("latin-1"))
    with pytest.raises(UserError, match=r"sessions.json is not a list of sessions; restore it"):
        writer.Reporter(tmp_path, start_step=1, total_steps=2, batch_size=1)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_revision_is_that_of_the_checkout_that_holds_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    code = tmp_path / "code.py"
    code.write_text("one\n")
    monkeypatch.setattr(sessions, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert sessions.git_revision() is None
    git("init", "-q")
    git("commit", "-qm", "theirs", "--allow-empty")
    assert sessions.git_revision() is None  # installed inside somebody else's checkout
    git("add", "code.py")
    git("commit", "-qm", "first")
    assert sessions.git_revision() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    code.write_text("two\n")
    assert sessions.git_revision() == {"revision": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", os.devnull)
    assert sessions.git_revision() is None

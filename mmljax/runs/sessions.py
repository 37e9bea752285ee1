"""Sessions of a run: which process, code and devices trained which steps, and for how long.

A run that is interrupted and resumed has several sessions. ``sessions.json`` in its directory lists
them, the first one first. Each entry holds

- ``date``: when the process started, UTC;
- ``git``: commit of the checkout that holds this package and whether it had uncommitted changes;
  null for an installed package;
- ``versions`` of Python and of the packages on which results depend;
- ``devices``: ``kind``, ``count``, and the number of ``processes``;
- ``start_step``, ``last_step``: updates done when the session started, and when it last wrote
  metrics. Steps after the ``start_step`` of the next session were computed again by it;
- ``seconds`` from the start of the process until ``last_step``, by a monotonic clock.

The file is replaced whole at every flush of the metrics, so a killed session is in it up to its
last flush. A process that trains no step is not in it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from mmljax.errors import UserError
from mmljax.files import write_atomically
from mmljax.text import as_json

SESSIONS = "sessions.json"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_TENSORFLOW = ("tensorflow", "tensorflow-cpu")  # whichever is installed

Session = dict[str, Any]


class Sessions:
    """The sessions of a run; the current one is added when it has trained a step."""

    def __init__(self, workdir: Path, *, start_step: int, started: float | None = None) -> None:
        """Read the earlier sessions and describe the current one.

        Args:
          workdir: the run's directory; exists.
          start_step: updates done before this session.
          started: ``time.monotonic()`` at the start of the session; now if None.

        Raises:
          UserError: if ``sessions.json`` is damaged.
        """
        import jax  # here, so that reading a run's files needs no accelerator

        self._path = workdir / SESSIONS
        self._earlier = read_sessions(workdir)
        self._started = time.monotonic() if started is None else started
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._current: Session = {
            "date": now,
            "git": git_revision(),
            "versions": versions(),
            "devices": {
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "processes": jax.process_count(),
            },
            "start_step": start_step,
            "last_step": start_step,
            "seconds": 0.0,
        }

    @property
    def all(self) -> list[Session]:
        """All sessions that trained, in order."""
        trained = self._current["last_step"] > self._current["start_step"]
        return [*self._earlier, self._current] if trained else list(self._earlier)

    def update(self, step: int) -> None:
        """Store that the current session reached ``step``, if it has trained.

        Raises:
          OSError: if the file cannot be written.
        """
        seconds = round(time.monotonic() - self._started, 3)
        self._current |= {"last_step": step, "seconds": max(0.0, seconds)}
        if step > self._current["start_step"]:
            write_atomically(self._path, as_json(self.all))


def read_sessions(workdir: Path) -> list[Session]:
    """The sessions of a run, the first one first; none if the file is absent.

    Raises:
      UserError: if the file is damaged.
    """
    path = workdir / SESSIONS
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        sessions = None
    if not isinstance(sessions, list) or not all(map(_is_session, sessions)):
        raise UserError(f"{path} is not a list of sessions; restore it, or move it away")
    return sessions


def _is_session(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("start_step")) is int
        and type(value.get("last_step")) is int
        and type(value.get("seconds")) in (int, float)
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which results depend; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in (*_PACKAGES, *_TENSORFLOW):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> dict[str, Any] | None:
    """Commit of the checkout that tracks this file, and whether it has uncommitted changes."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None

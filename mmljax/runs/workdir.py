"""Workdir lock, config check and data check: one run at a time, of one config and data set."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmljax.config import Config, to_dict
from mmljax.data.fingerprint import fingerprint_differences
from mmljax.errors import UserError
from mmljax.files import Locked, acquire_lock, write_atomically
from mmljax.mesh import is_main_process, raise_together
from mmljax.runs.reader import CONFIG
from mmljax.text import differences, one_line

DATA = "data.json"
LOCK = "running.lock"


@contextlib.contextmanager
def claimed(workdir: Path, config: Config, data: Mapping[str, Any]) -> Iterator[None]:
    """Make the workdir, lock it, and check that a run in it has this config and this data.

    The first process holds a lock on a file in it. The operating system releases the lock when the
    process ends, however it ends.

    Args:
      workdir: of the run.
      config: of the run.
      data: fingerprint of its data set (:func:`mmljax.data.fingerprint.dataset_fingerprint`).

    Raises:
      UserError: if the workdir cannot be written, is in use, or holds a run of another config or
        of other data; in all processes.
    """
    with contextlib.ExitStack() as stack:
        problem: UserError | None = None
        if is_main_process():
            try:
                stack.enter_context(_locked(workdir))
                _check_config(workdir, config)
                _check_data(workdir, data)
            except UserError as error:
                problem = error
        raise_together(problem, otherwise="the first process refused the run; see its message")
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(workdir / LOCK)
    except Locked as holder:
        raise UserError(
            f"--workdir={workdir} is in use by another run ({holder}); wait for it to end, or "
            "choose another --workdir"
        ) from None
    except OSError as error:
        raise _unusable(workdir, one_line(error)) from error
    with lock:
        yield


def _check_config(workdir: Path, config: Config) -> None:
    """Write ``config.json``, or compare with the one that is there."""
    new = to_dict(config)
    old = _kept(workdir, CONFIG, new)
    if changed := differences(old, new, prefix="config"):
        raise UserError(
            f"--workdir={workdir} holds a run of another config ({'; '.join(changed)}); "
            "choose another --workdir"
        )


def _check_data(workdir: Path, data: Mapping[str, Any]) -> None:
    """Write ``data.json``, or compare with the one that is there."""
    if changed := fingerprint_differences(_kept(workdir, DATA, data), data):
        raise UserError(
            f"--workdir={workdir} holds a run of other data ({'; '.join(changed)}): restore the "
            "data, or choose another --workdir"
        )


def _kept(workdir: Path, name: str, new: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a file in the workdir; ``new``, which is written, if there is none."""
    path = workdir / name
    try:
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(new)
        if not isinstance(old, dict):
            raise ValueError(f"it holds a JSON {type(old).__name__}, not an object")
        write_atomically(path, json.dumps(old, indent=2))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(workdir, f"{name}: {one_line(error)}") from error
    return old


def _unusable(workdir: Path, reason: str) -> UserError:
    return UserError(f"--workdir={workdir} cannot be used ({reason}); choose another --workdir")

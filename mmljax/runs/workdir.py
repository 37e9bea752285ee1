"""The workdir: made where it can be, of one config, and of one run at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from mmljax.config import Config, to_dict
from mmljax.errors import UserError
from mmljax.mesh import agree, is_main_process
from mmljax.runs import writer
from mmljax.text import differences

LOCK = "running.lock"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(workdir: Path, config: Config) -> Iterator[None]:
    """Make the workdir, or check that the run in it is this one and goes on nowhere else.

    The first process holds a lock on a file in it, which the system takes back however the process
    ends.

    Raises:
      UserError: if it cannot be written, is in use, or holds a run of another config; in all
        processes.
    """
    with contextlib.ExitStack() as stack:
        problem: UserError | None = None
        if is_main_process():
            try:
                _make(workdir)
                stack.enter_context(_locked(workdir))
                _check_config(workdir, config)
            except UserError as error:
                problem = error
        if not agree(problem is None):
            raise problem or UserError("the first process refused the run; its message says why")
        yield


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    path = workdir / LOCK
    try:
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--workdir={workdir} is in use by another run ({file.read().strip()}); wait for "
                "it to end, or choose another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            _log.warning("%s cannot be locked (%s): start no second run there", path, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _check_config(workdir: Path, config: Config) -> None:
    path, now = workdir / "config.json", to_dict(config)
    try:
        before = json.loads(path.read_text()) if path.exists() else now
        writer.write_atomically(path, json.dumps(before, indent=2))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--workdir={workdir} cannot be used: {error}") from error
    if changed := differences(before, now, prefix="config"):
        raise UserError(
            f"--workdir={workdir} holds a run of another config ({'; '.join(changed)}); "
            "choose another --workdir"
        )

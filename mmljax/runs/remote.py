"""Runs whose workdir is an address, such as ``gs://bucket/run``.

Such a run writes its small files (all but the checkpoints) into a working copy, which is a folder
of this machine. Before each checkpoint and at the end, the first process copies those that changed
to the address, each whole, so that a reader sees the old file or the new one. A run that resumes,
on this machine or another, begins with the files at the address. Orbax writes checkpoints to the
address itself, each process its part. So the rows of a checkpoint's steps are there before it is.

``running.lock`` at the address names the run that may write. Its holder rewrites it every ``BEAT``
seconds; a lock that was not rewritten for ``DEAD`` seconds is one of a machine that is gone.

The working copy holds its address in ``address.txt`` and is otherwise a run's directory like any.
Commands that read a run have a copy of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmljax.data.paths import is_address, is_remote
from mmljax.errors import Unreachable, UserError, require
from mmljax.files import acquire_lock, working_copy, write_atomically
from mmljax.mesh import is_main_process, raise_together
from mmljax.text import one_line

LOCK, ADDRESS, CHECKPOINTS = "running.lock", "address.txt", "checkpoints"
BEAT = 20.0  # seconds between two refreshes of a lock
DEAD = 120.0  # seconds without a refresh, after which the holder of a lock counts as dead
PAUSES = (1.0, 3.0, 10.0)  # seconds before a failed call is repeated

_log = logging.getLogger(__name__)


class LockLost(Unreachable):
    """Another run has taken the address over; started again, this one would fight it."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its files."""

    local: Path  # folder of all but the checkpoints
    checkpoints: Path | str  # a path, or an address
    name: str  # the workdir, as the user named it
    push: Callable[[], None] = lambda: None
    """Copies what changed to the address; of a local run, and on other processes, nothing."""

    @property
    def remote(self) -> bool:
        """Whether the workdir is an address."""
        return is_remote(self.name)

    def shown(self, text: Path | str) -> str:
        """A path or text with the workdir's name in place of the working copy's."""
        return str(text).replace(str(self.local), self.name)


@contextlib.contextmanager
def opened(workdir: Path | str) -> Iterator[RunFiles]:
    """The files of a run that trains; an address is locked, and its files are copied here.

    Raises:
      UserError: if the address cannot be used or is in use; in all processes.
    """
    if not is_address(workdir):
        local = Path(workdir)
        yield RunFiles(local, local / CHECKPOINTS, str(local))
        return
    address = str(workdir).rstrip("/")
    with contextlib.ExitStack() as stack:
        files = RunFiles(working_copy(address, kind="runs"), checkpoint_folder(address), address)
        problem: UserError | None = None
        if is_main_process():
            try:
                push = stack.enter_context(_mirrored(address, files.local))
                files = dataclasses.replace(files, push=push)
            except UserError as error:
                problem = error
        raise_together(problem, otherwise="the first process refused the run; see its message")
        try:
            yield files
        except Unreachable:
            raise
        except UserError as error:
            raise UserError(files.shown(str(error))) from error


def fetched(run: Path | str) -> Path:
    """A run's directory; of an address, a local copy of its small files.

    The checkpoints stay where they are (:func:`checkpoints_of`). Files that are no longer at the
    address are removed from the copy; what was written into it here stays.

    Raises:
      UserError: if the address cannot be read, or holds no run.
    """
    if not is_address(run):
        return Path(run)
    address = str(run).rstrip("/")
    checkpoint_folder(address)  # refuses what cannot be read later
    store = _Store(address, named="run ")
    local = working_copy(address, kind="read")
    local.mkdir(parents=True, exist_ok=True)
    copied = local.parent / "copied.txt"
    with acquire_lock(local.parent / "lock", wait=True):  # of commands that read at once
        names = _pull(store, local)
        before = copied.read_text(encoding="utf-8").splitlines() if copied.exists() else []
        for name in set(before) - set(names):
            (local / name).unlink(missing_ok=True)
        write_atomically(copied, "\n".join(names))
    if not names:
        raise UserError(f"run {address} does not exist; give the --workdir of a run")
    return local


def checkpoints_of(run: Path) -> Path | str:
    """Where the checkpoints of a run's directory, or of a copy of its small files, are."""
    try:
        return checkpoint_folder((run / ADDRESS).read_text(encoding="utf-8"))
    except OSError:
        return run / CHECKPOINTS


def checkpoint_folder(address: str) -> Path | str:
    """Where the checkpoints of an address are.

    Orbax writes to ``gs://`` itself. A file system of fsspec that keeps its files in local folders
    (``local_file``), as that of the tests does, has its checkpoints in them.

    Raises:
      UserError: on other file systems.
    """
    if address.startswith("gs://"):
        return f"{address}/{CHECKPOINTS}"
    files, root = _file_system(address)
    if getattr(files, "local_file", False):
        return Path(root) / CHECKPOINTS
    scheme = address.partition("://")[0]
    raise UserError(
        f"{address}: checkpoints cannot be kept on {scheme}://; use gs://BUCKET/RUN, or mount the "
        "store as a folder and name that"
    )


def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    if address.startswith("gs://"):
        require("gcsfs", extra="gcs", purpose=address)
    require("fsspec", extra="gcs", purpose=address)
    import fsspec

    try:
        return fsspec.core.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # an unknown scheme, or its package is absent
        reason = one_line(error)
        raise UserError(f"{address} cannot be used ({reason}); use gs://BUCKET/RUN") from error


class _Store:
    """The files at an address. A call that fails is repeated, and then is one line."""

    def __init__(self, address: str, *, named: str = "--workdir=") -> None:
        self.address = address
        self._named = named
        self._files, self._root = _file_system(address)

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if it is absent."""
        try:
            return self._call("read", self._files.cat_file, f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def write(self, name: str, contents: bytes, *, create: bool = False) -> None:
        """Replace a file.

        Raises:
          FileExistsError: if it exists and ``create`` is true.
        """
        path = f"{self._root}/{name}"
        if getattr(self._files, "local_file", False):
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        mode = "create" if create else "overwrite"
        try:
            self._call("written", self._files.pipe_file, path, contents, mode=mode)
        except FileNotFoundError as error:  # what a bucket that does not exist says
            raise self._unreachable("written", error) from error

    def delete(self, name: str) -> None:
        """Remove a file, which may be absent."""
        with contextlib.suppress(FileNotFoundError):
            self._call("written", self._files.rm_file, f"{self._root}/{name}")

    def names(self) -> list[str]:
        """Of the files directly at the address."""
        try:
            entries = self._call("read", self._files.ls, self._root, detail=True)
        except FileNotFoundError:
            return []
        names = [e["name"].rpartition("/")[2] for e in entries if e["type"] == "file"]
        return [name for name in names if name not in ("", ".", "..", LOCK, ADDRESS)]

    def _call(self, done: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        pauses = iter(PAUSES)
        while True:
            try:
                return call(*arguments, **options)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # network libraries raise anything
                pause = next(pauses, None)
                if pause is None or isinstance(error, PermissionError):
                    raise self._unreachable(done, error) from error
                time.sleep(pause)

    def _unreachable(self, done: str, error: Exception) -> Unreachable:
        return Unreachable.of(f"{self._named}{self.address}", done, one_line(error))


class _Lock:
    """The lock of an address while it is entered; a thread refreshes it."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._holder = {
            "token": secrets.token_hex(8),
            "host": os.uname().nodename,
            "machine": _machine(),
            "process": os.getpid(),
        }
        self._ended = threading.Event()
        self._refresher = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> _Lock:
        while True:
            held = self._store.read(LOCK)
            if held is None:
                with contextlib.suppress(FileExistsError):
                    self._store.write(LOCK, self._contents(), create=True)
                continue
            if self._is_ours(held):
                break
            if self._is_dead(held):  # two that find this at once: the last to write has it
                _log.warning("%s/%s is taken over from a run that ended", self._store.address, LOCK)
                self._store.write(LOCK, self._contents())
        self._refresher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._refresher.join(timeout=BEAT)  # else it could write the lock again
        with contextlib.suppress(UserError):
            if self._is_ours(self._store.read(LOCK)):
                self._store.delete(LOCK)

    def check(self) -> None:
        """Refuse to go on without the lock.

        Raises:
          LockLost: if another run has it, or it was deleted.
          Unreachable: if it cannot be read.
        """
        held = self._store.read(LOCK)
        if not self._is_ours(held):
            who = f"was taken over by {_holder(held)}" if held else "was deleted"
            raise LockLost(
                f"--workdir={self._store.address}: its {LOCK} {who}, so this run stops and writes "
                "nothing more there"
            )

    def _is_dead(self, held: bytes) -> bool:
        """Whether the holder of a lock has ended; where that is not known, the lock is watched.

        Raises:
          UserError: if the holder is alive.
        """
        holder = _parsed(held)
        process = holder.get("process")
        if holder.get("machine") == _machine() and type(process) is int and not _runs(process):
            return True
        # The clocks of two machines may differ, so it is always watched for more than a beat.
        age = time.time() - float(holder.get("time", 0))
        patience = min(max(DEAD - age, 1.5 * BEAT), DEAD)
        _log.warning(
            "%s is locked by %s; waiting %.0f s for a sign that this run has ended",
            self._store.address,
            _holder(held),
            patience,
        )
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(BEAT / 10)
            now = self._store.read(LOCK)
            if now is None:  # its holder released it, and a third run may take it
                return False
            if now != held:
                raise UserError(
                    f"--workdir={self._store.address} is in use by another run ({_holder(now)}); "
                    "choose another --workdir, or end that run; to take over, delete "
                    f"{self._store.address}/{LOCK}, and that run will stop"
                )
        return True

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(UserError):  # the next push says so
                if not self._is_ours(self._store.read(LOCK)):
                    return
                if not self._ended.is_set():
                    self._store.write(LOCK, self._contents())

    def _contents(self) -> bytes:
        return json.dumps(self._holder | {"time": time.time()}).encode()

    def _is_ours(self, held: bytes | None) -> bool:
        return held is not None and _parsed(held).get("token") == self._holder["token"]


def _parsed(held: bytes) -> dict[str, Any]:
    """What a lock holds; nothing if it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        holder = json.loads(held)
        if isinstance(holder, dict) and isinstance(holder.get("time"), int | float):
            return holder
    return {}


def _holder(held: bytes) -> str:
    holder = _parsed(held)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(holder.get("time", 0)))
    return f"process {holder.get('process')} on {holder.get('host')}, seen at {when} UTC"


def _machine() -> str:
    """What two processes share whose ids can be compared: the boot and the namespace of ids."""
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _runs(process: int) -> bool:
    """Whether another process of that id runs here."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


@contextlib.contextmanager
def _mirrored(address: str, local: Path) -> Iterator[Callable[[], None]]:
    """Lock an address and copy its files; yield what copies changed files back, as the end does."""
    store = _Store(address)
    with _Lock(store) as lock:
        shutil.rmtree(local, ignore_errors=True)
        push = _Push(store, lock, local, known=_pull(store, local))
        remain = f"the files of this session remain in {local} until the run is started again here"
        try:
            yield push
            push()
        except Unreachable as error:
            cure = "the same command resumes the run from what was saved before"
            raise type(error)(f"{error}; {remain}; {cure}") from error
        except BaseException:
            try:
                push()
            except UserError as error:
                _log.warning("%s; %s", error, remain)
            raise


def _pull(store: _Store, local: Path) -> list[str]:
    """Copy the files at an address into a folder, and return their names."""
    names = store.names()
    local.mkdir(parents=True, exist_ok=True)
    write_atomically(local / ADDRESS, store.address)
    for name in names:
        contents = store.read(name)
        if contents is not None:
            write_atomically(local / name, contents)
    return names


class _Push:
    """Copies the files of a folder that changed since the last call to an address."""

    def __init__(self, store: _Store, lock: _Lock, local: Path, *, known: list[str]) -> None:
        self._store, self._lock, self._local = store, lock, local
        self._seen = {name: self._mark(local / name) for name in known}

    def __call__(self) -> None:
        """Copy them.

        Raises:
          Unreachable: if that fails.
          LockLost: if the lock is lost.
        """
        self._lock.check()
        # Unlike rglob, walk passes over folders that vanish meanwhile.
        paths = [Path(folder, name) for folder, _, names in os.walk(self._local) for name in names]
        for path in sorted(paths):
            name = path.relative_to(self._local).as_posix()
            if not path.is_file() or path.suffix == ".partial" or name in (LOCK, ADDRESS):
                continue
            with contextlib.suppress(FileNotFoundError):  # it vanished
                mark = self._mark(path)
                if self._seen.get(name) != mark:
                    self._store.write(name, path.read_bytes())
                    self._seen[name] = mark

    @staticmethod
    def _mark(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_size, found.st_mtime_ns

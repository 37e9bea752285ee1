"""Checkpoints through orbax: asynchronous, atomic; the last N and the best are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# etils asks once, when the first path is used. gs:// goes through gcsfs, as the small files do: so
# both have one account, and TensorFlow may be built without gs://.
if find_spec("gcsfs") is not None:
    os.environ.setdefault("EPATH_USE_TF", "0")

import orbax.checkpoint as ocp
from etils import epath

from mmljax.data.paths import is_remote
from mmljax.errors import Unreachable, UserError
from mmljax.mesh import is_main_process, raise_together
from mmljax.text import one_line
from mmljax.types import TrainState

_ITEM = "default"  # the folder in which orbax keeps the arrays
TORN = "torn"  # folder of checkpoints that could not be read
PAUSE = 5.0  # seconds before a checkpoint at an address is read again
_LEAST_PART = 2**20  # bytes

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, by step.

    A checkpoint holds the train state: parameters, optimiser state, BatchNorm statistics, their
    moving average if the run has one, contribution weights, cross-batch memory, random key and the
    step, which is also the position in the data. It is written to a temporary folder and renamed
    when whole, so a run that is killed while saving resumes from the one before. One that cannot be
    read all the same is reported and moved into ``torn`` beside the others (in a bucket, beside
    their folder), and the one before it is used.

    Raises:
      UserError: if there are checkpoints and none can be read; then none is moved.
      Unreachable: if they are at an address that cannot be read.
    """

    def __init__(
        self, directory: Path | str, *, keep_last: int, keep_best: int, best_by: str = "recall@1"
    ) -> None:
        """Open a folder of checkpoints, which may be empty or missing.

        Args:
          directory: of the checkpoints; a path, or an address such as ``gs://bucket/checkpoints``.
          keep_last: how many of the latest are kept.
          keep_best: how many of the best are kept.
          best_by: the score that ranks them.
        """
        self._best_by = best_by
        self.directory = directory = located(directory)
        """Where the steps' folders are."""
        problem: UserError | None = None
        if is_main_process():
            try:
                with _reaching(directory):
                    _set_aside_torn(directory)
            except UserError as error:
                problem = error
        raise_together(problem, otherwise="the first process found no whole checkpoint")
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_last),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[best_by],
                        n=keep_best,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            best_fn=lambda metrics: metrics[best_by],
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        with _reaching(directory):
            self._manager = ocp.CheckpointManager(
                directory, options=options, item_handlers=_array_handler()
            )

    def save(
        self,
        state: TrainState | Mapping[str, Any],
        *,
        step: int,
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Start saving; the state may be donated or changed as soon as this returns.

        Args:
          state: of a run, or a part of one by its names.
          step: of the checkpoint.
          metrics: scores of the state, if it was evaluated.

        Raises:
          UserError: if this or the save before could not be written.
          Unreachable: the same, at an address.
        """
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.PyTreeSave(_flat(state)),
                metrics=None if metrics is None else {self._best_by: float(metrics[self._best_by])},
                force=True,
            )

    def restore(self, target: TrainState, *, rows: TrainState | None = None) -> TrainState | None:
        """The latest checkpoint, laid out as ``target``; None where there is none.

        Args:
          target: arrays or ShapeDtypeStructs with the shardings that are wanted, on any number of
            devices.
          rows: of each array the rows that are not padding, 0 where it has none
            (:func:`mmljax.training.state.real_rows`). Further rows are cut or filled with zeros, so
            that padding may have any length. No array has padding if None.

        Raises:
          UserError: if it is of another state.
          Unreachable: if it is at an address that cannot be read.
        """
        with _reaching(self.directory):
            step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
        )
        flat = _flat(abstract)
        real = {} if rows is None else _flat(rows)
        shapes = PartialCheckpoint(self.directory, step=step).shapes()
        wrong = [
            f"{name} {shapes.get(name, 'absent')} in place of {leaf.shape}"
            for name, leaf in flat.items()
            if name not in shapes or not _fits(shapes[name], leaf, rows=real.get(name, 0))
        ] + [f"{name} not wanted" for name in shapes.keys() - flat.keys()]
        if wrong:
            raise UserError(
                f"checkpoint {self.directory / str(step)} is of another network or data set "
                f"({'; '.join(wrong[:3])}); choose another --workdir"
            )
        kinds = {
            name: dataclasses.replace(kind, strict=False)  # cuts and fills
            for name, kind in ocp.checkpoint_utils.construct_restore_args(flat).items()
        }
        arguments = ocp.args.PyTreeRestore(item=flat, restore_args=kinds)
        with _reaching(self.directory):
            return _like(target, self._manager.restore(step, args=arguments))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _reaching(self.directory, "written"):
                yield
        except Unreachable:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # orbax, tensorstore
            whole = steps_in(self.directory)
            last = f"the last whole one is of step {whole[-1]}" if whole else "there is none yet"
            raise UserError(
                f"a checkpoint could not be written into {self.directory} ({one_line(error)}); "
                f"{last}: make room, then run the same command again"
            ) from error

    def close(self) -> None:
        """Wait for saves under way.

        Raises:
          UserError: if one could not be written.
          Unreachable: the same, at an address.
        """
        with self._writing():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()


def _array_handler(processes: Any = None) -> ocp.PyTreeCheckpointHandler:
    """Reads and writes flat dicts of arrays, by all processes unless others are named.

    Each device writes its part of a replicated array only where a part is large enough. By default
    orbax cuts every array, by a program for each shape and device that is compiled at the first
    save, and training waits.
    """
    kinds = ocp.type_handlers
    arrays = kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=kinds.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, kinds.NumpyHandler())
        ),
        multiprocessing_options=processes or ocp.options.MultiprocessingOptions(),
    )


def located(directory: Path | str) -> Path:
    """A folder of this machine as an absolute path; an address as a path with its methods."""
    return epath.Path(directory) if is_remote(directory) else Path(directory).absolute()


@contextlib.contextmanager
def _reaching(directory: Path, done: str = "read") -> Iterator[None]:
    """Make an error within the block, where the folder is an address, one of the address."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # network libraries raise anything
        if not is_remote(directory):
            raise
        raise Unreachable.of(directory, done, one_line(error)) from error


def is_in(directory: Path | str) -> bool:
    """Whether a folder or address, which may be missing, holds a whole checkpoint.

    Raises:
      Unreachable: if it is an address that cannot be read.
    """
    return bool(steps_in(directory))


def steps_in(directory: Path | str) -> list[int]:
    """The steps of finished checkpoints in a folder, which may be missing, in rising order.

    Raises:
      Unreachable: if it is an address that cannot be read.
    """
    directory = located(directory)
    with _reaching(directory):
        return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


class PartialCheckpoint:
    """One checkpoint, read array by array by this process alone; nothing is written.

    Raises:
      UserError: if it cannot be read.
    """

    def __init__(self, directory: Path | str, *, step: int) -> None:
        self._path = located(directory) / str(step)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all arrays by name, such as ``params.proxies``; no array is read."""
        with self._reading() as reader:
            return {name: tuple(leaf.shape) for name, leaf in self._leaves(reader).items()}

    def restore(self, target: Any) -> Any:
        """Some of the arrays, laid out as ``target``; no other one is read.

        Args:
          target: a part of a train state with the same names, of ShapeDtypeStructs with the
            shardings that are wanted.
        """
        kinds = ocp.checkpoint_utils.construct_restore_args(_flat(target))
        with self._reading() as reader:
            return _like(target, self._read(reader, kinds))

    def check(self) -> None:
        """Read every array, one after the other: if one fails, no other read is under way."""
        with self._reading() as reader:
            for name in self._leaves(reader):
                self._read(reader, {name: ocp.RestoreArgs(restore_type=np.ndarray)})

    def _leaves(self, reader: Any) -> dict[str, Any]:
        found = reader.metadata(self._path / _ITEM).item_metadata
        if found is None:  # orbax has only logged why
            raise ValueError("its list of arrays is absent or damaged")
        return dict(found.tree)

    def _read(self, reader: Any, kinds: dict[str, ocp.RestoreArgs]) -> dict[str, Any]:
        arguments = ocp.args.PyTreeRestore(item=kinds, restore_args=kinds, partial_restore=True)
        return reader.restore(self._path / _ITEM, args=arguments)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        alone = ocp.options.MultiprocessingOptions()
        if jax.process_count() > 1:
            process = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=process,
                active_processes={process},
                barrier_sync_key_prefix=f"reader{process}",
            )
        handler = _array_handler(alone)
        try:
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
                yield reader
        except UserError:
            raise
        except Exception as error:  # damaged arrays make orbax raise almost anything
            reason, cure = one_line(error), "name another --step of this run"
            if is_remote(self._path):
                shown, cure = f"checkpoint {self._path}", f"; if this one is damaged, {cure}"
                raise Unreachable.of(shown, "read", reason, more=cure) from error
            raise UserError(f"checkpoint {self._path} cannot be read ({reason}); {cure}") from error


def _set_aside_torn(directory: Path) -> None:
    """Move checkpoints that cannot be read into ``torn``, if another one can be read."""
    # Among the checkpoints of a bucket, orbax would delete it, as one that was not finished.
    bucket = is_remote(directory)
    torn = (directory.parent if bucket else directory) / TORN
    problems = {}
    whole = False
    for step in reversed(steps_in(directory)):
        problem = _problem_of(directory, step, arrays=not whole)
        if problem and bucket:  # the network may have failed
            time.sleep(PAUSE)
            problem = _problem_of(directory, step, arrays=not whole)
        if problem:
            problems[step] = problem
        whole |= not problem
    if problems and not whole:
        reasons = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
        cure = "restore them from a copy, or start again with another --workdir"
        if bucket:
            more = f"; if all are damaged, {cure}"
            raise Unreachable.of(f"the checkpoints of {directory}", "read", reasons, more=more)
        raise UserError(f"no checkpoint of {directory} can be read ({reasons}); {cure}")
    for step, problem in problems.items():
        _log.warning("checkpoint of step %d cannot be read and is skipped (%s)", step, problem)
        torn.mkdir(exist_ok=True)
        if bucket:  # which has a folder when it has a file
            (torn / f"{step}.txt").write_text(problem)
        (directory / str(step)).rename(torn / f"{step}-{time.time_ns()}")


def _problem_of(directory: Path, step: int, *, arrays: bool) -> str:
    """Why a checkpoint cannot be read; empty if it can."""
    try:
        scores = directory / str(step) / "metrics/metrics"
        if scores.exists():
            json.loads(scores.read_text(encoding="utf-8"))
        if arrays:
            PartialCheckpoint(directory, step=step).check()
    except UserError as error:
        return one_line(error.__cause__ or error)
    except (OSError, ValueError) as error:
        return f"its scores: {one_line(error)}"
    return ""


def _fits(saved: tuple[int, ...], wanted: Any, *, rows: int) -> bool:
    """Whether a saved array can be restored as another, of which so many rows are not padding."""
    return saved == wanted.shape or 0 < rows <= saved[0] and saved[1:] == wanted.shape[1:]


def _keys(state: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]


def _flat(state: Any) -> dict[str, Any]:
    """The leaves by path, without empty containers; random keys as their words."""
    return {
        name: _words(leaf) if _is_random_key(leaf) else leaf
        for name, leaf in zip(_keys(state), jax.tree.leaves(state), strict=True)
    }


def _like(target: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of ``_flat``."""
    leaves = [
        jax.random.wrap_key_data(flat[name]) if _is_random_key(leaf) else flat[name]
        for name, leaf in zip(_keys(target), jax.tree.leaves(target), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _is_random_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _words(key: Any) -> Any:
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    words = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=key.sharding)

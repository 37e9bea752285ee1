"""Thin wrapper of orbax: asynchronous saves, the last N and the best kept, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mmljax.types import TrainState

BEST_BY = "recall@1"


class Checkpoints:
    """The checkpoints of one run, by step.

    A checkpoint holds the train state: parameters, optimiser state, BatchNorm statistics,
    contribution weights, cross-batch memory, random key and the step, which is also the position
    in the data. It is written aside and renamed when whole, so a run killed while saving goes on
    from the one before.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_best: int) -> None:
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep_last),
                        policies.BestN(
                            get_metric_fn=lambda metrics: metrics[BEST_BY],
                            n=keep_best,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                best_fn=lambda metrics: metrics[BEST_BY],
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, *, step: int, metrics: Mapping[str, float] | None) -> None:
        """Start saving; the state may be donated or changed as soon as this returns."""
        self._manager.save(
            step,
            args=ocp.args.StandardSave(_without_empty(state)),
            metrics=None if metrics is None else {BEST_BY: float(metrics[BEST_BY])},
            force=True,
        )

    def restore(self, target: TrainState) -> TrainState | None:
        """The latest whole checkpoint, laid out as ``target``; None where there is none.

        Args:
          target: arrays or ShapeDtypeStructs with the shardings that are wanted, on any number of
            devices.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
        )
        restored = self._manager.restore(
            step, args=ocp.args.StandardRestore(_without_empty(abstract))
        )
        leaves = [restored[key] for key in _keys(target)]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)

    @property
    def directory(self) -> Path:
        """Where the steps' folders are."""
        return Path(self._manager.directory)

    def best_step(self) -> int | None:
        """The step of the best checkpoint by Recall@1, None before the first evaluation."""
        return self._manager.best_step()

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def is_in(directory: Path) -> bool:
    """Whether a folder, which may be missing, holds a whole checkpoint."""
    if not directory.is_dir():
        return False
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        return manager.latest_step() is not None


def _keys(state: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]


def _without_empty(state: Any) -> dict[str, Any]:
    """The leaves by path: a flat dict, in which no empty container is left for orbax to judge."""
    return dict(zip(_keys(state), jax.tree.leaves(state), strict=True))

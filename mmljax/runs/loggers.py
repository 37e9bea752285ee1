"""Where a run's scalars go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

Each is a class with ``scalars`` and ``close``, made only if the config asks for it. A run that was
broken off goes on in the same run there too, whose name is kept in the workdir. What it computes
again is there twice (MLflow), hidden (TensorBoard) or once, as it was first (Weights & Biases);
``metrics.jsonl`` is the record.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mmljax.config import LogConfig
from mmljax.errors import UserError
from mmljax.runs.writer import write_atomically

_log = logging.getLogger(__name__)


class Logger(Protocol):
    """A place for scalars."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values after ``step`` updates."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, workdir: Path, *, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        # Hides what an earlier attempt wrote from this step on.
        purge = start_step and start_step + 1
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values after ``step`` updates."""
        for name, value in values.items():
            self._writer.add_scalar(_plain(name), value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its own settings (``WANDB_*``) say where and how."""

    def __init__(self, workdir: Path, *, config: Mapping[str, Any]) -> None:
        import wandb

        known = _known_name(workdir / "wandb.id")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mmljax"),
            name=workdir.name,
            id=known,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
        )
        write_atomically(workdir / "wandb.id", self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values after ``step`` updates."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at ``MLFLOW_TRACKING_URI``."""

    def __init__(self, workdir: Path, *, config: Mapping[str, Any]) -> None:
        import mlflow

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        known = _known_name(workdir / "mlflow.id")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mmljax")
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            known = self._client.create_run(experiment, run_name=workdir.name).info.run_id
            write_atomically(workdir / "mlflow.id", known)
            for key, value in _flat(config).items():
                self._client.log_param(known, key, value)
        self._name = known

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values after ``step`` updates."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(_plain(k), v, now, step) for k, v in values.items()]
        self._client.log_batch(self._name, metrics=metrics)

    def close(self) -> None:
        """Say that the run has ended, for now."""
        self._client.set_terminated(self._name)


def make_loggers(
    log: LogConfig, workdir: Path, *, config: Mapping[str, Any], start_step: int
) -> list[Logger]:
    """What ``config.log`` asks for.

    Args:
      log: which.
      workdir: the run's directory, which is there.
      config: the run's, as a plain dict.
      start_step: from which the run goes on.

    Raises:
      UserError: if one that is no default is not installed, or cannot be reached.
    """
    loggers: list[Logger] = []
    if log.tensorboard:
        try:
            loggers.append(TensorBoard(workdir, start_step=start_step))
        except ImportError:
            _log.warning(
                "no TensorBoard: tensorboardX is absent; pip install 'mmljax[plot]' brings it, "
                "--config.log.tensorboard=False silences this"
            )
    for name, asked, kind in (("wandb", log.wandb, WandB), ("mlflow", log.mlflow, MLflow)):
        if not asked:
            continue
        try:
            loggers.append(kind(workdir, config=config))
        except ImportError as error:
            raise UserError(
                f"--config.log.{name}=True needs pip install 'mmljax[{name}]' ({error})"
            ) from error
        except Exception as error:  # a service that is away fails in any way
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"--config.log.{name}=True: no run can be begun there ({text}); check its settings "
                f"in the environment, or set --config.log.{name}=False"
            ) from error
    return loggers


def _plain(name: str) -> str:
    """Without ``@``, which TensorBoard and MLflow do not allow in a name."""
    return name.replace("@", "_")


def _known_name(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

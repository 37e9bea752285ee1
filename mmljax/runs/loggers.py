"""Optional destinations of a run's scalars: TensorBoard, Weights & Biases, MLflow.

Each is a class with ``scalars`` and ``close``, made only if the config asks for it. A resumed run
continues the same run of the service, whose id is stored in the workdir. Steps that are computed
again appear twice in MLflow, replace the earlier ones in TensorBoard, and are ignored by Weights &
Biases; ``metrics.jsonl`` is the reference.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mmljax.config import LogConfig
from mmljax.errors import UserError, require
from mmljax.files import write_atomically
from mmljax.text import one_line

_log = logging.getLogger(__name__)


class Logger(Protocol):
    """A destination of scalars."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values after ``step`` updates."""

    def close(self) -> None:
        """Send what is buffered."""


class TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, workdir: Path, *, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        # TensorBoard then hides what an interrupted session wrote after this step.
        purge = start_step and start_step + 1
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values after ``step`` updates."""
        for name, value in values.items():
            self._writer.add_scalar(_plain(name), value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, configured by its environment variables (``WANDB_*``)."""

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
        """Send what is buffered."""
        self._run.finish()


class MLflow:
    """A run of MLflow at ``MLFLOW_TRACKING_URI``."""

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
        """Mark the run as ended; a later session reopens it."""
        self._client.set_terminated(self._name)


def make_loggers(
    log: LogConfig, workdir: Path, *, config: Mapping[str, Any], start_step: int
) -> list[Logger]:
    """The loggers that ``config.log`` asks for.

    Args:
      log: the section of the config.
      workdir: the run's directory; exists.
      config: the whole config as a plain dict.
      start_step: the restored step, or 0.

    Raises:
      UserError: if Weights & Biases or MLflow is not installed or cannot be reached, or the folder
        of TensorBoard cannot be written. TensorBoard that is not installed is a warning.
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
        except OSError as error:
            raise UserError(
                f"{workdir / 'tensorboard'} cannot be written ({one_line(error)}); move it away, "
                "or set --config.log.tensorboard=False"
            ) from error
    for name, asked, kind in (("wandb", log.wandb, WandB), ("mlflow", log.mlflow, MLflow)):
        if not asked:
            continue
        require(name, extra=name, purpose=f"--config.log.{name}=True")
        try:
            loggers.append(kind(workdir, config=config))
        except Exception as error:  # an unreachable service fails in any way
            raise UserError(
                f"--config.log.{name}=True: no run can be started ({one_line(error)}); check its "
                f"settings in the environment, or set --config.log.{name}=False"
            ) from error
    return loggers


def _plain(name: str) -> str:
    """The name without ``@``, which TensorBoard and MLflow do not allow."""
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

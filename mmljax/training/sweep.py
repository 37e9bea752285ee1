"""Several heads on features trained side by side: seeds, rates and other settings.

Runs that differ in their seed, learning rates and weight decays alone are one compiled program,
vectorised by ``jax.vmap``; other settings are trained group after group. Each run has a directory
of its own, as if it had been trained alone.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmljax.config import Config, GroupConfig, to_dict
from mmljax.data import feature_pipeline, load
from mmljax.data.fingerprint import dataset_fingerprint
from mmljax.data.readers.features import copy_identity
from mmljax.durations import RunSize
from mmljax.errors import UserError
from mmljax.files import write_atomically
from mmljax.mesh import AXIS, make_mesh, replicated
from mmljax.retrieval import records
from mmljax.retrieval.checks import check_evaluation
from mmljax.retrieval.evaluate import make_embed_pooled
from mmljax.runs import writer
from mmljax.runs.workdir import claimed
from mmljax.text import one_line, text_table
from mmljax.training import checkpoints, neighbors, optim
from mmljax.training.loop import make_score
from mmljax.training.proxies import init_proxies
from mmljax.training.state import partition_specs
from mmljax.training.step import make_train_step
from mmljax.training.trainer import Trainer, make_objective, make_trainer
from mmljax.types import Batch, Dataset, TrainState

RESULTS = "sweep.json"

_log = logging.getLogger(__name__)


class Run(NamedTuple):
    """One run of a sweep."""

    setting: str  # what is varied, as ``key=value, ...``; "" if only the seed is
    config: Config  # with its seed
    workdir: Path


def sweep(runs: Sequence[Run], workdir: Path) -> list[dict[str, Any]]:
    """Train heads on features side by side, and write a table of their scores.

    Runs that are complete already are not trained again. A run whose loss or embeddings are not
    finite fails alone.

    Args:
      runs: of one data set of features; each has a directory of its own.
      workdir: of the sweep, for ``sweep.json``.

    Returns:
      The rows of ``sweep.json``: ``setting``, ``seed``, ``run`` and ``scores``, or ``error``.

    Raises:
      UserError: if a config cannot be used or is not of features, or a directory holds another run.
    """
    for run in runs:
        if run.config.data.source != load.FEATURES:
            raise UserError(
                "a sweep trains heads on features: make them with mmljax features, and set "
                "--config.data.source=features; for images, start a run per seed"
            )
    rows: dict[Path, dict[str, Any]] = {}
    for group in _groups(runs):
        for run, found in zip(group, _train_group(group), strict=True):
            rows[run.workdir] = {
                "setting": run.setting,
                "seed": run.config.seed,
                "run": run.workdir.name,
                **found,
            }
    ordered = [rows[run.workdir] for run in runs]
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / RESULTS, json.dumps(ordered, indent=2))
    return ordered


def sweep_table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Means and standard deviations over the seeds of each setting, in per cent.

    Args:
      rows: of :func:`sweep`.
      keys: names of scores.
    """
    settings = dict.fromkeys(row["setting"] for row in rows)
    table = [("setting", "seeds", *(writer.score_name(key) for key in keys))]
    for setting in settings:
        own = [row for row in rows if row["setting"] == setting]
        scored = [row["scores"] for row in own if "scores" in row]
        failed = f", {len(own) - len(scored)} failed" if len(scored) < len(own) else ""
        cells = [_mean([100 * scores[key] for scores in scored]) for key in keys]
        table.append((setting or "as configured", f"{len(scored)}{failed}", *cells))
    return text_table(table)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs that one program can train, in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(to_dict(_static(run.config)), sort_keys=True), []).append(run)
    yield from groups.values()


def _static(config: Config) -> Config:
    """A config without what may differ within one program."""
    same: dict[str, Any] = dict.fromkeys(optim.GROUPS, GroupConfig(0.0, 0.0))
    return dataclasses.replace(
        config, seed=0, optimizer=dataclasses.replace(config.optimizer, **same)
    )


def _train_group(group: Sequence[Run]) -> list[dict[str, Any]]:
    """Train what is not complete, and return the scores or the error of each run."""
    todo = [run for run in group if not (run.workdir / writer.RESULTS).exists()]
    errors: dict[Path, str] = {}
    with ExitStack() as stack:
        dataset = load.load_dataset(group[0].config)
        data = dataset_fingerprint(dataset)
        for run in group:
            stack.enter_context(claimed(run.workdir, run.config, data))
        if todo:
            _log.info("training %d runs side by side", len(todo))
            errors = _train_together(todo, dataset)
    found = []
    for run in group:
        if run.workdir in errors:
            found.append({"error": errors[run.workdir]})
        else:
            found.append({"scores": (writer.read_results(run.workdir) or {})["scores"]})
    return found


def _train_together(runs: Sequence[Run], dataset: Dataset) -> dict[Path, str]:
    """Train runs as one program and write their directories; the errors of those that failed."""
    mesh, config = make_mesh(), runs[0].config
    load.check_batches(dataset, config)
    check_evaluation(dataset, config)
    trainers = [_make_trainer(run.config, dataset, mesh) for run in runs]
    total = trainers[0].total_steps
    step = _vectorised_step(config, trainers[0], dataset, mesh)
    starts = [
        init_proxies(trainer.state, run.config, dataset, trainer, mesh)
        for run, trainer in zip(runs, trainers, strict=True)
    ]
    states = _stacked(starts, trainers[0], mesh)
    varied = _varied(runs)
    with ExitStack() as stack:
        reporters = [_reporter(run, total) for run in runs]
        for reporter in reporters:
            stack.callback(reporter.close)
        if config.evaluation.untrained:
            for run, trainer, reporter in zip(runs, trainers, reporters, strict=True):
                score = make_score(run.config, dataset, trainer, mesh)
                reporter.evaluation(0, score(trainer.state).summary())
        if config.evaluation.untrained and config.model.pretrained:
            score = make_score(config, dataset, trainers[0], mesh)
            features = score(trainers[0].state, embed=make_embed_pooled).summary()
            for reporter in reporters:
                reporter.pretrained(features)
        kept: list[tuple[int, Any]] = []
        refreshes = [neighbors.make_refresh(run.config, dataset, trainers[0], mesh) for run in runs]
        every = neighbors.refresh_every(config, trainers[0])
        for number in range(1, total + 1):
            if number == 1 or (every and (number - 1) % every == 0):
                if every:
                    states = _refreshed(states, refreshes, mesh)
                end = min(total, number - 1 + (every or total))
                batches = _batches(runs, dataset, mesh, states, range(number - 1, end))
            states, scalars = step(states, next(batches), varied)
            kept.append((number, scalars))
            if len(kept) == max(config.log.every, 1) or number == total:
                _write_rows(reporters, trainers, kept)
                kept = []
        errors = {}
        for i, (run, trainer) in enumerate(zip(runs, trainers, strict=True)):
            state = _run_of(states, i)
            try:
                _finish(run, trainer, state, reporters[i], dataset, mesh)
            except UserError as error:
                errors[run.workdir] = one_line(error)
                _log.warning("%s: %s", run.workdir, one_line(error))
        return errors


def _make_trainer(config: Config, dataset: Dataset, mesh: Mesh) -> Trainer:
    return make_trainer(
        config,
        classes=dataset.classes,
        channels=load.image_channels(dataset),
        features=load.feature_size(dataset),
        train_examples=len(dataset.train.labels),
        class_sizes=dataset.class_sizes,
        mesh=mesh,
    )


def _reporter(run: Run, total: int) -> writer.Reporter:
    return writer.Reporter(
        run.workdir,
        start_step=0,
        total_steps=total,
        batch_size=run.config.data.batch_size,
        stream=io.StringIO(),  # lines of runs that are side by side would mix
    )


def _varied(runs: Sequence[Run]) -> dict[str, Any]:
    """What differs within one program: arrays with a row per run."""
    rates = {
        group: {
            field.name: np.array(
                [getattr(getattr(run.config.optimizer, group), field.name) for run in runs],
                np.float32,
            )
            for field in dataclasses.fields(GroupConfig)
        }
        for group in optim.GROUPS
    }
    return {"seed": np.array([run.config.seed for run in runs], np.uint32), "rates": rates}


def _vectorised_step(
    config: Config, trainer: Trainer, dataset: Dataset, mesh: Mesh
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Any]]:
    """The training step of :mod:`mmljax.training.step`, mapped over the runs."""
    size = RunSize(config.data.batch_size, len(dataset.train.labels), trainer.total_steps)

    def step(state: TrainState, batch: Batch, varied: Any) -> tuple[TrainState, Any]:
        groups: Any = {group: GroupConfig(**rates) for group, rates in varied["rates"].items()}
        optimizer = dataclasses.replace(config.optimizer, **groups)
        schedules = optim.make_schedules(optimizer, size)
        return make_train_step(
            graphdef=trainer.graphdef,
            objective=make_objective(
                dataclasses.replace(config, seed=varied["seed"]),
                classes=dataset.classes,
                size=size,
                class_sizes=dataset.class_sizes,
                devices=mesh.size,
            ),
            optimizer=optim.make_optimizer(optimizer, schedules),
            mesh=mesh,
            ema_decay=config.optimizer.ema_decay,
            micro_batches=config.data.micro_batches,
        )(state, batch)

    return jax.jit(jax.vmap(step), donate_argnums=0)


def _stacked(states: Sequence[TrainState], trainer: Trainer, mesh: Mesh) -> TrainState:
    """States with a first axis of runs, the others split over the devices as they were."""
    specs = partition_specs(trainer.state, trainer.objective)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, PartitionSpec(None, *spec)),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    stack = jax.jit(
        lambda states: jax.tree.map(lambda *x: jax.numpy.stack(x), *states),
        out_shardings=shardings,
    )
    return stack(list(states))


def _refreshed(
    states: TrainState, refreshes: Sequence[Callable[[TrainState], Any]], mesh: Mesh
) -> TrainState:
    """The states with each run's own relations for composed batches."""
    tables = [refresh(_run_of(states, i)) for i, refresh in enumerate(refreshes)]
    stacked = jax.tree.map(lambda *x: jax.numpy.stack(x), *tables)
    return states._replace(neighbors=jax.device_put(stacked, replicated(mesh)))


def _run_of(states: TrainState, i: int) -> TrainState:
    return jax.tree.map(lambda x: x[i], states)


def _batches(
    runs: Sequence[Run], dataset: Dataset, mesh: Mesh, states: TrainState, steps: range
) -> Iterator[Batch]:
    """Each run's own batches, with a first axis of runs."""
    sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))
    composed = bool(states.neighbors)
    streams: dict[int, Iterator[Batch]] = {}
    keys = [i if composed else run.config.seed for i, run in enumerate(runs)]  # of equal batches
    for i, (key, run) in enumerate(zip(keys, runs, strict=True)):
        if key not in streams:
            streams[key] = feature_pipeline.train_batches(
                dataset.train,
                config=run.config.data,
                seed=run.config.seed,
                steps=steps,
                rows=slice(None),
                place=lambda batch: batch,
                neighbors=neighbors.on_host(jax.tree.map(lambda x, i=i: x[i], states.neighbors)),
            )
    for _ in steps:
        now = {key: next(stream) for key, stream in streams.items()}
        columns = zip(*(now[key] for key in keys), strict=True)
        yield Batch(*(jax.device_put(np.stack(x), sharding) for x in columns))


def _write_rows(
    reporters: Sequence[writer.Reporter], trainers: Sequence[Trainer], kept: Sequence[Any]
) -> None:
    """Write each run's ledger of some steps."""
    for number, scalars in jax.device_get(kept):
        for i, (reporter, trainer) in enumerate(zip(reporters, trainers, strict=True)):
            row = {name: float(value[i]) for name, value in scalars.items()}
            for group, schedule in trainer.schedules.items():
                row[f"learning_rate/{group}"] = float(schedule(number - 1))
            reporter.train(number, row)


def _finish(
    run: Run,
    trainer: Trainer,
    state: TrainState,
    reporter: writer.Reporter,
    dataset: Dataset,
    mesh: Mesh,
) -> None:
    """Evaluate a run, and write its checkpoint and results.

    Raises:
      UserError: if its embeddings are not finite, or its directory cannot be written.
    """
    config, total = run.config, trainer.total_steps
    result = make_score(config, dataset, trainer, mesh)(state)
    scores = result.summary()
    reporter.evaluation(total, scores)
    protocol = records.evaluation_protocol(dataset, config)
    records.write_records(run.workdir, records.make_records(protocol, total, dataset, result))
    copy_identity(Path(config.data.directory), run.workdir)
    best_by = f"recall@{min(config.evaluation.recall_at)}"
    saved = checkpoints.Checkpoints(
        run.workdir / "checkpoints", keep_last=1, keep_best=0, best_by=best_by
    )
    try:
        saved.save(state, step=total, metrics=scores)
    finally:
        saved.close()
    writer.write_results(
        run.workdir,
        scores=reporter.evaluations[total],
        config=to_dict(config),
        sessions=reporter.sessions,
        extra={"protocol": protocol, **reporter.before_training},
    )

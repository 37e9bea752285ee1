"""A whole run from top to bottom: build, restore, loop, final evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from mmljax.config import Config, from_mapping, to_dict
from mmljax.data import load
from mmljax.data.fingerprint import dataset_fingerprint
from mmljax.data.readers.features import copy_identity
from mmljax.data.readers.splits import count_small_classes
from mmljax.errors import Preempted, UserError
from mmljax.mesh import agree, is_main_process, make_mesh, sync
from mmljax.retrieval import records
from mmljax.retrieval.checks import check_evaluation
from mmljax.retrieval.evaluate import (
    Embed,
    Retrieval,
    evaluate,
    make_embed,
    make_embed_pooled,
)
from mmljax.runs import remote, writer
from mmljax.runs.html import write_plot_and_page
from mmljax.runs.loggers import Logger, make_loggers
from mmljax.runs.profiler import Profiler, profiled_steps
from mmljax.runs.recorder import SKIPPED, Recorder
from mmljax.runs.workdir import claimed
from mmljax.text import text_table
from mmljax.training import checkpoints, optim
from mmljax.training.batches import BatchSource, make_batches
from mmljax.training.checks import check_disk
from mmljax.training.preemption import Preemption
from mmljax.training.proxies import init_proxies
from mmljax.training.state import describe_state, real_rows
from mmljax.training.trainer import Trainer, make_trainer
from mmljax.types import Dataset, TrainState

_log = logging.getLogger(__name__)


def train(
    config: Config | Mapping[str, Any], workdir: Path | str, *, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Train and evaluate as ``config`` says; resume where ``workdir`` holds an interrupted run.

    >>> import tempfile
    >>> import numpy as np
    >>> from mmljax.data.readers.arrays import from_arrays
    >>> random = np.random.default_rng(0)
    >>> images, labels = random.integers(0, 255, (24, 12, 12, 1), np.uint8), np.arange(24) % 6
    >>> from mmljax.config import load_config
    >>> config = load_config("quickstart", [
    ...     "duration=2 steps", "optimizer.warmup=1 steps", "data.image_size=12",
    ...     "data.resize_size=12", "data.batch_size=16", "data.eval_batch_size=16",
    ...     "model.backbone=small", "model.width=8", "evaluation.recall_at=(1,)", "log.plot=False",
    ...     "log.tensorboard=False"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     results = train(config, folder, dataset=from_arrays(images, labels, images, labels))
    %...
    >>> 0 <= results["scores"]["recall@1"] <= 1
    True

    Args:
      config: the run, such as :func:`mmljax.default_config` gives and the caller changes.
      workdir: the directory of checkpoints, metrics and results, or its address, such as
        ``gs://bucket/run`` (:mod:`mmljax.runs.remote`).
      dataset: images in memory, in place of ``config.data.source``.

    Returns:
      The content of ``results.json``; empty on processes other than the first.

    Raises:
      UserError: on data or a config that cannot be used, a full disk, or a loss that is not finite.
      Unreachable: if the workdir is an address that cannot be read or written.
      Preempted: if the process received SIGTERM or SIGINT and saved a checkpoint.
    """
    config = config if isinstance(config, Config) else from_mapping(config)
    with remote.opened(workdir) as files:
        return _train(config, files, dataset)


class _Run(NamedTuple):
    """What a config names."""

    config: Config
    files: remote.RunFiles
    dataset: Dataset
    mesh: Mesh
    trainer: Trainer
    evaluate_every: int
    save_every: int
    source: BatchSource
    score: Callable[..., Retrieval]
    protocol: dict[str, Any]
    profiler: Profiler


def _build(config: Config, files: remote.RunFiles, dataset: Dataset | None) -> _Run:
    """Build everything that the config names, so that a mistake shows before any work."""
    mesh = make_mesh()
    dataset = load.with_distractors(dataset or load.load_dataset(config), config)
    load.check_batches(dataset, config)
    check_evaluation(dataset, config)
    trainer = make_trainer(
        config,
        classes=dataset.classes,
        channels=load.image_channels(dataset),
        features=load.feature_size(dataset),
        train_examples=len(dataset.train.labels),
        class_sizes=dataset.class_sizes,
        mesh=mesh,
        pretrained=not checkpoints.is_in(files.checkpoints),  # else a checkpoint has them
    )
    steps = profiled_steps(config.log.profile, total=trainer.total_steps)
    return _Run(
        config,
        files,
        dataset,
        mesh,
        trainer,
        evaluate_every=trainer.in_steps(config.evaluation.every, key="config.evaluation.every"),
        save_every=trainer.in_steps(config.checkpoint.every, key="config.checkpoint.every"),
        source=make_batches(config, dataset, trainer, mesh),
        score=make_score(config, dataset, trainer, mesh),
        protocol=records.evaluation_protocol(dataset, config),
        profiler=Profiler(files.local / "profile", steps),
    )


def _train(config: Config, files: remote.RunFiles, dataset: Dataset | None) -> dict[str, Any]:
    started = time.monotonic()
    run = _build(config, files, dataset)
    dataset, workdir, total = run.dataset, files.local, run.trainer.total_steps

    with ExitStack() as stack:  # however the run ends, pending saves are finished
        stack.enter_context(claimed(workdir, config, dataset_fingerprint(dataset)))
        files.push()
        if config.data.source == load.FEATURES and is_main_process():
            copy_identity(Path(config.data.directory), workdir)
        preemption = stack.enter_context(Preemption())
        saved = checkpoints.Checkpoints(
            files.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            best_by=f"recall@{min(config.evaluation.recall_at)}",
        )
        stack.callback(saved.close)
        state, first = _restore_or_start(run, saved)
        reporter = writer.Reporter(
            workdir,
            start_step=first,
            total_steps=total,
            batch_size=config.data.batch_size,
            loggers=_loggers(config, workdir, first=first),
            started=started,
            enabled=is_main_process(),
        )
        stack.callback(reporter.close)
        if first == 0 and config.evaluation.untrained:
            reporter.evaluation(0, run.score(state).summary())
            if config.model.pretrained:
                reporter.pretrained(run.score(state, embed=make_embed_pooled).summary())
        state = _steps(run, state, first, reporter, saved, preemption)
        finished = writer.read_results(workdir) if first == total else None
        known = finished is not None or total in reporter.evaluations
        if not agree(known or not is_main_process()):  # metrics.jsonl was moved away since
            reporter.evaluation(total, run.score(state).summary())

    sync("finish")
    if not is_main_process():
        return {}
    results = finished or writer.write_results(
        workdir,
        scores=reporter.evaluations[total],
        config=to_dict(config),
        sessions=reporter.sessions,
        extra={"protocol": run.protocol, **reporter.before_training, **_skipped(config, workdir)},
    )
    _report(config, files, saved.directory, dataset, results)
    return results


def _restore_or_start(run: _Run, saved: checkpoints.Checkpoints) -> tuple[TrainState, int]:
    """The state of the last checkpoint and its step, or that of the start and 0."""
    state, first = _restore(saved, run.trainer)
    if first == 0 and not run.files.remote:
        room = check_disk(run.files.local, state, kept=run.config.checkpoint)
        if room.failed:
            raise UserError(f"disk: {room.text}")
    _describe(run.config, run.dataset, run.trainer, state, first=first)
    if first == 0:
        state = init_proxies(state, run.config, run.dataset, run.trainer, run.mesh)
    return state, first


def _steps(
    run: _Run,
    state: TrainState,
    first: int,
    reporter: writer.Reporter,
    saved: checkpoints.Checkpoints,
    preemption: Preemption,
) -> TrainState:
    """Train from step ``first`` to the last, with evaluations and checkpoints.

    The order matters: the rows of steps 1 to s are written before the checkpoint of s, so that a
    run which resumes from it has them all.
    """
    config, source, total = run.config, run.source, run.trainer.total_steps
    recorder = Recorder(
        reporter,
        run.trainer.schedules,
        input_wait_warning=config.log.input_wait_warning,
        skipped=source.skipped if config.data.corrupt == "skip" else None,
    )
    with closing(recorder), closing(run.profiler) as profiler:
        for step in range(first + 1, total + 1):
            if step - 1 == first or source.begins(step - 1):
                state, batches = source.part(state, step - 1)
                recorder.restart_clock(compiles=step - 1 == source.small_crops)
            with profiler.step(step):
                batch = recorder.next_batch(batches)
                state, scalars = run.trainer.step(state, batch)
            profiler.stop_after(step, scalars)
            recorder.add(step, scalars)
            evaluates = step == total or _due(step, run.evaluate_every)
            stops = preemption.requested(step) and step < total
            saves = evaluates or stops or _due(step, run.save_every)
            if saves or _due(step, config.log.every):
                recorder.flush()
            scores = None
            if evaluates:
                result = run.score(state)
                scores = result.summary()
                reporter.evaluation(step, scores)
                if is_main_process():
                    found = records.make_records(run.protocol, step, run.dataset, result)
                    records.write_records(run.files.local, found)
            if saves:
                run.files.push()
                saved.save(state, step=step, metrics=scores)
                recorder.restart_clock()
            if stops:
                text = f"stopped by a signal; saved at step {step} of {total}"
                raise Preempted(text, exit_code=preemption.exit_code)
    return state


def make_score(
    config: Config, dataset: Dataset, trainer: Trainer, mesh: Mesh
) -> Callable[..., Retrieval]:
    """The evaluation of a state on the query and gallery splits, by its embeddings or features."""

    def score(
        state: TrainState, *, embed: Callable[[nnx.GraphDef], Embed] = make_embed
    ) -> Retrieval:
        prefixes = config.model.matryoshka if embed is make_embed else ()  # of no features
        return score_dataset(
            partial(embed(trainer.graphdef), *state.evaluated), dataset, config, mesh, prefixes
        )

    return score


def score_dataset(
    embed: Callable[[Any], Any],
    dataset: Dataset,
    config: Config,
    mesh: Mesh,
    prefixes: Sequence[int] = (),
) -> Retrieval:
    """The evaluation that a config asks for, of images embedded by ``embed``, and of prefixes."""
    return evaluate(
        embed,
        load.eval_batches(dataset.query, config, mesh),
        *(
            None if split is None else load.eval_batches(split, config, mesh)
            for split in (dataset.gallery, dataset.distractors)
        ),
        prefixes=prefixes,
        recall_at=config.evaluation.recall_at,
        chunk=config.evaluation.gallery_chunk,
        mesh=mesh,
        rerank=config.evaluation.rerank,
        geometry=config.evaluation.geometry,
        clustering=config.evaluation.clustering,
    )


def _loggers(config: Config, workdir: Path, *, first: int) -> list[Logger]:
    if not is_main_process():
        return []
    return make_loggers(config.log, workdir, config=to_dict(config), start_step=first)


def _skipped(config: Config, workdir: Path) -> dict[str, int]:
    """The entry of the results that counts the replaced images of all steps."""
    if config.data.corrupt != "skip":
        return {}
    rows = writer.read_metrics(workdir, kind="train")
    return {SKIPPED: int(sum(row.get(SKIPPED, 0) for row in rows))}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _restore(saved: checkpoints.Checkpoints, trainer: Trainer) -> tuple[TrainState, int]:
    restored = saved.restore(trainer.state, rows=real_rows(trainer.state, trainer.objective))
    if restored is None:
        return trainer.state, 0
    first = int(restored.step)
    _log.info("resuming from step %d of %s", first, saved.directory)
    return restored, first


def _describe(
    config: Config, dataset: Dataset, trainer: Trainer, state: TrainState, *, first: int
) -> None:
    small = count_small_classes(dataset.train.labels, size=config.data.images_per_class)
    gallery = "none (self-retrieval)" if dataset.gallery is None else len(dataset.gallery.labels)
    _log.info(
        "devices: %d x %s; train %d images of %d items; query %d; gallery %s",
        jax.device_count(),
        jax.devices()[0].device_kind,
        len(dataset.train.labels),
        dataset.classes,
        len(dataset.query.labels),
        gallery,
    )
    _log.info(
        "%d items have fewer than K=%d images and are sampled with repetition",
        small,
        config.data.images_per_class,
    )
    groups = optim.describe_groups(state.params, config.optimizer, trains=trainer.trains)
    _log.info("optimiser groups:\n%s", groups)
    _log.info(describe_state(state))
    name, rows = config.combination.name, config.objectives.values()
    if name != "share" and any(row.embedding_share or row.proxy_share for row in rows):
        _log.info("combination %r does not use embedding_share and proxy_share", name)
    if name == "random":
        _log.info("combination 'random' does not use the objectives' weights")
    _log.info("steps %d to %d of %s", first, trainer.total_steps, config.duration)


def _report(
    config: Config, files: remote.RunFiles, saved: Path, dataset: Dataset, results: dict[str, Any]
) -> None:
    """Draw the contributions and the page, and print the scores and the paths of all files."""
    paths = {"checkpoint": saved, "results": files.local / writer.RESULTS}
    if config.log.plot:
        paths |= write_plot_and_page(files.local, dataset=dataset, config=config)
    columns = {"trained": results["scores"]} | {k: results.get(k) for k in writer.BEFORE_TRAINING}
    print(writer.recall_table(columns), flush=True)  # noqa: T201
    if by_size := writer.size_table(results["scores"]):
        print(text_table(by_size), flush=True)  # noqa: T201
    for name, path in paths.items():
        print(f"{name:<11}{files.shown(path)}", flush=True)  # noqa: T201

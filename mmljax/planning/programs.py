"""The programs of a run, compiled from shapes alone: no array is made and no data is read."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mmljax.config import Config
from mmljax.errors import UserError
from mmljax.files import write_atomically
from mmljax.mesh import AXIS, replicated, rows_sharding
from mmljax.planning.counts import Counts
from mmljax.planning.hlo_text import Memory, read_memory
from mmljax.planning.operations import Operations, operations
from mmljax.retrieval.evaluate import NEIGHBORS, make_embed, score_queries
from mmljax.text import one_line
from mmljax.training.state import shardings
from mmljax.training.trainer import Trainer, make_trainer
from mmljax.types import Batch, TrainState

_log = logging.getLogger(__name__)

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = (
    re.compile(  # "Used 30G of 15.75G hbm", "temporaries (760.90G) exceeds available HBM (15.75G)"
        r"([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM) \(?([\d.]+)([KMGT]?)"
    )
)


class DoesNotFit(Exception):
    """A program needs more memory than a device has; in bytes, 0 where they are not known."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"{needed} bytes of {available}")
        self.needed, self.available = needed, available


class RunShapes(NamedTuple):
    """A run on a mesh as shapes with shardings."""

    trainer: Trainer
    state: TrainState
    mesh: Mesh


def abstract_run(config: Config, counts: Counts, mesh: Mesh) -> RunShapes:
    """A run's state and step on a mesh, whose devices need not be present.

    Raises:
      UserError: on a config that cannot be used.
    """
    found: list[Trainer] = []

    def state() -> TrainState:
        found.append(
            make_trainer(
                config,
                classes=counts.classes,
                channels=counts.channels,
                train_examples=counts.images,
                class_sizes=np.ones(counts.classes, np.int64),  # the program is that of any sizes
                mesh=mesh,
                pretrained=False,
            )
        )
        return found[0].state

    shapes = jax.eval_shape(state)
    (trainer,) = found
    spread = shardings(shapes, trainer.objective, mesh)
    return RunShapes(trainer, jax.tree.map(_struct, shapes, spread), mesh)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def batch_shapes(config: Config, mesh: Mesh, *, channels: int) -> Batch:
    """A training batch as shapes."""
    shape: Any = partial(jax.ShapeDtypeStruct, sharding=rows_sharding(mesh))
    size, side = config.data.batch_size, config.data.image_size
    return Batch(
        shape((size, side, side, channels), np.uint8),
        shape((size,), np.int32),
        shape((size,), bool),
    )


def lower_step(run: RunShapes, config: Config, *, channels: int) -> Any:
    """The training step, ready to compile."""
    step: Any = run.trainer.step  # jitted
    return step.lower(run.state, batch_shapes(config, run.mesh, channels=channels))


def lower_embedding(run: RunShapes, config: Config, *, channels: int) -> Any:
    """The embedding of one evaluation batch, ready to compile."""
    size, side = config.data.eval_batch_size, config.data.image_size
    images = jax.ShapeDtypeStruct(
        (size, side, side, channels), np.uint8, sharding=rows_sharding(run.mesh)
    )
    embed: Any = make_embed(run.trainer.graphdef)  # jitted
    return embed.lower(*run.state.evaluated, images)


def lower_search(config: Config, counts: Counts, mesh: Mesh) -> Any:
    """The search and scores of an evaluation, ready to compile.

    An item with more relevant images than neighbours are asked for makes the real one larger.
    """
    whole, size = replicated(mesh), config.model.embedding_size

    def embeddings(count: int) -> tuple[Any, Any]:
        return (
            jax.ShapeDtypeStruct((count, size), np.float32, sharding=whole),
            jax.ShapeDtypeStruct((count,), np.int32, sharding=whole),
        )

    (queries, query_labels) = embeddings(counts.queries)
    (gallery, gallery_labels) = embeddings(counts.gallery or counts.queries)
    own = None if counts.gallery else query_labels
    score: Any = score_queries  # jitted
    return score.lower(
        queries,
        gallery,
        query_labels,
        gallery_labels,
        query_labels,  # as many counts of relevant images
        own,
        recall_at=tuple(config.evaluation.recall_at),
        k=min(max(*config.evaluation.recall_at, NEIGHBORS), len(gallery) - (own is not None)),
        chunk=config.evaluation.gallery_chunk,
        mesh=mesh,
    )


def count_step(run: RunShapes, config: Config, *, channels: int) -> dict[str, Operations]:
    """Operations of one device in a step: of the network and of the objectives."""
    platform = run.mesh.devices.flat[0].platform
    batch = batch_shapes(config, run.mesh, channels=channels)
    whole = operations(run.trainer.step, run.state, batch, platform=platform)
    objective = run.trainer.objective
    params, state = objective.partition_specs(AXIS)
    rows = jax.sharding.PartitionSpec(AXIS)
    gradients = jax.shard_map(
        jax.grad(partial(objective, axis_name=AXIS), (0, 2), has_aux=True),
        mesh=run.mesh,
        in_specs=(params, state, rows, rows),
        out_specs=((params, rows), (state, jax.sharding.PartitionSpec())),
    )
    own = {name: run.state.params[name] for name in ("proxies", "weights")}
    embeddings = jax.ShapeDtypeStruct((len(batch.labels), objective.dimension), np.float32)
    mine = operations(
        gradients, own, run.state.objective, embeddings, batch.labels, platform=platform
    )
    return {"network": whole - mine, "objectives": mine}


class Compiled(NamedTuple):
    """What is read of a compiled program."""

    memory: Memory
    text: str  # empty unless it was asked for


class Cache(NamedTuple):
    """What is known of programs that were compiled before.

    JAX's own compilation cache cannot be read without the hardware, so this one keeps texts.
    """

    folder: Path
    fill: Callable[[], None] = lambda: None
    """Called where a program is not there; may have another process add it."""


def compile_program(
    lowered: Any, *, name: str, cache: Cache | None = None, with_text: bool = True
) -> Compiled:
    """Compile a program, or read what an earlier call has found; progress is logged.

    Args:
      lowered: of ``jax.jit(...).lower(...)``.
      name: of target and program, for the log and the cache.
      cache: of earlier results; None for none.
      with_text: whether the program's text is read; the same at each call with one name.

    Raises:
      DoesNotFit: if the compiler finds that it needs more memory than the device has.
      UserError: if JAX cannot read the text, as its own version of libtpu is not the installed one.
    """
    path = None if cache is None else cache.folder / f"{_digest(lowered, name)}.json.gz"
    facts = None if path is None else _read_facts(path)
    if cache is not None and path is not None and facts is None:
        cache.fill()
        facts = _read_facts(path)
    if facts is None:
        _log.info("%s: compiling ...", name)
        begin = time.monotonic()
        facts = _compiled_facts(lowered, with_text=with_text)
        _log.info("%s: compiled in %.0f s", name, time.monotonic() - begin)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, gzip.compress(json.dumps(facts).encode(), mtime=0))
    else:
        _log.info("%s: compiled before (%s)", name, path)
    if facts["needed"]:
        raise DoesNotFit(*facts["needed"])
    return Compiled(Memory(*facts["memory"]), facts["text"])


def _digest(lowered: Any, name: str) -> str:
    versions = [importlib.metadata.version("jaxlib")]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.append(importlib.metadata.version("libtpu"))
    flags = (os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    level = jax.config.jax_optimization_level  # type: ignore[attr-defined]
    text = "\n".join([name.partition(": ")[0], *versions, *flags, level, lowered.as_text()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_facts(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):  # absent or damaged
        return None


def _compiled_facts(lowered: Any, *, with_text: bool) -> dict[str, Any]:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"memory": (), "text": "", "needed": needed_and_available(str(error))}
    try:
        text = program.as_text() if with_text else ""
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"jaxlib cannot read the program that libtpu compiled ({one_line(error)}); install the "
            "libtpu of this JAX: pip install 'mmljax[tpu]'"
        ) from error
    return {"memory": read_memory(program), "text": text, "needed": ()}


def needed_and_available(message: str) -> tuple[int, int]:
    """Bytes that libtpu's message states, in either of its forms; 0 and 0 where it states none."""
    match = _USED.search(message)
    if not match:
        _log.warning("the compiler: %s", one_line(ValueError(message)))
        return 0, 0
    needed, available = (
        int(float(number) * _UNITS[unit])
        for number, unit in ((match[1], match[2]), (match[3], match[4]))
    )
    return needed, available

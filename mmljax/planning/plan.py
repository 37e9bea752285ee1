"""What a run needs on some devices: memory, communication, arithmetic, bounds of its time."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mmljax.config import Config
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.planning import programs
from mmljax.planning.chips import Target
from mmljax.planning.counts import Counts
from mmljax.planning.hlo_text import (
    Buffer,
    Memory,
    Traffic,
    argument_bytes,
    collectives,
    largest_buffers,
    sent_bytes,
)
from mmljax.planning.operations import Operations
from mmljax.planning.programs import Cache, Compiled, DoesNotFit
from mmljax.text import size_text
from mmljax.training.state import state_bytes, tree_bytes

_log = logging.getLogger(__name__)

STEP, EMBEDDING, SEARCH = "training step", "embedding", "search"


class TooLarge(UserError):
    """A program that does not fit, with its bytes on one device; 0 where they are not known."""

    def __init__(self, message: str, *, program: str, needed: int, available: int) -> None:
        super().__init__(message)
        self.program, self.needed, self.available = program, needed, available


class Bounds(NamedTuple):
    """Seconds below which no step of this program can be on the chip, by what limits it."""

    arithmetic: float  # operations in bfloat16 passes, at the peak rate
    memory: float  # state read and written, batch read, all work memory written and read, once
    links: float  # bytes that collectives must send, over all links of the chip


class Plan(NamedTuple):
    """The plan of a run on one target. Bytes and operations are those of one device."""

    target: str
    devices: int
    available: int  # bytes of memory
    batch_size: int  # global
    steps: int  # of the run
    counts: Counts
    state: Mapping[str, int]  # bytes by group
    batch: int  # bytes
    padding: int  # bytes by which tiles round the arguments of the training step up
    memory: Mapping[str, Memory]  # by program
    traffic: Mapping[str, Traffic]  # of the training step, by kind of collective
    operations: Mapping[str, Operations]  # of the training step
    bounds: Bounds | None  # None where the chip's figures are not known
    buffers: Sequence[Buffer]  # the largest of the training step


def fitting_config(config: Config, counts: Counts, *, devices: int) -> Config:
    """The config with the next batch sizes that training on so many devices accepts.

    Raises:
      UserError: if the training split has too few classes for such a batch.
    """
    units = {"batch_size": batch_unit(config, devices=devices), "eval_batch_size": devices}
    sizes = {}
    for key, unit in units.items():
        given = getattr(config.data, key)
        sizes[key] = -(-given // unit) * unit
        if sizes[key] != given:
            _log.warning(
                "--config.data.%s=%d is not for %d devices, and training refuses it; "
                "this plans --config.data.%s=%d",
                *(key, given, devices, key, sizes[key]),
            )
    most = counts.classes * config.data.images_per_class
    if sizes["batch_size"] > most:
        raise UserError(
            f"--config.data.batch_size={sizes['batch_size']} on {devices} devices needs more than "
            f"the {counts.classes} classes, of --config.data.images_per_class="
            f"{config.data.images_per_class} each; lower it, or plan for fewer devices"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **sizes))


def batch_unit(config: Config, *, devices: int) -> int:
    """Batches hold whole classes, and whole micro batches on each device."""
    return math.lcm(config.data.images_per_class, devices * config.data.micro_batches)


def with_batch_size(config: Config, size: int) -> Config:
    """The config with another training batch size."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


def make_plan(
    config: Config,
    counts: Counts,
    target: Target,
    *,
    cache: Cache | None = None,
    buffers: int = 20,
) -> Plan:
    """Compile the programs of a run for a target, and read them.

    Args:
      config: of the run, from :func:`fitting_config`.
      counts: of its data set.
      target: devices, present or not.
      cache: of compiled programs; None for none.
      buffers: how many of the largest to keep.

    Raises:
      TooLarge: if a program does not fit, with needed and available bytes.
      UserError: on a config that cannot be used.
    """
    mesh = make_mesh(target.devices)
    run = programs.abstract_run(config, counts, mesh)
    lowered: dict[str, Callable[[], Any]] = {
        STEP: lambda: programs.lower_step(run, config, channels=counts.channels),
        EMBEDDING: lambda: programs.lower_embedding(run, config, channels=counts.channels),
    }
    if counts.queries:
        lowered[SEARCH] = lambda: programs.lower_search(config, counts, mesh)
    compiled: dict[str, Compiled] = {}
    for name, lower in lowered.items():
        try:
            compiled[name] = programs.compile_program(
                lower(),
                name=f"{target.name}: {name}",
                cache=cache,
                with_text=name == STEP,
            )
            check_fits(compiled[name], target)
        except DoesNotFit as error:
            raise _refused(name, target, config, error) from error
    text = compiled[STEP].text
    memory = {name: one.memory for name, one in compiled.items()}
    traffic = collectives(text)
    operations = programs.count_step(run, config, channels=counts.channels)
    devices = mesh.devices.size
    return Plan(
        target=target.name,
        devices=devices,
        available=target.memory,
        batch_size=config.data.batch_size,
        steps=run.trainer.total_steps,
        counts=counts,
        state={name: size for name, size in state_bytes(run.state).items() if size},
        batch=tree_bytes(programs.batch_shapes(config, mesh, channels=counts.channels)),
        padding=memory[STEP].arguments - argument_bytes(text),
        memory=memory,
        traffic=traffic,
        operations=operations,
        bounds=_bounds(target, memory[STEP], traffic, operations, devices=devices),
        buffers=largest_buffers(text, count=buffers),
    )


def check_fits(compiled: Compiled, target: Target) -> None:
    """Refuse a program that its compiler accepts, but whose devices are smaller.

    Raises:
      DoesNotFit: with both figures.
    """
    if target.memory and compiled.memory.total > target.memory:
        raise DoesNotFit(compiled.memory.total, target.memory)


def _refused(name: str, target: Target, config: Config, error: DoesNotFit) -> TooLarge:
    data = config.data
    cures = {
        STEP: f"lower --config.data.batch_size={data.batch_size} (--find-batch-size finds the "
        f"largest), raise --config.data.micro_batches={data.micro_batches}",
        EMBEDDING: f"lower --config.data.eval_batch_size={data.eval_batch_size}",
        SEARCH: f"lower --config.evaluation.gallery_chunk={config.evaluation.gallery_chunk}",
    }
    if error.needed:
        found = (
            f"it needs {size_text(error.needed)} on each device, and "
            f"{size_text(error.available)} are available"
        )
    else:
        found = "the compiler runs out of memory and states no figures"
    return TooLarge(
        f"the {name} does not fit {target.name}: {found}; {cures[name]}, or take a larger slice",
        program=name,
        needed=error.needed,
        available=error.available,
    )


def _bounds(
    target: Target,
    memory: Memory,
    traffic: Mapping[str, Traffic],
    operations: Mapping[str, Operations],
    *,
    devices: int,
) -> Bounds | None:
    if target.chip is None:
        return None
    moved = memory.arguments + memory.outputs + 2 * memory.work
    sent = sum(sent_bytes(kind, one.bytes, devices=devices) for kind, one in traffic.items())
    return Bounds(
        sum(one.passes for one in operations.values()) / target.chip.flops,
        moved / target.chip.hbm_bandwidth,
        sent / target.chip.ici_bandwidth,
    )


def largest_fitting(
    fits: Callable[[int], bool], *, start: int, unit: int, tolerance: float = 1 / 32
) -> int:
    """The largest multiple of ``unit`` that fits, to within the tolerance; 0 if none does.

    Doubles from ``start`` until one does not fit, then bisects.

    Args:
      fits: whether a size fits; slow.
      start: a multiple of ``unit``.
      unit: of the sizes.
      tolerance: the search ends when the smallest size that does not fit is at most this share
        above the largest that does, or one unit.
    """
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(unit, int(tolerance * low)):
        middle = (low + high) // 2 // unit * unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find_batch_size(
    config: Config, counts: Counts, target: Target, *, cache: Cache | None = None
) -> int:
    """The largest global batch size whose training step fits, to within 1/32.

    Raises:
      TooLarge: if not even one class per device fits.
    """
    mesh = make_mesh(target.devices)
    unit = batch_unit(config, devices=mesh.devices.size)
    last: list[DoesNotFit] = []

    def fits(size: int) -> bool:
        if size > counts.classes * config.data.images_per_class:
            return False  # there are no more classes for a batch
        candidate = with_batch_size(config, size)
        run = programs.abstract_run(candidate, counts, mesh)
        lowered = programs.lower_step(run, candidate, channels=counts.channels)
        name = f"{target.name}: {STEP}, batch {size}"
        try:
            check_fits(programs.compile_program(lowered, name=name, cache=cache), target)
        except DoesNotFit as error:
            last.append(error)
            return False
        return True

    size = largest_fitting(fits, start=config.data.batch_size, unit=unit)
    if not size:
        raise _refused(STEP, target, with_batch_size(config, unit), last[-1])
    return size

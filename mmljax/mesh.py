"""Devices and processes: the mesh, shardings, and transfers between host and devices."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmljax.errors import Unreachable, UserError
from mmljax.types import Batch

HEARTBEAT_SECONDS = 30  # without a heartbeat, after which a process counts as dead

AXIS = "data"  # the one mesh axis: rows of batches and of proxies are split over it


def initialize_distributed() -> None:
    """Join the other processes, before jax is used in any other way.

    ``MMLJAX_COORDINATOR`` (``host:port``), ``MMLJAX_NUM_PROCESSES`` and ``MMLJAX_PROCESS_ID`` name
    them; with ``MMLJAX_DISTRIBUTED=1`` JAX finds them itself on Cloud TPU pods, Slurm and Open MPI.
    With none of them set the run has one process.

    When a process dies, the others end: at once where they wait for it on CPU, elsewhere shortly
    after ``HEARTBEAT_SECONDS``.

    Raises:
      UserError: if only some of the three are set, or a number is malformed.
    """
    names = ("MMLJAX_COORDINATOR", "MMLJAX_NUM_PROCESSES", "MMLJAX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if os.environ.get("MMLJAX_DISTRIBUTED") == "1":
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        return
    if not any(values):
        return
    coordinator, count, index = values
    if not (coordinator and count and index and count.isdigit() and index.isdigit()):
        raise UserError(
            f"{', '.join(names)} must all be set, the last two to numbers; found {values}"
        )
    jax.distributed.initialize(
        coordinator, int(count), int(index), heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def make_mesh(devices: Any = None) -> Mesh:
    """A mesh of all devices (or of those given) along the one axis.

    Raises:
      UserError: if they are of several TPU slices. (GPUs of one run count as slices by machine.)
    """
    devices = jax.devices() if devices is None else devices
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}
    if len(slices) > 1:
        raise UserError(
            f"the devices are of {len(slices)} TPU slices, but a run takes those of one: between "
            "slices, every step's collectives would cross the data-centre network; start one run "
            "per slice, or ask for one larger slice (no MEGASCALE_* variables)"
        )
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """A sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(batch_size: int, *, key: str, multiple_of: int = 1) -> slice:
    """The rows of a global batch that this process loads.

    Args:
      batch_size: of the global batch.
      key: of the config, for the error.
      multiple_of: what else the batch size must be a multiple of, for the size that it proposes.

    Raises:
      UserError: if the batch does not divide over the devices.
    """
    devices = jax.device_count()
    if batch_size % devices:
        unit = math.lcm(devices, multiple_of)
        raise UserError(
            f"--{key}={batch_size} is not divisible by the {devices} devices; "
            f"use {max(batch_size // unit, 1) * unit}"
        )
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def place(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch on the devices from this process's rows of a host batch."""
    sharding = rows_sharding(mesh)
    return Batch(*(jax.make_array_from_process_local_data(sharding, x) for x in batch))


def spread(tree: Any, shardings: Any) -> Any:
    """Lay out a tree that every process holds whole over the devices of all processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            wrap = jax.jit(partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x)))
            return wrap(one(jax.random.key_data(x), sharding))
        whole = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


def to_host(x: jax.Array) -> np.ndarray:
    """A global array as one NumPy array in this process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def is_main_process() -> bool:
    """Whether this process writes logs and results."""
    return jax.process_index() == 0


def agree(fine: bool) -> bool:
    """The argument of process 0, in all processes."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.broadcast_one_to_all(np.array(fine)))


def total(counts: np.ndarray) -> np.ndarray:
    """The sum over all processes."""
    if jax.process_count() == 1:
        return counts
    return np.asarray(multihost_utils.process_allgather(counts)).sum(axis=0)


def raise_together(problem: UserError | None, *, otherwise: str) -> None:
    """Raise the problem of process 0, if it has one, in all processes, with its exit code.

    Args:
      problem: of this process; those of others than process 0 are ignored.
      otherwise: what the other processes say.

    Raises:
      UserError: the problem.
    """
    code = 0 if problem is None else problem.exit_code
    if jax.process_count() > 1:
        code = int(multihost_utils.broadcast_one_to_all(np.array(code)))
    if code:
        kind = Unreachable if code == Unreachable.exit_code else UserError
        raise (problem if is_main_process() else None) or kind(otherwise)


def sync(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

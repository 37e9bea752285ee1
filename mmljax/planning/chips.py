"""TPU chips: their published figures, and devices to compile for without the hardware."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from mmljax.data.limits import total_memory
from mmljax.errors import UserError, require
from mmljax.text import nearest, one_line

GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


class Chip(NamedTuple):
    """Published figures of one chip."""

    hbm: int  # bytes
    flops: float  # peak bfloat16 operations per second
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second that it sends to other chips, all links together
    kinds: tuple[str, ...]  # device_kind of its devices in JAX
    topologies: tuple[str, ...]  # of one slice


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, ("TPU v4",), (*_CUBES, "8x16x16", "12x16x16")),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, ("TPU v5 lite", "TPU v5e"), _FLAT),
    "v5p": Chip(
        95 * GIB, 459e12, 2765e9, 600e9, ("TPU v5", "TPU v5p"), (*_CUBES, "8x16x16", "16x16x16")
    ),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9, ("TPU v6 lite", "TPU v6e"), _FLAT),
}
"""By the name that a topology begins with.

Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (cloud.google.com/tpu/docs/v4,
/v5e, /v5p, /v6e). They state the interconnect in both directions (400, 1200 and 800 GB/s of v5e,
v5p and v6e), of which half is sent; that of v4 is 2400 Gbit/s.
"""


_ENVIRONMENT = {  # what libtpu reads when it is loaded
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another plan, or a run on the TPU, may hold its lock
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class Target(NamedTuple):
    """Devices to compile for."""

    name: str  # the topology, or what the devices are
    devices: tuple[Any, ...]
    memory: int  # bytes of one device
    chip: Chip | None  # None where its figures are not in the table


def tpu_target(topology: str) -> Target:
    """The devices of a topology such as ``v5e:2x4``, without the hardware.

    Raises:
      UserError: on an unknown chip or topology, a machine that libtpu does not run on, or without
        libtpu.
    """
    chip = _checked_chip(topology)
    check_compiler()
    name, _, shape = topology.partition(":")
    options: dict[str, Any] = {}
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as in JAX
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read such programs back
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(topology, "tpu", **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--topology={topology}: libtpu refuses it ({one_line(error)}); name another one"
        ) from error
    return Target(topology, tuple(found.devices), chip.hbm, chip)


def _checked_chip(topology: str) -> Chip:
    name, _, shape = topology.partition(":")
    if "," in topology:
        raise UserError(f"--topology={topology}: separate topologies by spaces")
    if topology[:1].isdigit() or any(mark in topology for mark in "*+/@"):
        raise UserError(
            f"--topology={topology}: a plan is of one slice, such as v5e:2x4; several slices, "
            "which the data centre's network connects, are not supported"
        )
    if name not in CHIPS:
        raise UserError(
            f"--topology={topology}: chip {name!r} is unknown ({nearest(name, CHIPS)}); a topology "
            "is a chip and a shape, such as v5e:2x4"
        )
    chip = CHIPS[name]
    if shape not in chip.topologies:
        raise UserError(
            f"--topology={topology}: {name} has no such shape; it has "
            + ", ".join(f"{name}:{known}" for known in chip.topologies)
        )
    return chip


def check_compiler() -> None:
    """Refuse a machine that cannot compile for TPUs.

    Raises:
      UserError: with the cure.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UserError(
            f"--topology needs libtpu, which runs on x86-64 Linux, and this is {sys.platform} on "
            f"{platform.machine()}; plan on another machine, or on the TPU VM itself"
        )
    require("libtpu", extra="tpu", purpose="--topology")


def present_target() -> Target:
    """The devices that JAX finds here."""
    devices = jax.devices()
    first = devices[0]
    if first.platform == "cpu":
        memory = total_memory() // len(devices)
    else:
        memory = (first.memory_stats() or {}).get("bytes_limit", 0)
    chips = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    chip = chips.get(first.device_kind)
    return Target(first.device_kind, tuple(devices), memory, chip)

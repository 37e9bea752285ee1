"""On what and when a benchmark ran."""

from __future__ import annotations

import datetime
import os
import platform

import jax


def describe() -> str:
    """One line: date, processor, accelerator, versions."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    except OSError:
        pass
    device = jax.devices()[0]
    return (
        f"{datetime.date.today()}, {os.cpu_count()} cores {processor}, "
        f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
    )

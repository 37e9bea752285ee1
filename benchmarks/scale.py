"""Memory and collectives of a step, as the compiled program has them; nothing is run.

    python -m benchmarks.scale                                   # a million classes, 8 devices
    python -m benchmarks.scale --classes 10000000 --devices 128 --sampled-proxies 65536

The step is compiled for virtual CPU devices from shapes alone, so no array of that size is ever
held. ``docs/scale.md`` says what the numbers should be.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks import machine
from mmljax.config import default_config, from_mapping
from mmljax.mesh import make_mesh
from mmljax.planning.counts import Counts
from mmljax.planning.hlo_text import collectives
from mmljax.planning.programs import abstract_run, count_step, lower_step
from mmljax.training.state import state_bytes

GIB = 2**30


def make_config(options: argparse.Namespace) -> Any:
    """The defaults with the sizes that are asked for."""
    config = default_config()
    config.model.backbone = options.backbone
    config.model.compute_dtype = "float32"
    config.data.image_size = options.image_size
    config.data.batch_size = options.batch_size
    config.data.images_per_class = 2
    config.row_block = options.row_block
    config.objectives.separation.sampled_proxies = options.sampled_proxies
    return from_mapping(config)


def state_table(groups: Mapping[str, int]) -> str:
    """Bytes per device of the state."""
    return "\n".join(f"  {name:<24}{size / GIB:10.3f} GiB" for name, size in groups.items())


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=512, help="global")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--sampled-proxies", type=int, default=8192, help="0: all, C x C")
    parser.add_argument("--row-block", type=int, default=8192)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    config = make_config(options)
    counts = Counts(options.classes, 10 * options.classes)
    run = abstract_run(config, counts, make_mesh(jax.devices()[: options.devices]))
    program = lower_step(run, config, channels=3).compile()
    print(machine.describe())
    print(
        f"{options.classes} classes, {config.model.embedding_size} dimensions, "
        f"{options.devices} devices, batch {options.batch_size}, {options.sampled_proxies} sampled "
        f"proxies, row block {options.row_block}; per device:"
    )
    print(state_table(state_bytes(run.state)))
    print(f"  {'work':<24}{program.memory_analysis().temp_size_in_bytes / GIB:10.3f} GiB")
    for name, found in count_step(run, config, channels=3).items():
        print(f"  {name:<24}{found.number / 1e12:10.3f} T operations")
    for kind, traffic in sorted(collectives(program.as_text()).items()):
        print(f"  {kind:<24}{traffic.bytes / 2**20:10.1f} MiB in {traffic.number}")


if __name__ == "__main__":
    main()

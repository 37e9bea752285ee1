"""Memory and collectives of a step, as the compiled program has them; nothing is run.

    python -m benchmarks.scale                                   # a million classes, 8 devices
    python -m benchmarks.scale --classes 10000000 --devices 128 --sampled-proxies 65536

The step is compiled for virtual CPU devices from shapes alone, so no array of that size is ever
held. ``docs/scale.md`` says what the numbers should be.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

GIB = 2**30
_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\((?P<operands>[^)]*)\)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Of one kind of collective in a program."""

    count: int
    bytes: int  # of the larger end, summed over its uses


def collectives(program: str) -> dict[str, Traffic]:
    """What a compiled program's text exchanges, by kind of collective."""
    found: dict[str, Traffic] = {}
    shapes = {
        match[1]: match[2] for match in re.finditer(r"%?([\w.\-]+) = (\(.+?\)|\S+) ", program)
    }
    for match in _COLLECTIVE.finditer(program):
        operands = [
            part if _SHAPE.search(part) else shapes.get(part.strip().lstrip("%"), "")
            for part in re.split(r",(?![^\[]*\])", match["operands"])
        ]
        size = max(_bytes(match["result"]), sum(map(_bytes, operands)))
        before = found.get(match["kind"], Traffic(0, 0))
        found[match["kind"]] = Traffic(before.count + 1, before.bytes + size)
    return found


def _bytes(text: str) -> int:
    return sum(
        _ITEM[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _SHAPE.findall(text)
        if kind in _ITEM
    )


def compile_step(config: Any, *, classes: int, devices: int) -> tuple[Any, Any]:
    """``(compiled step, abstract state)`` on that many devices; no array is made."""
    from mmljax.mesh import make_mesh, rows_sharding
    from mmljax.training.state import shardings
    from mmljax.training.trainer import make_trainer
    from mmljax.types import Batch

    mesh = make_mesh(jax.devices()[:devices])
    trainer = None

    def state() -> Any:
        nonlocal trainer
        trainer = make_trainer(
            config, classes=classes, channels=3, train_examples=10 * classes, mesh=mesh
        )
        return trainer.state

    shapes = jax.eval_shape(state)
    assert trainer is not None
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings(shapes, trainer.objective, mesh),
    )
    size, side = config.data.batch_size, config.data.image_size
    rows = rows_sharding(mesh)
    batch = Batch(
        jax.ShapeDtypeStruct((size, side, side, 3), np.uint8, sharding=rows),
        jax.ShapeDtypeStruct((size,), np.int32, sharding=rows),
        jax.ShapeDtypeStruct((size,), np.bool_, sharding=rows),
    )
    return trainer.step.lower(abstract, batch).compile(), abstract


def make_config(options: argparse.Namespace) -> Any:
    """The defaults with the sizes that are asked for."""
    from mmljax.config import default_config, from_mapping

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
    from benchmarks import machine
    from mmljax.training.state import state_bytes

    config = make_config(options)
    program, state = compile_step(config, classes=options.classes, devices=options.devices)
    print(machine.describe())
    print(
        f"{options.classes} classes, {config.model.embedding_size} dimensions, "
        f"{options.devices} devices, batch {options.batch_size}, {options.sampled_proxies} sampled "
        f"proxies, row block {options.row_block}; per device:"
    )
    print(state_table(state_bytes(state)))
    memory, cost = program.memory_analysis(), program.cost_analysis()
    print(f"  {'work':<24}{memory.temp_size_in_bytes / GIB:10.3f} GiB")
    print(f"  {'operations':<24}{cost['flops'] / 1e9:10.1f} G (of loops, one round)")
    for kind, traffic in sorted(collectives(program.as_text()).items()):
        print(f"  {kind:<24}{traffic.bytes / 2**20:10.1f} MiB in {traffic.count}")


if __name__ == "__main__":
    main()

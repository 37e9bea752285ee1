"""Cost of the ledger: the whole step beside one that knows only the sum of the losses.

    python -m benchmarks.ledger                                        # ResNet-50, 224 px
    python -m benchmarks.ledger --batch-size 16 --image-size 128       # enough for a CPU

The plain step has the same network, objectives, mining, weights and optimiser, and takes one
gradient of the weighted sum; it measures no contribution. Steps alternate; the best of each side
counts. The network's gradient norms of the first step are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from benchmarks import machine
from benchmarks.train_step import CLASSES, make_batch, make_config
from mmljax.durations import RunSize
from mmljax.losses.collectives import Axis
from mmljax.losses.relations import RELATIONS, objective_sums
from mmljax.mesh import AXIS, make_mesh, place
from mmljax.numerics import l2_normalize
from mmljax.training import optim
from mmljax.training.trainer import make_trainer


def plain_step(trainer: Any, weights: list[float], mesh: Any, optimizer: Any) -> Any:
    """``(params, model_state, optimizer_state, state, batch) -> (the first three, norm)``."""
    objective = trainer.objective

    def loss(params: Any, model_state: Any, state: Any, batch: Any) -> Any:
        model = nnx.merge(trainer.graphdef, params["network"], model_state, copy=True)
        embeddings = model(batch.images, train=True)
        unit, proxies = l2_normalize(embeddings), l2_normalize(params["proxies"])
        points = objective._points(unit, proxies, batch.labels, batch.valid, state, Axis(None))
        total = jnp.zeros(())
        for weight, one in zip(weights, objective.objectives, strict=True):
            rows, columns = (points.rows[kind] for kind in RELATIONS[one.relation])
            sums, (counts, _) = objective_sums(one, rows, columns, points.context, row_block=0)
            total += weight * jnp.sum(sums / jnp.maximum(counts, 1))
        return total, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    split, whole = PartitionSpec(AXIS), PartitionSpec()
    params_specs, state_specs = objective.partition_specs(AXIS)
    layout = {"network": whole, **params_specs}
    gradients = jax.shard_map(
        jax.grad(loss, has_aux=True),
        mesh=mesh,
        in_specs=(layout, whole, state_specs, split),
        out_specs=(layout, whole),
    )

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, model_state: Any, optimizer_state: Any, state: Any, batch: Any) -> Any:
        grads, model_state = gradients(params, model_state, state, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        norm = optax.tree.norm(grads["network"])
        return optax.apply_updates(params, updates), model_state, optimizer_state, norm

    return step


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=180)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--batch-norm", default="global")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = make_config(options)
    fixed = dataclasses.replace(config.combination, name="fixed")
    config = dataclasses.replace(config, combination=fixed)
    mesh = make_mesh(jax.devices()[:1])
    trainer = make_trainer(config, classes=CLASSES, channels=3, train_examples=25_882, mesh=mesh)
    size = RunSize(options.batch_size, 25_882, trainer.total_steps)
    optimizer = optim.make_optimizer(config.optimizer, optim.make_schedules(config.optimizer, size))
    batch = place(make_batch(options), mesh)
    state = trainer.state
    held = jax.tree.map(jnp.copy, (state.params, state.model_state, state.optimizer_state))
    weights = [row.weight for row in config.objectives.values()]
    plain = plain_step(trainer, weights, mesh, optimizer)
    key = jax.tree.map(jnp.copy, state.objective)
    programs = {
        "with ledger": trainer.step.lower(state, batch).compile(),
        "plain": plain.lower(*held, key, batch).compile(),
    }
    norms: dict[str, float] = {}

    def with_ledger() -> None:
        nonlocal state
        state, scalars = jax.block_until_ready(programs["with ledger"](state, batch))
        norms.setdefault("with ledger", float(scalars["gradient_norm/network"]))

    def without() -> None:
        nonlocal held
        *held, norm = jax.block_until_ready(programs["plain"](*held, key, batch))
        norms.setdefault("plain", float(norm))

    sides = {"with ledger": with_ledger, "plain": without}
    best = dict.fromkeys(sides, float("inf"))
    for repeat in range(options.repeats + 1):  # the first of each is left out
        for name in list(sides)[:: 1 if repeat % 2 else -1]:  # ab, ba, ab: neither always first
            begin = time.perf_counter()
            sides[name]()
            if repeat:
                best[name] = min(best[name], time.perf_counter() - begin)
    ours, theirs = norms.values()
    assert abs(ours - theirs) < 1e-2 * theirs, norms
    print(machine.describe())
    work = {name: program.cost_analysis() for name, program in programs.items()}
    for kind, text in (("flops", "operations"), ("bytes accessed", "bytes moved")):
        a, b = (work[name][kind] for name in sides)
        print(f"{text:<12}{100 * (a / b - 1):+.2f} %")
    for name, seconds in best.items():
        print(f"{name:<12}{1e3 * seconds:10.1f} ms per step")
    print(f"cost of the ledger: {100 * (best['with ledger'] / best['plain'] - 1):+.1f} %")


if __name__ == "__main__":
    main()

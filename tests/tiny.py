"""A run small enough for tests: a two-layer network with BatchNorm, and batches of noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmljax.config import GroupConfig, OptimizerConfig, RunSize
from mmljax.losses import combination, pair, proxy, separation
from mmljax.mesh import AXIS, make_mesh, place
from mmljax.numerics import l2_normalize
from mmljax.training import optim, registry
from mmljax.training.step import make_train_step
from mmljax.types import Batch, Objective, TrainState

CLASSES, SIZE, PIXELS = 10, 6, 5


class Network(nnx.Module):
    """Pixels to unit vectors, with the names that the optimiser groups go by."""

    def __init__(self, *, dtype: Any, rngs: nnx.Rngs) -> None:
        kind = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        # No bias: before BatchNorm its gradient is nothing but rounding.
        self.backbone = nnx.Linear(PIXELS * PIXELS, 8, use_bias=False, **kind)
        self.head = Head(dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images.reshape(images.shape[0], -1) / 255
        # Smooth, as a unit that rounding moves across a kink would hide how exact the step is.
        x = nnx.silu(self.head.norm(self.backbone(x), use_running_average=not train))
        return l2_normalize(self.head.projection(x))


class Head(nnx.Module):
    """BatchNorm over the global batch and a projection."""

    def __init__(self, *, dtype: Any, rngs: nnx.Rngs) -> None:
        kind = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.norm = nnx.BatchNorm(8, axis_name=AXIS, use_fast_variance=False, **kind)
        self.projection = nnx.Linear(8, SIZE, **kind)


OPTIMIZER = OptimizerConfig(
    name="adamw",
    b1=0.9,
    b2=0.999,
    epsilon=1e-8,
    backbone=GroupConfig(1e-2, 1e-3),
    head=GroupConfig(2e-2, 1e-3),
    proxies=GroupConfig(5e-2, 0.0),
    weights=GroupConfig(5e-2, 0.0),
    schedule="cosine",
    step_every="10%",
    step_factor=0.5,
    warmup="3 steps",
    freeze_backbone="1 steps",
    clip_norm=5.0,
)


def objectives(*, rule: str = "either", memory: bool = False) -> list[Objective]:
    """Pair, mined proxy and separation."""
    miner = registry.MINERS[rule]
    bound = miner and partial(miner, margin=0.1, blend=0.5)
    return [
        Objective(
            "pair",
            "sample_to_sample",
            partial(pair.multi_similarity_loss, alpha=2.0, beta=40.0, base=0.5),
            bound,
            memory,
        ),
        Objective(
            "proxy",
            "proxy_to_sample",
            partial(proxy.proxy_anchor_loss, alpha=32.0, margin=0.1),
            bound,
            memory,
        ),
        Objective(
            "separation",
            "proxy_to_proxy",
            partial(separation.nearest_proxy_separation_loss, gamma=32.0, margin=0.1),
            None,
            False,
        ),
    ]


def share() -> Any:
    """Learned weights with targets for both groups."""
    return combination.share((1.0, 0.1, 0.01), targets=((0.7, 0.3, 0.0), (0.0, 0.8, 0.2)))


def batch(step: int, *, size: int = 32) -> Batch:
    """Images whose mean tells their class, a little."""
    random = np.random.default_rng(step)
    labels = np.repeat(random.permutation(CLASSES)[: size // 4], 4).astype(np.int32)
    base = np.random.default_rng(0).integers(0, 200, (CLASSES, PIXELS, PIXELS, 1))
    noise = random.integers(0, 56, (size, PIXELS, PIXELS, 1))
    return Batch((base[labels] + noise).astype(np.uint8), labels, np.ones(size, bool))


def make(
    devices: int,
    *,
    dtype: Any = jnp.float32,
    rows: list[Objective] | None = None,
    combine: Any = None,
    memory: int = 0,
    centers: int = 1,
    surgery: bool = False,
    row_block: int = 0,
    optimizer: Any = None,
) -> tuple[Any, TrainState, Any, Any]:
    """``(step, state, place, graphdef)`` on that many virtual devices."""
    mesh = make_mesh(jax.devices()[:devices])
    rows = objectives() if rows is None else rows
    combine = share() if combine is None else combine
    if optimizer is None:
        schedules = optim.make_schedules(OPTIMIZER, RunSize(32, 320, 20))
        optimizer = optim.make_optimizer(OPTIMIZER, schedules)
    graphdef, network, model_state = nnx.split(
        Network(dtype=dtype, rngs=nnx.Rngs(0)), nnx.Param, ...
    )
    statistics = jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(model_state))
    weights, combination_state = combine.init(len(rows))
    params = {
        "network": nnx.to_pure_dict(network),
        "proxies": jax.random.normal(jax.random.key(3), (128, SIZE), dtype),
        "weights": jax.tree.map(lambda x: x.astype(dtype), weights),
    }
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=statistics,
        combination_state=combination_state,
        optimizer_state=optimizer.init(params),
        memory={
            "vectors": jnp.zeros((memory, SIZE), dtype),
            "labels": jnp.full((memory,), -1, jnp.int32),
        }
        if memory
        else (),
        key=jax.random.key(7),
    )
    state = jax.device_put(state, registry.state_shardings(state, mesh))
    step = make_train_step(
        graphdef=graphdef,
        objectives=rows,
        combination=combine,
        optimizer=optimizer,
        mesh=mesh,
        classes=CLASSES,
        centers=centers,
        surgery=surgery,
        row_block=row_block,
        memory_start=3,
    )
    return step, state, partial(place, mesh=mesh), graphdef

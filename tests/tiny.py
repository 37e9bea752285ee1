"""Runs small enough for tests: a two-layer network or an embedder, and batches of noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmljax.config import GroupConfig, ModelConfig, Objective, OptimizerConfig
from mmljax.durations import RunSize
from mmljax.losses.multi_objective import MultiObjective
from mmljax.mesh import AXIS, make_mesh, place
from mmljax.models.embedder import Embedder, make_embedder
from mmljax.numerics import l2_normalize
from mmljax.training import optim
from mmljax.training.state import make_state
from mmljax.training.step import make_train_step
from mmljax.types import Batch, TrainState

CLASSES, SIZE, PIXELS = 10, 6, 5


class Network(nnx.Module):
    """Pixels to unit vectors, with the names that the optimiser groups go by."""

    def __init__(self, *, dtype: Any, rngs: nnx.Rngs) -> None:
        kind = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        # No bias: before BatchNorm its gradient is nothing but rounding.
        self.backbone = nnx.Linear(PIXELS * PIXELS, 8, use_bias=False, **kind)
        self.head = Head(dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool, keys: Any = None) -> jax.Array:
        del keys
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


def objectives(*, rule: str = "either", memory: bool = False) -> dict[str, Objective]:
    """Pair, mined proxy and separation, with targets for both groups."""
    mining = {} if rule == "none" else {"mining": rule, "mining_params": {"margin": 0.1}}
    return {
        "pair": Objective("multi_similarity", embedding_share=0.7, memory=memory, **mining),
        "proxy": Objective(
            "proxy_anchor",
            weight=0.1,
            embedding_share=0.3,
            proxy_share=0.8,
            memory=memory,
            **mining,
        ),
        "separation": Objective("nearest_proxy", weight=0.01, proxy_share=0.2),
    }


def batch(step: int, *, size: int = 32) -> Batch:
    """Images whose mean tells their class, a little."""
    random = np.random.default_rng(step)
    labels = np.repeat(random.permutation(CLASSES)[: size // 4], 4).astype(np.int32)
    base = np.random.default_rng(0).integers(0, 200, (CLASSES, PIXELS, PIXELS, 1))
    noise = random.integers(0, 56, (size, PIXELS, PIXELS, 1))
    return Batch((base[labels] + noise).astype(np.uint8), labels, np.ones(size, bool))


def make_objective(rows: Any = None, **options: Any) -> MultiObjective:
    """The objectives of such a run; options are those of :class:`mmljax.MultiObjective`."""
    defaults = {"classes": CLASSES, "memory_start": 3, "multiple_of": 8}
    return MultiObjective(
        objectives() if rows is None else rows, dimension=SIZE, **{**defaults, **options}
    )


def make_optimizer() -> Any:
    """The optimiser of such a run, over 20 steps."""
    schedules = optim.make_schedules(OPTIMIZER, RunSize(32, 320, 20))
    return optim.make_optimizer(OPTIMIZER, schedules)


def make(
    devices: int,
    *,
    dtype: Any = jnp.float32,
    rows: Any = None,
    optimizer: Any = None,
    ema_decay: float = 0.0,
    proxies_dtype: str = "float32",
    **options: Any,
) -> tuple[Any, TrainState, Any, Any]:
    """``(step, state, place, graphdef)`` on that many virtual devices."""
    mesh = make_mesh(jax.devices()[:devices])
    objective = make_objective(rows, **{"multiple_of": devices, **options})
    optimizer = make_optimizer() if optimizer is None else optimizer
    graphdef, network, statistics = nnx.split(
        Network(dtype=dtype, rngs=nnx.Rngs(0)), nnx.Param, ...
    )
    state = make_state(
        nnx.to_pure_dict(network),
        jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(statistics)),
        objective=objective,
        optimizer=optimizer,
        seed=3,
        mesh=mesh,
        averaged=ema_decay > 0,
        proxies_dtype=proxies_dtype,
    )
    step = make_train_step(
        graphdef=graphdef,
        objective=objective,
        optimizer=optimizer,
        mesh=mesh,
        ema_decay=ema_decay,
    )
    return step, state, partial(place, mesh=mesh), graphdef


def rngs() -> nnx.Rngs:
    """The source of an embedder's parameters, by the generator that compiles fastest."""
    return nnx.Rngs(jax.random.key(0, impl="rbg"))


def image_batch(index: int, *, pixels: int, size: int = 32) -> Batch:
    """Noise of three channels, ``pixels`` a side, with four images per class."""
    shape = (size, pixels, pixels, 3)
    images = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
    return Batch(images, np.resize(batch(index).labels, size), np.ones(size, bool))


def make_embedder_step(
    config: ModelConfig,
    *,
    devices: int,
    rate: float = 1.0,
    change: Callable[[Embedder], None] = lambda model: None,
    compile_for: Any = None,
    micro_batches: int = 1,
) -> tuple[Any, TrainState, Any]:
    """``(step, state, place)`` of an embedder with random weights under gradient descent.

    Args:
      config: of the model.
      devices: how many virtual devices hold the state.
      rate: learning rate.
      change: what is done to the model first.
      compile_for: the mesh of the step, if it is another one.
      micro_batches: of a step.
    """
    mesh = make_mesh(jax.devices()[:devices])
    model = make_embedder(config, channels=3, rngs=rngs())
    change(model)
    graphdef, network, rest = nnx.split(model, nnx.Param, ...)
    objective = make_objective(matryoshka=config.matryoshka)
    kind = {"objective": objective, "optimizer": optax.sgd(rate)}
    pure = nnx.to_pure_dict
    state = make_state(pure(network), pure(rest), seed=3, mesh=mesh, **kind)
    step = make_train_step(
        graphdef=graphdef, mesh=compile_for or mesh, micro_batches=micro_batches, **kind
    )
    return step, state, partial(place, mesh=mesh)

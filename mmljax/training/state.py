"""The train state: how it starts, how it lies over the devices, and its bytes per device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmljax.config import ModelConfig, choose
from mmljax.losses.multi_objective import MultiObjective
from mmljax.mesh import AXIS, spread
from mmljax.models.embedder import Embedder, FeatureEmbedder, make_embedder
from mmljax.models.lora import refuse_on_features
from mmljax.models.pretrained import load_pretrained
from mmljax.training.freezing import Trains, all_train, split_network
from mmljax.types import Params, TrainState

PROXIES_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}  # None: as the network's parameters


def make_model(
    config: ModelConfig, *, seed: int, channels: int, pretrained: bool, features: int = 0
) -> tuple[nnx.GraphDef, Any, Any]:
    """Graph, parameters and BatchNorm statistics of a new embedder.

    Args:
      config: of the model.
      seed: of the parameters.
      channels: of the images.
      pretrained: whether to load the weights that the config names, if any.
      features: channels of the features that take the place of images; the embedder then has the
        same head and no backbone. 0 for images.

    Raises:
      UserError: if the weights that the config names cannot be used, or the backbone's features
        have another number of channels or would have adapters.
    """

    model: Embedder | FeatureEmbedder
    if features:
        refuse_on_features(config.lora)
        model = _head_builder(config, channels, features)(np.uint32(seed))
    else:
        model = whole = _build(config, seed, channels)
        if pretrained and config.pretrained:
            load_pretrained(whole.backbone, config.pretrained)
    graphdef, network, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(network), nnx.to_pure_dict(rest[0])


def _build(config: ModelConfig, seed: Any, channels: int) -> Embedder:
    # This generator compiles several times faster than the default one, per shape.
    rngs = nnx.Rngs(jax.random.key(seed, impl="rbg"))
    return make_embedder(config, channels=channels, rngs=rngs)


@functools.lru_cache(maxsize=8)
def _head_builder(
    config: ModelConfig, channels: int, features: int
) -> Callable[[Any], FeatureEmbedder]:
    """A compiled function of the seed, which makes no arrays of the backbone."""
    return nnx.jit(lambda seed: _build(config, seed, channels).without_backbone(features))


def make_state(
    network: Any,
    model_state: Any,
    *,
    objective: MultiObjective,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    averaged: bool = False,
    neighbors: Mapping[str, tuple[int, ...]] | None = None,
    proxies_dtype: str = "float32",
    trains: Trains = all_train,
) -> TrainState:
    """The state before the first step, laid out over the mesh.

    Args:
      network: parameters; memory, and proxies unless ``proxies_dtype`` says otherwise, have the
        dtype of their first leaf.
      model_state: BatchNorm statistics.
      objective: whose proxies, weights and memory are part of the state; its ``multiple_of`` is a
        multiple of the devices.
      optimizer: for ``{"network", "proxies", "weights"}``, of the network what is trained.
      seed: of the proxies and of all later draws.
      mesh: of one axis.
      averaged: whether the state has a moving average of the network, as far as it is trained, and
        of the statistics, which starts as a copy of them.
      neighbors: shapes of the tables that composed batches follow, filled by the first refresh.
      proxies_dtype: a key of ``PROXIES_DTYPES``; their optimiser's moments are as for float32.
      trains: the network's parameters that are trained, by name.

    Raises:
      UserError: on an unknown dtype.
    """
    stored = choose(PROXIES_DTYPES, proxies_dtype, key="config.optimizer.proxies_dtype")
    dtype = jax.tree.leaves(network)[0].dtype
    objective_params, objective_state = objective.init(jax.random.key(seed), dtype=dtype)
    params = {"network": network, **objective_params}
    trained, _ = split_network(network, trains)
    average: Params = ()
    if averaged:
        weights = {"network": trained, "model_state": model_state}
        average = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(weights)
    optimizer_state = optimizer.init(params | {"network": trained})
    if stored is not None:
        params["proxies"] = params["proxies"].astype(stored)
    tables = {name: jnp.zeros(shape, jnp.int32) for name, shape in (neighbors or {}).items()}
    state = TrainState(params, model_state, objective_state, optimizer_state, average, tables or ())
    return spread(state, shardings(state, objective, mesh))


def partition_specs(state: TrainState, objective: MultiObjective) -> TrainState:
    """How every array of the state is split over the mesh axis: the one place that says so.

    Proxies, their optimiser moments and the memory are split by rows; the rest is replicated. The
    result has the structure of ``state``, with a PartitionSpec per leaf.
    """
    objective_params, objective_state = objective.partition_specs(AXIS)
    whole, rows = PartitionSpec(), PartitionSpec(AXIS)
    optimizer: Any = whole
    if isinstance(state.optimizer_state, optax.transforms.PartitionState):
        groups = state.optimizer_state.inner_states
        moments = jax.tree.map(lambda x: rows if jnp.ndim(x) else whole, groups["proxies"])
        optimizer = optax.transforms.PartitionState(
            {name: moments if name == "proxies" else whole for name in groups}
        )
    prefix = TrainState(
        {"network": whole, **objective_params}, whole, objective_state, optimizer, whole, whole
    )
    return jax.tree.broadcast(prefix, state, is_leaf=lambda x: isinstance(x, PartitionSpec))


def shardings(state: TrainState, objective: MultiObjective, mesh: Mesh) -> TrainState:
    """A NamedSharding for every array of the state."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition_specs(state, objective),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def real_rows(state: TrainState, objective: MultiObjective) -> TrainState:
    """How many rows of each array are not padding; 0 for an array that is not split by rows.

    Padding follows the number of devices, so it may differ between two sessions of a run.
    """

    def rows(path: Any, spec: PartitionSpec) -> int:
        if not len(spec):
            return 0
        memory = jax.tree_util.GetAttrKey("memory") in path
        return objective.memory_size if memory else objective.classes * objective.centers

    return jax.tree_util.tree_map_with_path(
        rows, partition_specs(state, objective), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes on one device by group, from arrays or from shapes with shardings.

    The optimiser's moments of the proxies are a group of their own, as they are split over the
    devices with the proxies; see docs/scale.md.
    """
    moments: Any = ()
    if isinstance(state.optimizer_state, optax.transforms.PartitionState):
        moments = state.optimizer_state.inner_states["proxies"]
    groups = {
        "network": state.params["network"],
        "proxies": state.params["proxies"],
        "statistics": state.model_state,
        "average": state.average,
        "neighbors": state.neighbors,
        "memory": state.objective.memory,
        "optimizer of proxies": moments,
    }
    sizes = {name: tree_bytes(tree) for name, tree in groups.items()}
    rest = tree_bytes(state.optimizer_state) - sizes["optimizer of proxies"]
    return {**sizes, "optimizer of the rest": rest}


def describe_state(state: TrainState) -> str:
    """The bytes per device as one line for the log."""
    sizes = {name: size for name, size in state_bytes(state).items() if size}
    parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
    return f"state per device: {sum(sizes.values()) / 2**20:.1f} MiB ({parts})"


def tree_bytes(tree: Any) -> int:
    """Bytes on one device, of arrays or of shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total

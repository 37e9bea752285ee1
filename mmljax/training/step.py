"""One training step: forward, objectives, one backward pass, one update.

The step is one ``jax.jit``. Inside, a ``jax.shard_map`` over all devices computes the gradients:
rows are local to a device and columns are gathered (:mod:`mmljax.losses.multi_objective`). Optax
runs outside the shard_map, where XLA splits it as the arrays are split, so that a norm over sharded
proxies needs no special code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from mmljax.losses.collectives import Axis
from mmljax.losses.ledger import Scalars
from mmljax.losses.multi_objective import MultiObjective
from mmljax.mesh import AXIS
from mmljax.numerics import stochastic_round
from mmljax.training.freezing import Trains, all_train, split_network
from mmljax.types import Batch, ObjectiveState, Params, TrainState, overlaid

# The streams of keys of the network and of rounding; the objectives use those of the steps.
_NETWORK, _ROUNDING = 2**31, 2**31 + 1

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Scalars]]
"""A jitted step that donates the state it is given."""


def make_train_step(
    *,
    graphdef: nnx.GraphDef,
    objective: MultiObjective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    ema_decay: float = 0.0,
    micro_batches: int = 1,
    trains: Trains = all_train,
) -> TrainStep:
    """Bind everything static into a jitted step.

    With micro batches the network's activations are held for one of them at a time, and the step is
    that of the whole batch: see :func:`_in_micro_batches`.

    Proxies that are stored in bfloat16 have the dtype of the network's parameters within the step,
    as their gradients and moments have, and are rounded once, at its end:
    :func:`mmljax.numerics.stochastic_round`.

    Args:
      graphdef: of the embedder, from ``nnx.split``.
      objective: of the embeddings and the proxies.
      optimizer: for ``state.params``, of the network what is trained.
      mesh: of one axis, over which the batch and the proxies are split.
      ema_decay: of the moving average, where the state has one.
      micro_batches: into how many parts each device's rows are cut; above 1 only for networks
        without batch statistics (:func:`mmljax.training.trainer.check_micro_batches`).
      trains: the network's parameters that are trained, by name. The others have no gradient, also
        not in the ledger's ``gradient_norm/network``.
    """

    gradients = _make_gradients(graphdef, objective, mesh=mesh, micro_batches=micro_batches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        stored = state.params["proxies"]
        wide = jax.tree.leaves(state.params["network"])[0].dtype
        proxies = stored.astype(jnp.promote_types(stored.dtype, wide))
        trained, frozen = split_network(state.params["network"], trains)
        params = state.params | {"network": trained, "proxies": proxies}
        grads, (statistics, objective_state, ledger) = gradients(
            params, frozen, state.model_state, state.objective, batch
        )
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, params)
        params = optax.apply_updates(params, updates)
        if proxies.dtype != stored.dtype:
            key = _step_key(state.objective, _ROUNDING)
            params = params | {"proxies": stochastic_round(params["proxies"], key)}
        for group in ("network", "proxies"):
            ledger[f"gradient_norm/{group}"] = optax.tree.norm(grads[group])
        average = state.average
        if average:
            new = {"network": params["network"], "model_state": statistics}
            average = move_average(average, new, step=state.step, decay=ema_decay)
        params = params | {"network": overlaid(params["network"], frozen)}
        return state._replace(
            params=params,
            model_state=statistics,
            objective=objective_state,
            optimizer_state=optimizer_state,
            average=average,
        ), ledger

    return jax.jit(step, donate_argnums=0)


def _make_gradients(
    graphdef: nnx.GraphDef, objective: MultiObjective, *, mesh: Mesh, micro_batches: int
) -> Callable[..., Any]:
    """Forward, objectives and backward pass over the devices.

    A function ``(trained params, frozen network, model_state, objective state, batch) ->
    (gradients, (BatchNorm statistics, objective state, ledger))``.
    """

    def embed(network: Any, model_state: Any, images: Any, keys: Any) -> Any:
        model = nnx.merge(graphdef, network, model_state, copy=True)
        embeddings = model(images, train=True, keys=keys)
        return embeddings, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    if micro_batches > 1:
        embed = _in_micro_batches(embed, count=micro_batches)

    def gradients(
        params: Any, frozen: Any, model_state: Any, state: ObjectiveState, batch: Batch
    ) -> Any:
        def loss(params: Any) -> Any:
            keys = _keys(state, len(batch.labels))
            network = overlaid(params["network"], frozen)
            embeddings, statistics = embed(network, model_state, batch.images, keys)
            value, (new_state, ledger) = objective(
                params,
                state,
                embeddings,
                batch.labels,
                valid=batch.valid,
                axis_name=AXIS,
            )
            return value, (statistics, new_state, ledger)

        return jax.grad(loss, has_aux=True)(params)

    whole, rows = PartitionSpec(), PartitionSpec(AXIS)
    objective_params, objective_state = objective.partition_specs(AXIS)
    params_specs = {"network": whole, **objective_params}
    return jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(params_specs, whole, whole, objective_state, rows),
        out_specs=(params_specs, (whole, objective_state, whole)),
    )


def _in_micro_batches(embed: Callable[..., Any], *, count: int) -> Callable[..., Any]:
    """An embedding function that keeps no activations of a part of the batch for the next part.

    GradCache (Gao et al. 2021, arXiv 2101.06983): all embeddings first, then the objectives and
    their gradients on the whole batch, then a second forward pass of each part with its backward
    pass. Here differentiation does that: each part is rematerialised. The parts' gradients are
    summed on the device, and then once over the devices.
    """

    def embed_parts(network: Any, model_state: Any, images: Any, keys: Any) -> Any:
        network = jax.tree.map(Axis(AXIS).varying, network)

        def embed_part(part: Any) -> Any:
            return embed(network, model_state, *part)[0]

        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), (images, keys))
        embeddings = jax.lax.map(jax.checkpoint(embed_part), parts)
        return embeddings.reshape(-1, embeddings.shape[-1]), model_state

    return embed_parts


def _step_key(state: ObjectiveState, stream: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.fold_in(state.key, stream), state.step)


def _keys(state: ObjectiveState, count: int) -> PRNGKeyArray:
    """A key for each example of this device, from the run's seed, the step and the position."""
    key = _step_key(state, _NETWORK)
    positions = Axis(AXIS).index() * count + jnp.arange(count)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def move_average(average: Params, new: Params, *, step: Int[Array, ""], decay: float) -> Params:
    """The next exponential moving average, ``d average + (1 - d) new``.

    ``d = min(decay, (1 + t) / (10 + t))`` after ``t`` earlier updates, the warm-up of TensorFlow's
    ``ExponentialMovingAverage``, so that the weights before the first step soon lose their part.
    What does not change stays equal bit for bit. Arrays of other than real numbers are replaced.

    Args:
      average: of the arrays so far; at ``t = 0`` the arrays before the first update.
      new: the arrays after this update.
      step: ``t``.
      decay: from 0 to below 1. In float32 a difference below about 1e-7 / (1 - decay) of a value
        is lost.
    """

    def move(old: Array, new: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        rest = jnp.maximum(1 - decay, 9 / (10 + step.astype(old.dtype)))  # 1 - d
        return old + rest * (new - old)

    return jax.tree.map(move, average, new)

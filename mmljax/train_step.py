"""One training step: forward, objectives where they meet, one backward, one update.

The step is one ``jax.jit``. Inside, a ``jax.shard_map`` over all devices computes the gradients:
rows are local to a device and columns are gathered (see ``relations``). The gradient of each
objective is taken at the embeddings ``X`` and at the proxies ``P`` only; weighted, their sum is
sent back through the network once. No derivative is taken through a collective. Optax runs outside
the shard_map, where XLA splits it as the arrays are split, so that a norm over sharded proxies is
right without special code.

Gradients at ``X`` and ``P`` are those on the unit sphere: their radial part, which the
normalisation removes on the way back, counts neither in norms nor in shares nor in cosines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from mmljax.combination import pcgrad_coefficients
from mmljax.ledger import Scalars, contributions
from mmljax.mesh import AXIS
from mmljax.numerics import l2_normalize
from mmljax.relations import (
    PROXIES,
    RELATIONS,
    SAMPLES,
    Context,
    mined_masks,
    nearest_class_proxies,
    objective_sums,
)
from mmljax.types import Batch, Combination, Objective, PairMasks, Points, TrainState


def make_train_step(
    *,
    graphdef: nnx.GraphDef,
    objectives: Sequence[Objective],
    combination: Combination,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    classes: int,
    centers: int,
    surgery: bool,
    row_block: int,
    memory_start: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """Bind everything static; the result is jitted, and donates the state it is given.

    Args:
      graphdef: of the embedder, from ``nnx.split``.
      objectives: in the order of the contribution weights.
      combination: of their losses.
      optimizer: for ``state.params``.
      mesh: of one axis, over which the batch and the proxies divide.
      classes: number of training classes; further proxies are padding.
      centers: proxies per class.
      surgery: whether conflicting gradients at ``X`` are projected (PCGrad).
      row_block: rows of similarities held at once; 0 for all.
      memory_start: step from which the cross-batch memory is looked at.
    """
    gradients = jax.shard_map(
        partial(
            _gradients,
            graphdef=graphdef,
            objectives=objectives,
            combination=combination,
            classes=classes,
            centers=centers,
            surgery=surgery,
            row_block=row_block,
            memory_start=memory_start,
        ),
        mesh=mesh,
        in_specs=(
            {
                "network": PartitionSpec(),
                "proxies": PartitionSpec(AXIS),
                "weights": PartitionSpec(),
            },
            PartitionSpec(),
            PartitionSpec(),
            PartitionSpec(AXIS),
            PartitionSpec(),
            PartitionSpec(),
            PartitionSpec(AXIS),
        ),
        out_specs=(
            {
                "network": PartitionSpec(),
                "proxies": PartitionSpec(AXIS),
                "weights": PartitionSpec(),
            },
            PartitionSpec(),
            PartitionSpec(),
            PartitionSpec(AXIS),
            PartitionSpec(),
        ),
    )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        grads, model_state, combination_state, embeddings, scalars = gradients(
            state.params,
            state.model_state,
            state.combination_state,
            state.memory,
            state.step,
            state.key,
            batch,
        )
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        for group in ("network", "proxies"):
            scalars[f"gradient_norm/{group}"] = optax.tree.norm(grads[group])
        memory = state.memory
        if memory:
            size = memory["labels"].shape[0]
            slots = (state.step * batch.labels.shape[0] + jnp.arange(batch.labels.shape[0])) % size
            memory = {
                "vectors": memory["vectors"].at[slots].set(embeddings),
                "labels": memory["labels"].at[slots].set(batch.labels),
            }
        return (
            TrainState(
                step=state.step + 1,
                params=optax.apply_updates(state.params, updates),
                model_state=model_state,
                combination_state=combination_state,
                optimizer_state=optimizer_state,
                memory=memory,
                key=state.key,
            ),
            scalars,
        )

    return jax.jit(step, donate_argnums=0)


def _gradients(
    params: dict[str, Any],
    model_state: Any,
    combination_state: Any,
    memory: Any,
    step: Array,
    key: Array,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef,
    objectives: Sequence[Objective],
    combination: Combination,
    classes: int,
    centers: int,
    surgery: bool,
    row_block: int,
    memory_start: int,
) -> tuple[dict[str, Any], Any, Any, Array, Scalars]:
    """What one device does: gradients of the parameters, new statistics, the ledger."""

    def forward(network: Any) -> tuple[Array, Any]:
        model = nnx.merge(graphdef, network, model_state, copy=True)
        embeddings = model(batch.images, train=True)
        return embeddings, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    embeddings, network_pullback, model_state = jax.vjp(forward, params["network"], has_aux=True)
    proxies, proxies_pullback = jax.vjp(l2_normalize, params["proxies"])

    rows = {
        SAMPLES: _samples(embeddings, batch.labels),
        PROXIES: _proxies(proxies, classes=classes, centers=centers),
    }
    columns = {kind: _gather(points) for kind, points in rows.items()}
    with_memory = columns[SAMPLES]
    if memory:
        with_memory = _append(with_memory, _gather(memory), active=step >= memory_start)
    context = _context(rows[SAMPLES], columns, objectives, key, step, centers=centers)

    losses, kept = [], []
    at: dict[str, list[Array]] = {
        SAMPLES: [],
        PROXIES: [],
    }  # kind: gradient of each objective at this device's points
    for objective in objectives:
        row_kind, column_kind = RELATIONS[objective.relation]
        row, column = rows[row_kind], columns[column_kind]
        if objective.memory:
            column = with_memory
        objective_context = context
        if objective.miner is not None and row_kind == PROXIES:
            objective_context = _with_selection(objective, rows[SAMPLES], column, context)

        def sums(
            row_vectors: Array,
            column_vectors: Array,
            objective: Objective = objective,
            row: Points = row,
            column: Points = column,
            context: Context = objective_context,
        ) -> Any:
            return objective_sums(
                objective,
                row._replace(vectors=row_vectors),
                column._replace(vectors=column_vectors),
                context,
                row_block=row_block,
            )

        total, pullback, (counts, pairs) = jax.vjp(sums, row.vectors, column.vectors, has_aux=True)
        scale = 1 / jnp.maximum(jax.lax.psum(counts, AXIS), 1).astype(total.dtype)
        losses.append(jax.lax.psum(jnp.sum(total * scale), AXIS))
        kept.append(jax.tree.map(lambda x: jax.lax.psum(x, AXIS), pairs))
        row_gradient, column_gradient = pullback(jax.lax.pcast(scale, AXIS, to="varying"))
        column_gradient = column_gradient[: columns[column_kind].labels.shape[0]]  # not memory's
        gradient = {kind: jnp.zeros_like(points.vectors) for kind, points in rows.items()}
        gradient[row_kind] += row_gradient
        gradient[column_kind] += jax.lax.psum_scatter(column_gradient, AXIS, tiled=True)
        for kind in at:
            at[kind].append(_tangent(gradient[kind], rows[kind].vectors))

    loss = jnp.stack(losses)
    stacked = {kind: jnp.stack(gradients) for kind, gradients in at.items()}
    gram = jax.lax.psum(_products(stacked[SAMPLES]), AXIS)
    proxy_squares = jax.lax.psum(jnp.sum(stacked[PROXIES] ** 2, axis=(1, 2)), AXIS)
    norms = jnp.sqrt(jnp.stack([jnp.diag(gram), proxy_squares]))
    weights, weights_gradient, combination_state = combination.apply(
        params["weights"], combination_state, loss, norms
    )
    factors = weights
    if surgery:
        outer = weights[:, None] * weights[None, :]
        factors = pcgrad_coefficients(gram * outer) * weights

    (network_gradient,) = network_pullback(_weighted_sum(factors, stacked[SAMPLES]))
    (proxies_gradient,) = proxies_pullback(_weighted_sum(weights, stacked[PROXIES]))
    grads = {"network": network_gradient, "proxies": proxies_gradient, "weights": weights_gradient}
    scalars = contributions(objectives, loss, weights, norms, gram, kept)
    return grads, model_state, combination_state, embeddings, scalars


def _samples(embeddings: Array, labels: Array) -> Points:
    count = labels.shape[0]
    positions = jax.lax.axis_index(AXIS) * count + jnp.arange(count)
    return Points(embeddings, labels, positions, jnp.full_like(labels, True, dtype=bool))


def _proxies(vectors: Array, *, classes: int, centers: int) -> Points:
    count = vectors.shape[0]
    positions = jax.lax.axis_index(AXIS) * count + jnp.arange(count)
    labels = positions // centers
    return Points(vectors, labels, positions, labels < classes)


def _gather(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def _append(columns: Points, memory: dict[str, Array], *, active: Array) -> Points:
    further = Points(
        vectors=memory["vectors"],
        labels=memory["labels"],
        positions=jnp.full_like(memory["labels"], -1),
        valid=(memory["labels"] >= 0) & active,
    )
    return Points(*(jnp.concatenate(pair) for pair in zip(columns, further, strict=True)))


def _context(
    samples: Points,
    columns: dict[str, Points],
    objectives: Sequence[Objective],
    key: Array,
    step: Array,
    *,
    centers: int,
) -> Context:
    """Partners and keys of the anchors; zeros in place of what no miner asks for."""
    vectors = jnp.zeros_like(samples.vectors)
    if any(objective.miner is not None for objective in objectives):
        vectors = nearest_class_proxies(
            samples.vectors, samples.labels, columns[PROXIES].vectors, centers=centers
        )
    step_key = jax.random.fold_in(key, step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, samples.positions)
    nothing = jnp.zeros((0, 0), bool)
    return Context(
        jax.lax.stop_gradient(vectors), keys, PairMasks(nothing, nothing), columns[SAMPLES].labels
    )


def _with_selection(
    objective: Objective, samples: Points, columns: Points, context: Context
) -> Context:
    """Add what every anchor of the global batch keeps, for an objective with proxies as rows."""
    similarity = jnp.matmul(samples.vectors, columns.vectors.T, precision="highest")
    anchors = objective._replace(relation="sample_to_sample")
    _, mined = mined_masks(anchors, similarity, samples, columns, context)
    return context._replace(kept=_gather(mined))


def _tangent(gradient: Array, vectors: Array) -> Array:
    return gradient - jnp.sum(gradient * vectors, axis=-1, keepdims=True) * vectors


def _products(gradients: Float[Array, "o b d"]) -> Float[Array, "o o"]:
    return jnp.einsum("ibd,jbd->ij", gradients, gradients, precision="highest")


def _weighted_sum(weights: Float[Array, " o"], gradients: Float[Array, "o n d"]) -> Array:
    return jnp.einsum("o,ond->nd", weights, gradients, precision="highest")

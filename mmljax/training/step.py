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
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from mmljax.losses.collectives import (
    append_memory,
    class_proxies,
    draw_proxies,
    fetch_proxies,
    gather,
    own_proxies,
    own_samples,
    return_gradient,
)
from mmljax.losses.combination import pcgrad_coefficients
from mmljax.losses.ledger import Scalars, contributions
from mmljax.losses.relations import (
    PROXIES,
    RELATIONS,
    SAMPLES,
    Context,
    mined_masks,
    nearest_class_proxies,
    objective_sums,
)
from mmljax.mesh import AXIS
from mmljax.numerics import l2_normalize
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
        SAMPLES: own_samples(embeddings, batch.labels),
        PROXIES: own_proxies(proxies, classes=classes, centers=centers),
    }
    columns = {SAMPLES: gather(rows[SAMPLES])}
    if any(RELATIONS[o.relation][1] == PROXIES and not o.sampled_proxies for o in objectives):
        columns[PROXIES] = gather(rows[PROXIES])
    with_memory = columns[SAMPLES]
    if memory:
        with_memory = append_memory(with_memory, gather(memory), active=step >= memory_start)
    step_key = jax.random.fold_in(key, step)
    context = _context(rows, columns[SAMPLES].labels, objectives, step_key, centers=centers)

    losses, kept = [], []
    # By kind, the number of each objective that reaches it: its gradient at this device's points.
    at: dict[str, dict[int, Array]] = {SAMPLES: {}, PROXIES: {}}
    for k, objective in enumerate(objectives):
        row_kind, column_kind = RELATIONS[objective.relation]
        row = rows[row_kind]
        drawn = None
        if objective.sampled_proxies:
            drawn = draw_proxies(
                jax.random.fold_in(step_key, k),
                count=objective.sampled_proxies,
                of=classes * centers,
            )
            vectors = jax.lax.pcast(fetch_proxies(proxies, drawn), AXIS, to="varying")
            column = Points(vectors, drawn // centers, drawn, jnp.full_like(drawn, True, bool))
        else:
            column = with_memory if objective.memory else columns[column_kind]
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
        if drawn is not None:
            home = return_gradient(column_gradient, drawn, proxies)
        else:
            column_gradient = column_gradient[: columns[column_kind].labels.shape[0]]  # no memory
            home = jax.lax.psum_scatter(column_gradient, AXIS, tiled=True)
        gradient = {row_kind: row_gradient}
        gradient[column_kind] = gradient[column_kind] + home if column_kind in gradient else home
        for kind, value in gradient.items():
            at[kind][k] = _tangent(value, rows[kind].vectors)

    loss = jnp.stack(losses)
    gram = _gram(at[SAMPLES], objectives=len(objectives))
    norms = jnp.sqrt(jnp.stack([jnp.diag(gram), _squares(at[PROXIES], objectives=len(objectives))]))
    weights, weights_gradient, combination_state = combination.apply(
        params["weights"], combination_state, loss, norms
    )
    factors = weights
    if surgery:
        outer = weights[:, None] * weights[None, :]
        factors = pcgrad_coefficients(gram * outer) * weights

    (network_gradient,) = network_pullback(_weighted_sum(factors, at[SAMPLES], embeddings))
    (proxies_gradient,) = proxies_pullback(_weighted_sum(weights, at[PROXIES], proxies))
    grads = {"network": network_gradient, "proxies": proxies_gradient, "weights": weights_gradient}
    scalars = contributions(objectives, loss, weights, norms, gram, kept)
    return grads, model_state, combination_state, embeddings, scalars


def _context(
    rows: dict[str, Points],
    labels: Array,
    objectives: Sequence[Objective],
    step_key: Array,
    *,
    centers: int,
) -> Context:
    """Partners and keys of the anchors; zeros in place of what no miner asks for."""
    samples = rows[SAMPLES]
    vectors = jnp.zeros_like(samples.vectors)
    if any(objective.miner is not None for objective in objectives):
        own = class_proxies(rows[PROXIES].vectors, samples.labels, centers=centers)
        vectors = nearest_class_proxies(samples.vectors, own)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, samples.positions)
    nothing = jnp.zeros((0, 0), bool)
    return Context(jax.lax.stop_gradient(vectors), keys, PairMasks(nothing, nothing), labels)


def _with_selection(
    objective: Objective, samples: Points, columns: Points, context: Context
) -> Context:
    """Add what every anchor of the global batch keeps, for an objective with proxies as rows."""
    similarity = jnp.matmul(samples.vectors, columns.vectors.T, precision="highest")
    anchors = objective._replace(relation="sample_to_sample")
    _, mined = mined_masks(anchors, similarity, samples, columns, context)
    return context._replace(kept=gather(mined))


def _tangent(gradient: Array, vectors: Array) -> Array:
    return gradient - jnp.sum(gradient * vectors, axis=-1, keepdims=True) * vectors


def _gram(gradients: dict[int, Array], *, objectives: int) -> Float[Array, "o o"]:
    """Inner products over all devices; 0 of an objective that does not reach the points."""
    gram = jnp.zeros((objectives, objectives))
    if not gradients:
        return gram
    stacked = jnp.stack(list(gradients.values()))
    products = jnp.einsum("ibd,jbd->ij", stacked, stacked, precision="highest")
    here = np.ix_(list(gradients), list(gradients))
    return gram.astype(products.dtype).at[here].set(jax.lax.psum(products, AXIS))


def _squares(gradients: dict[int, Array], *, objectives: int) -> Float[Array, " o"]:
    """Squared norms over all devices."""
    squares = [jnp.sum(gradients[k] ** 2) if k in gradients else None for k in range(objectives)]
    totals = [jnp.zeros(()) if x is None else jax.lax.psum(x, AXIS) for x in squares]
    return jnp.stack(totals)


def _weighted_sum(weights: Array, gradients: dict[int, Array], like: Array) -> Array:
    return sum((weights[k] * x for k, x in gradients.items()), jnp.zeros_like(like))

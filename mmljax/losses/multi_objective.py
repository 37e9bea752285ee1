"""Several objectives at once in any training loop: losses, mining, weights and ledger in one call.

:class:`MultiObjective` is the method of *Deep Metric Learning with Multi-Objective Functions* (Lee
and Roh, CVPR 2020 workshop CVFAD) as one function of embeddings and labels. The gradient of each
objective is taken where the objectives meet, at the unit embeddings ``X`` and the unit proxies
``P``. A combination turns losses and gradient norms into contribution weights. The weighted sum of
the gradients is what ``jax.grad`` sees, so a training step costs one backward pass through the
network, and the ledger (:mod:`mmljax.losses.ledger`) needs no further pass.

Gradients at ``X`` and ``P`` are those on the unit sphere: their radial part, which the
normalisation removes on the way back, counts neither in norms nor in shares nor in cosines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mmljax.config import Objective, choose
from mmljax.errors import UserError
from mmljax.losses.binding import Sizes, bind_combination, bind_objective
from mmljax.losses.collectives import (
    Axis,
    class_proxies,
    draw_proxies,
    fetch_proxies,
    own_proxies,
    own_samples,
    proxies_of,
    return_gradient,
    sample_classes,
)
from mmljax.losses.combination import pcgrad_coefficients
from mmljax.losses.ledger import Scalars, contributions, of_sizes
from mmljax.losses.margins import margins_at
from mmljax.losses.memory import append_memory, init_memory, write_memory
from mmljax.losses.prefixes import make_prefixes, prefix_blocks, unit_prefix
from mmljax.losses.relations import (
    PROXIES,
    RELATIONS,
    SAMPLES,
    Context,
    Kept,
    mined_masks,
    nearest_class_proxies,
    objective_sums,
)
from mmljax.numerics import inverse_lengths, promote
from mmljax.types import BoundObjective, ObjectiveState, Points

ObjectiveParams = dict[str, Any]
"""``proxies [p d]``, of any length, and ``weights``, the parameters of the combination."""


class _Contribution(NamedTuple):
    """One objective's value, its pair counts, and its gradient by kind of point."""

    losses: Float[Array, " s"]  # unweighted, at each size
    kept: Kept
    gradients: dict[str, Array]  # at this device's unit samples, unit proxies, or both


class _Points(NamedTuple):
    """The rows of this device, and the columns that objectives compare them with."""

    rows: dict[str, Points]
    columns: dict[str, Points]
    with_memory: Points
    context: Context
    key: PRNGKeyArray  # of this step
    step: Int[Array, ""]


class MultiObjective:
    """Several objectives on embeddings and class proxies, with learned contribution weights.

    >>> import jax, jax.numpy as jnp
    >>> objective = MultiObjective(
    ...     {"pair": Objective("multi_similarity", embedding_share=0.8),
    ...      "proxy": Objective("proxy_anchor", weight=0.03, embedding_share=0.2)},
    ...     classes=3, dimension=4)
    >>> params, state = objective.init(jax.random.key(0))
    >>> embeddings, labels = jax.random.normal(jax.random.key(1), (6, 4)), jnp.arange(6) % 3
    >>> def loss(embeddings, params):
    ...     return objective(params, state, embeddings, labels)
    >>> gradients, (state, ledger) = jax.grad(loss, (0, 1), has_aux=True)(embeddings, params)
    >>> [x.shape for x in jax.tree.leaves(gradients)]
    [(6, 4), (3, 4), (2,)]
    >>> bool(ledger["share_embeddings/pair"] + ledger["share_embeddings/proxy"] == 1)
    True
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective | str],
        *,
        classes: int,
        dimension: int,
        centers: int = 1,
        combination: str = "share",
        combination_params: Mapping[str, Any] | None = None,
        surgery: str = "none",
        memory_size: int = 0,
        memory_start: int = 0,
        row_block: int = 0,
        multiple_of: int = 1,
        class_sizes: np.ndarray | None = None,
        matryoshka: Sequence[int] = (),
        matryoshka_weights: Sequence[float] = (),
        seed: int = 0,
    ) -> None:
        """Bind everything static.

        Args:
          objectives: by name; a string is a loss with its defaults. Shares are normalised to sum
            1 over the objectives, in each group.
          classes: number of training classes; labels are ``0 .. classes - 1``.
          dimension: embedding size ``d``.
          centers: proxies per class.
          combination: ``fixed``, ``uncertainty``, ``share``, ``gradnorm`` or ``random``
            (:mod:`mmljax.combinations`).
          combination_params: its hyperparameters.
          surgery: ``pcgrad`` projects conflicting gradients at the embeddings; or ``none``.
          memory_size: embeddings in the cross-batch memory (Wang et al. 2020, arXiv 1912.06798);
            0 for no memory.
          memory_start: step from which the memory's embeddings are references.
          row_block: rows of similarities held at once; 0 for all.
          multiple_of: classes and memory slots are padded to a multiple of it, so that they divide
            over that many devices.
          class_sizes: ``[classes]`` training images of each class, for an objective with a
            ``least_margin``.
          matryoshka: sizes of the prefixes on whose unit vectors each objective is computed, in
            rising order up to ``dimension``; an objective's loss is their sum (Kusupati et al.
            2022, arXiv 2205.13147, eq. 1). Empty for the whole embeddings alone.
          matryoshka_weights: of the sizes in that sum; 1 each if empty.
          seed: of a combination that draws its weights.

        Raises:
          UserError: on an unknown name or hyperparameter, or a combination that cannot be.
        """
        rows = {n: Objective(o) if isinstance(o, str) else o for n, o in objectives.items()}
        if not rows:
            raise UserError("--config.objectives is empty; name at least one objective")
        self.classes, self.dimension, self.centers = classes, dimension, centers
        self.memory_size, self.memory_start = memory_size, memory_start
        self.row_block, self.multiple_of = row_block, multiple_of
        surgeries = {"none": False, "pcgrad": True}
        self.surgery = choose(surgeries, surgery, key="config.combination.surgery")
        self.prefixes = make_prefixes(matryoshka, matryoshka_weights, dimension=dimension)
        sizes = Sizes(classes, dimension, centers, memory_size, class_sizes)
        self.objectives = [bind_objective(name, row, sizes) for name, row in rows.items()]
        self.combination = bind_combination(rows, combination, combination_params or {}, seed=seed)

    def init(
        self, key: PRNGKeyArray, *, dtype: Any = jnp.float32
    ) -> tuple[ObjectiveParams, ObjectiveState]:
        """Parameters for an optimiser, and the state of step 0.

        Proxies start as random directions, ``N(0, 1 / d)`` per component. They are used at unit
        length, so their stored length only sets how far an update turns them. Those of padding are
        zero, and stay so.
        """
        multiple = self.multiple_of
        shape, padding = (self.classes * self.centers, self.dimension), -self.classes % multiple
        proxies = jax.random.normal(jax.random.fold_in(key, 0), shape, dtype)
        proxies = jnp.pad(proxies, [(0, padding * self.centers), (0, 0)])
        weights, combination = self.combination.init(len(self.objectives))
        memory = init_memory(self.memory_size, self.dimension, dtype=dtype, multiple_of=multiple)
        state = ObjectiveState(
            jnp.zeros((), jnp.int32), jax.random.fold_in(key, 1), combination, memory
        )
        return {"proxies": proxies / np.sqrt(self.dimension), "weights": weights}, state

    def partition_specs(self, axis_name: str) -> tuple[dict[str, PartitionSpec], Any]:
        """The layout of params and state over a mesh axis, as ``jax.shard_map`` takes it.

        Proxies and memory are split by rows; the rest is replicated.
        """
        rows, whole = PartitionSpec(axis_name), PartitionSpec()
        memory = {"vectors": rows, "labels": rows, "next": whole} if self.memory_size else {}
        fields: Any = (whole, whole, whole, memory)  # specs in place of arrays
        state = ObjectiveState(*fields)
        return {"proxies": rows, "weights": whole}, state

    def __call__(
        self,
        params: ObjectiveParams,
        state: ObjectiveState,
        embeddings: Float[Array, "b d"],
        labels: Int[Array, " b"],
        *,
        valid: Bool[Array, " b"] | None = None,
        axis_name: str | None = None,
    ) -> tuple[Float[Array, ""], tuple[ObjectiveState, Scalars]]:
        """The weighted loss of a batch, the next state and the ledger.

        Differentiate with respect to ``embeddings`` and ``params`` (reverse mode). The derivative
        for ``params["weights"]`` is the combination's update direction, not the derivative of the
        loss: give it to plain gradient descent.

        Args:
          params: ``proxies`` and ``weights`` from :meth:`init`, as an optimiser left them; other
            keys, such as those of a network, are allowed.
          state: of the previous step.
          embeddings: of any non-zero length; they are normalised here.
          labels: classes of the embeddings.
          valid: False on padded rows; all rows count if None.
          axis_name: inside a ``jax.shard_map``, the mesh axis over which the batch and the rows
            of proxies and memory are split; the loss is that of the global batch. Gradients of
            replicated network parameters are then summed over the devices by JAX, unless the
            ``shard_map`` has ``check_vma=False``: sum them yourself there.

        Returns:
          ``(loss, (state, ledger))``, the form of ``jax.grad(..., has_aux=True)``.

        Raises:
          UserError: if the embeddings do not have the shape that the constructor states.
        """
        if embeddings.ndim != 2 or embeddings.shape != (*labels.shape, self.dimension):
            raise UserError(
                f"embeddings must be [b {self.dimension}] with labels [b], found "
                f"{embeddings.shape} and {labels.shape}"
            )
        if valid is None:
            valid = jnp.full_like(labels, True, dtype=bool)
        axis = Axis(axis_name)

        # Nothing is differentiated through `evaluate`: it returns the gradients themselves.
        @jax.custom_vjp
        def weighted(embeddings: Array, params: Any, constants: Any) -> Any:
            return self._evaluate(embeddings, params, *constants, axis=axis)[0]

        def forward(embeddings: Array, params: Any, constants: Any) -> Any:
            return self._evaluate(embeddings, params, *constants, axis=axis)

        def backward(gradients: Any, cotangents: Any) -> Any:
            return (*jax.tree.map(lambda g: cotangents[0].astype(g.dtype) * g, gradients), None)

        weighted.defvjp(forward, backward)
        own = {name: params[name] for name in ("proxies", "weights")}
        return weighted(embeddings, own, (state, labels, valid))

    def _evaluate(
        self,
        embeddings: Array,
        params: ObjectiveParams,
        state: ObjectiveState,
        labels: Array,
        valid: Array,
        *,
        axis: Axis,
    ) -> Any:
        """``((loss, (state, ledger)), gradients)``, gradients for embeddings and params."""
        unit, embeddings_scale = _normalize(embeddings)
        proxies, proxies_scale = _normalize(params["proxies"])
        points = self._points(unit, proxies, labels, valid, state, axis)
        found = [self._contribution(k, points, proxies, axis) for k in range(len(self.objectives))]

        at_sizes = jnp.stack([one.losses for one in found])
        losses = jnp.sum(at_sizes * jnp.asarray(self.prefixes.weights, at_sizes.dtype), axis=1)
        gram = _gram([one.gradients.get(SAMPLES) for one in found], axis)
        squares = _squares([one.gradients.get(PROXIES) for one in found], axis)
        norms = jnp.sqrt(jnp.stack([jnp.diag(gram), squares]))
        weights, weights_gradient, combination = self.combination.apply(
            params["weights"], state.combination, losses, norms
        )
        factors = weights
        if self.surgery:
            factors = pcgrad_coefficients(gram * weights[:, None] * weights[None, :]) * weights
        # Gradients of unit rows are tangent to the sphere, so the way back through the division by
        # the length is that division alone.
        at_embeddings = _weighted_sum(factors, found, SAMPLES, unit) * embeddings_scale
        at_proxies = _weighted_sum(weights, found, PROXIES, proxies) * proxies_scale

        kept = [one.kept for one in found]
        ledger = contributions(self.objectives, losses, weights, norms, gram, kept)
        ledger |= of_sizes(self.objectives, self.prefixes.sizes, at_sizes, kept)
        batch = points.columns[SAMPLES]
        memory = write_memory(state.memory, batch, axis, size=self.memory_size)
        new = ObjectiveState(state.step + 1, state.key, combination, memory)
        gradients = (
            at_embeddings.astype(embeddings.dtype),
            {"proxies": at_proxies.astype(params["proxies"].dtype), "weights": weights_gradient},
        )
        return (ledger["loss"], (new, ledger)), gradients

    def _points(
        self,
        unit: Array,
        proxies: Array,
        labels: Array,
        valid: Array,
        state: ObjectiveState,
        axis: Axis,
    ) -> _Points:
        """Rows and columns of this step, and what mining needs besides."""
        rows = {
            SAMPLES: own_samples(unit, labels, valid, axis),
            PROXIES: own_proxies(proxies, axis, classes=self.classes, centers=self.centers),
        }
        columns = {SAMPLES: axis.gather(rows[SAMPLES])}
        if any(
            RELATIONS[o.relation][1] == PROXIES and not o.sampled_proxies for o in self.objectives
        ):
            columns[PROXIES] = axis.gather(rows[PROXIES])
        with_memory = columns[SAMPLES]
        if self.memory_size:
            active = state.step >= self.memory_start
            held = {name: axis.gather(state.memory[name]) for name in ("vectors", "labels")}
            with_memory = append_memory(with_memory, held, active=active, size=self.memory_size)
        key = jax.random.fold_in(state.key, state.step)
        sizes = self.prefixes.sizes
        partners = (jnp.zeros_like(unit),) * len(sizes)  # without a miner nothing reads them
        if any(o.miner is not None for o in self.objectives):
            own = class_proxies(proxies, labels, axis, centers=self.centers)
            partners = tuple(
                jax.lax.stop_gradient(
                    nearest_class_proxies(unit_prefix(unit, size), unit_prefix(own, size))
                )
                for size in sizes
            )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows[SAMPLES].positions)
        context = Context(partners, keys, (), columns[SAMPLES].labels)
        return _Points(rows, columns, with_memory, context, key, state.step)

    def _contribution(self, k: int, points: _Points, proxies: Array, axis: Axis) -> _Contribution:
        """Value and gradient of one objective where the objectives meet."""
        objective = self.objectives[k]
        row_kind, column_kind = RELATIONS[objective.relation]
        rows, drawn = points.rows[row_kind], None
        if objective.sampled_proxies:
            drawn, columns = self._sampled_columns(k, points, proxies, axis)
        else:
            columns = points.with_memory if objective.memory else points.columns[column_kind]
        context = points.context
        if objective.margin is not None:
            context = context._replace(margin=margins_at(objective.margin, points.step))
        if objective.miner is not None and row_kind == PROXIES:
            context = self._with_selection(objective, points.rows[SAMPLES], columns, context, axis)

        def sums(row_vectors: Array, column_vectors: Array) -> Any:
            return objective_sums(
                objective,
                rows._replace(vectors=row_vectors),
                columns._replace(vectors=column_vectors),
                context,
                row_block=self.row_block,
                sizes=self.prefixes.sizes,
            )

        total, pullback, (counts, kept) = jax.vjp(sums, rows.vectors, columns.vectors, has_aux=True)
        # Rows reduce by sum over sum, never by a mean of the devices' means.
        scale = 1 / jnp.maximum(axis.sum(counts), 1).astype(total.dtype)
        weights = jnp.asarray(self.prefixes.weights, scale.dtype)
        at_rows, at_columns = pullback(axis.varying(weights[:, None] * scale))
        if drawn is not None:
            at_columns = return_gradient(at_columns, drawn, proxies, axis)
        else:
            count = points.columns[column_kind].labels.shape[0]  # the memory gets no gradient
            at_columns = axis.scatter_sum(at_columns[:count])
        gradients = {row_kind: at_rows}
        gradients[column_kind] = gradients.get(column_kind, 0) + at_columns
        return _Contribution(
            axis.sum(jnp.sum(total * scale, axis=1)),
            axis.sum(kept),
            {kind: _tangent(g, points.rows[kind].vectors) for kind, g in gradients.items()},
        )

    def _with_selection(
        self,
        objective: BoundObjective,
        samples: Points,
        columns: Points,
        context: Context,
        axis: Axis,
    ) -> Context:
        """Add the pairs that every anchor of the global batch keeps, for proxies as rows."""
        anchors = objective._replace(relation="sample_to_sample")
        kept = []
        blocks = prefix_blocks(samples, columns, self.prefixes.sizes)
        for place, (own, others, similarity) in enumerate(blocks):
            _, mined = mined_masks(anchors, similarity, own, others, context, place=place)
            kept.append(axis.gather(mined))
        return context._replace(kept=kept)

    def _sampled_columns(
        self, k: int, points: _Points, proxies: Array, axis: Axis
    ) -> tuple[Array, Points]:
        """Numbers of the proxies that objective ``k`` sees at this step, and the proxies."""
        objective, key = self.objectives[k], jax.random.fold_in(points.key, k)
        count, centers = objective.sampled_proxies, self.centers
        if RELATIONS[objective.relation][0] == SAMPLES:
            batch = points.columns[SAMPLES]
            numbers, valid = sample_classes(
                key, batch.labels, batch.valid, count=count // centers, of=self.classes
            )
            numbers, valid = proxies_of(numbers, centers), jnp.repeat(valid, centers)
        else:
            numbers = draw_proxies(key, count=count, of=self.classes * centers)
            valid = jnp.full_like(numbers, True, bool)
        vectors = axis.varying(fetch_proxies(proxies, numbers, axis))
        return numbers, Points(vectors, numbers // centers, numbers, valid)


def _normalize(x: Array) -> tuple[Array, Array]:
    """Unit rows and the factors that made them so, in float32 at least."""
    wide = promote(x)
    scale = inverse_lengths(wide)
    return wide * scale, scale


def _tangent(gradient: Array, vectors: Array) -> Array:
    """The gradient's part along the sphere, for rows that are on it.

    Rows shorter than the normalisation's epsilon are inside it, and move in any direction.
    """
    radial = jnp.sum(gradient * vectors, axis=-1, keepdims=True)
    on_sphere = jnp.sum(vectors * vectors, axis=-1, keepdims=True) > 0.999
    return gradient - jnp.where(on_sphere, radial, 0) * vectors


def _gram(gradients: Sequence[Array | None], axis: Axis) -> Float[Array, "o o"]:
    """Inner products over all devices; 0 for an objective without a gradient there."""
    present = [k for k, g in enumerate(gradients) if g is not None]
    gram = jnp.zeros((len(gradients), len(gradients)))
    if not present:
        return gram
    stacked = jnp.stack([g for g in gradients if g is not None])
    products = jnp.einsum("ibd,jbd->ij", stacked, stacked, precision="highest")
    return gram.astype(products.dtype).at[np.ix_(present, present)].set(axis.sum(products))


def _squares(gradients: Sequence[Array | None], axis: Axis) -> Float[Array, " o"]:
    """Squared norms over all devices; 0 for an objective without a gradient there."""
    squares = [jnp.zeros(()) if g is None else axis.sum(jnp.sum(g**2)) for g in gradients]
    return jnp.stack(squares)


def _weighted_sum(weights: Array, found: Sequence[_Contribution], kind: str, like: Array) -> Array:
    terms = (
        weights[k] * one.gradients[kind] for k, one in enumerate(found) if kind in one.gradients
    )
    return sum(terms, jnp.zeros_like(like))

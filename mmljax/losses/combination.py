"""Weights of several losses, fixed or learned, and gradient surgery.

Contributions are measured where the objectives meet, at the embeddings ``X`` and at the proxies
``P``: with the gradient norm ``g_k = ||dL_k / dX||``, tangent to the sphere, and the weight
``w_k``, the share of objective ``k`` at ``X`` is ``w_k g_k / sum_j w_j g_j``; likewise at ``P``.

A combination is a pair of pure functions in the manner of optax, see
:class:`mmljax.types.Combination`: ``init(objectives) -> (params, state)`` and ``apply(params,
state, losses, gradient_norms) -> (weights, params_gradient, state)`` with ``losses [o]`` and
``gradient_norms [2 o]`` (embeddings, proxies). An optimiser of their own trains ``params``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmljax.errors import UserError
from mmljax.types import Combination


def contribution_shares(
    weights: Float[Array, " o"], gradient_norms: Float[Array, "groups o"]
) -> Float[Array, "groups o"]:
    """Share of each objective in the weighted gradient of each group.

    Source: this project.

    Args:
      weights: ``[o]``, one per objective.
      gradient_norms: ``[2 o]``, at the embeddings and at the proxies.

    Returns:
      ``[2 o]``; a row sums to 1, or is 0 where no gradient reaches the group.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mmljax import combinations
      >>> norms = jnp.array([[3.0, 1.0, 0.0], [0.0, 1.0, 4.0]])
      >>> combinations.contribution_shares(jnp.array([1.0, 1.0, 0.25]), norms).tolist()
      [[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]
    """
    weighted = weights * gradient_norms
    total = jnp.sum(weighted, axis=1, keepdims=True)
    return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1), 0)


def fixed(weights: Sequence[float]) -> Combination:
    """Fixed weights.

    Source: weights that a search has found; no learning.

    Args:
      weights: one per objective.

    Returns:
      A combination whose weights are ``[o]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mmljax import combinations
      >>> combination = combinations.fixed((1.0, 0.03))
      >>> params, state = combination.init(2)
      >>> losses, norms = jnp.array([2.0, 0.5]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> weights, gradient, state = combination.apply(params, state, losses, norms)
      >>> print(*(f"{weight:.3f}" for weight in weights))
      1.000 0.030
    """

    def init(objectives: int) -> tuple[Any, Any]:
        _check(weights, objectives)
        return (), ()

    def apply(params: Any, state: Any, losses: Array, gradient_norms: Array) -> Any:
        del gradient_norms
        return jnp.asarray(weights, losses.dtype), params, state

    return Combination(init, apply)


def uncertainty(weights: Sequence[float], *, cap: float = 10.0) -> Combination:
    """Homoscedastic uncertainty: weights ``e^{-s_k}`` that minimise ``sum_k e^{-s_k} L_k + s_k``.

    Use: losses that are likelihoods.

    Source: Kendall et al. 2018, arXiv 1705.07115, eq. 7, without the halves, so that the
    stationary weight is ``1 / L_k``. Deviation: that weight has no bound as a mined loss goes to
    0, so it has a cap, at which ``s_k`` stops falling.

    Args:
      weights: initial weights, one per objective.
      cap: the largest weight; the default is this project's.

    Returns:
      A combination whose weights are ``[o]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mmljax import combinations
      >>> combination = combinations.uncertainty((1.0, 0.5), cap=10.0)
      >>> params, state = combination.init(2)
      >>> losses, norms = jnp.array([2.0, 0.5]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> weights, gradient, state = combination.apply(params, state, losses, norms)
      >>> print(*(f"{weight:.3f}" for weight in weights))
      1.000 0.500
    """

    def init(objectives: int) -> tuple[Any, Any]:
        _check(weights, objectives)
        return -jnp.log(jnp.asarray(weights)), ()

    def apply(params: Any, state: Any, losses: Array, gradient_norms: Array) -> Any:
        del gradient_norms
        lowest = -jnp.log(jnp.asarray(cap, params.dtype))
        result = jnp.exp(-jnp.maximum(params, lowest))
        gradient = 1 - result * losses
        held = (params <= lowest) & (gradient > 0)
        return result, jnp.where(held, 0, gradient), state

    return Combination(init, apply)


def share(weights: Sequence[float], *, targets: Sequence[Sequence[float]]) -> Combination:
    """Learned weights at which the shares of both groups meet their targets.

    The weights are ``o * softmax(v)``. The gradient for ``v`` is the shares less their targets,
    summed over the groups: that of the Kullback-Leibler divergence from targets to shares, which
    is convex in ``v``. With three objectives, of which one reaches only ``X``, one only ``P`` and
    one both, the targets set two ratios and two weights are free, so both targets are met
    exactly. Under Adam only these ratios matter.
    Use: the default.

    Source: this project.

    Args:
      weights: initial weights, one per objective, up to a common factor.
      targets: ``[2 o]``, for the embeddings and the proxies; each row sums to 1, or to 0 where
        the group has no target.

    Returns:
      A combination whose weights are ``[o]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mmljax import combinations
      >>> combination = combinations.share((1.0, 0.5), targets=((0.8, 0.2), (0.0, 1.0)))
      >>> params, state = combination.init(2)
      >>> losses, norms = jnp.array([2.0, 0.5]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> weights, gradient, state = combination.apply(params, state, losses, norms)
      >>> print(*(f"{weight:.3f}" for weight in weights))
      1.333 0.667
    """

    def init(objectives: int) -> tuple[Any, Any]:
        _check(weights, objectives)
        return jnp.log(jnp.asarray(weights)), ()

    def apply(params: Any, state: Any, losses: Array, gradient_norms: Array) -> Any:
        result = losses.shape[0] * jax.nn.softmax(params)
        goal = jnp.asarray(targets, params.dtype)
        shares = contribution_shares(result, gradient_norms)
        # A group without a gradient or a target adds nothing.
        has_target = (jnp.sum(shares, axis=1) > 0) & (jnp.sum(goal, axis=1) > 0)
        return result, jnp.sum(jnp.where(has_target[:, None], shares - goal, 0), axis=0), state

    return Combination(init, apply)


def gradnorm(weights: Sequence[float], *, alpha: float = 1.5) -> Combination:
    """GradNorm: weights that move the norms ``G_k = w_k g_k`` to ``mean_j(G_j) r_k^alpha``.

    ``r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0))`` is the relative inverse training rate. The
    gradient is that of ``sum_k |G_k - target|`` with the target held constant; the weights keep
    the sum ``o``.
    Use: to balance training rates.

    Source: Chen et al. 2018, arXiv 1711.02257, eq. 2 and algorithm 1. Deviations: norms are
    taken at the embeddings and at the proxies rather than at one shared layer, which separation
    never reaches, each group among the objectives that reach it, and summed; the weights are
    ``o * softmax(v)`` and the gradient is that for ``v`` divided by the group's mean norm, so
    that the rate has no unit.

    Args:
      weights: initial weights, one per objective, up to a common factor.
      alpha: how strongly slow objectives are favoured; the default is one of the paper's.

    Returns:
      A combination whose weights are ``[o]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mmljax import combinations
      >>> combination = combinations.gradnorm((1.0, 0.5), alpha=1.5)
      >>> params, state = combination.init(2)
      >>> losses, norms = jnp.array([2.0, 0.5]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> weights, gradient, state = combination.apply(params, state, losses, norms)
      >>> print(*(f"{weight:.3f}" for weight in weights))
      1.333 0.667
    """

    def init(objectives: int) -> tuple[Any, Any]:
        _check(weights, objectives)
        return jnp.log(jnp.asarray(weights)), jnp.full((objectives,), jnp.nan)

    def apply(params: Any, state: Any, losses: Array, gradient_norms: Array) -> Any:
        first = jnp.where(jnp.isnan(state), losses, state)
        rate = losses / jnp.where(first > 0, first, 1)
        rate = rate / jnp.maximum(jnp.mean(rate), 1e-12)

        def distance(v: Array) -> Array:
            norms = losses.shape[0] * jax.nn.softmax(v) * gradient_norms
            reached = gradient_norms > 0
            mean = jnp.sum(norms, axis=1) / jnp.maximum(jnp.sum(reached, axis=1), 1)
            mean = jax.lax.stop_gradient(mean)[:, None]
            target = mean * jax.lax.stop_gradient(rate**alpha)
            gap = jnp.where(reached, jnp.abs(norms - target), 0)
            return jnp.sum(gap / jnp.where(mean > 0, mean, 1))

        gradient = jax.grad(distance)(params)
        return losses.shape[0] * jax.nn.softmax(params), gradient, first

    return Combination(init, apply)


def random(*, seed: int = 0) -> Combination:
    """Random weights, drawn at every step: ``o * softmax`` of normal draws.

    Use: as a control; a learned combination that is no better has learned nothing.

    Source: Lin et al. 2022, arXiv 2111.10603 (RLW).

    Args:
      seed: of the draws.

    Returns:
      A combination whose weights are ``[o]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mmljax import combinations
      >>> combination = combinations.random(seed=0)
      >>> params, state = combination.init(2)
      >>> losses, norms = jnp.array([2.0, 0.5]), jnp.array([[3.0, 1.0], [0.0, 1.0]])
      >>> weights, gradient, state = combination.apply(params, state, losses, norms)
      >>> print(f"{weights.sum():.3f}")
      2.000
    """

    def init(objectives: int) -> tuple[Any, Any]:
        del objectives
        return (), jnp.zeros((), jnp.int32)

    def apply(params: Any, state: Any, losses: Array, gradient_norms: Array) -> Any:
        del gradient_norms
        key = jax.random.fold_in(jax.random.key(seed), state)
        draw = jax.random.normal(key, losses.shape, losses.dtype)
        return losses.shape[0] * jax.nn.softmax(draw), params, state + 1

    return Combination(init, apply)


def pcgrad_coefficients(gram: Float[Array, "o o"]) -> Float[Array, " o"]:
    """PCGrad: the factors of the gradients once conflicts are projected away.

    Each gradient, in turn, loses its component along every other gradient with which it has a
    negative inner product. Only the inner products are needed.

    Source: Yu et al. 2020, arXiv 2001.06782, algorithm 1. Deviation: the others are taken in
    their order rather than in a random one, so that a step is reproducible.

    Args:
      gram: ``[o o]``, inner products ``g_i . g_j`` of the weighted gradients.

    Returns:
      ``f``, ``[o]``, such that the sum after surgery is ``sum_j f_j g_j``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mmljax import combinations
      >>> combinations.pcgrad_coefficients(jnp.array([[1.0, -0.5], [-0.5, 1.0]])).tolist()
      [1.5, 1.5]
    """
    objectives = gram.shape[0]
    rows = []
    for i in range(objectives):
        row = jnp.eye(objectives, dtype=gram.dtype)[i]
        for j in range(objectives):
            if i != j:
                inner = row @ gram[:, j]
                size = jnp.where(gram[j, j] > 0, gram[j, j], 1)
                row = row.at[j].add(-jnp.minimum(inner, 0) / size)
        rows.append(row)
    return jnp.sum(jnp.stack(rows), axis=0)


def _check(weights: Sequence[float], objectives: int) -> None:
    if len(weights) != objectives:
        raise UserError(f"{len(weights)} weights for {objectives} objectives")

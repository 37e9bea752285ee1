"""How several losses become one step: contribution weights, learned or fixed, and surgery.

Contributions are measured where the objectives meet, at the embeddings ``X`` and at the proxies
``P``: with the gradient norm ``g_k = ||dL_k / dX||`` and the weight ``w_k``, the share of
objective ``k`` at ``X`` is ``w_k g_k / sum_j w_j g_j``; likewise at ``P``. Each combination is an
``(init, apply)`` pair (see ``types.Combination``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmljax.types import Combination


def contribution_shares(
    weights: Float[Array, " o"], gradient_norms: Float[Array, "groups o"]
) -> Float[Array, "groups o"]:
    """Shares per group; they sum to 1, or are all 0 where no gradient reaches the group."""
    weighted = weights * gradient_norms
    total = jnp.sum(weighted, axis=1, keepdims=True)
    return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1), 0)


def fixed(weights: Sequence[float]) -> Combination:
    """Weights that stay as they are given."""

    def init(objectives: int) -> tuple[Any, Any]:
        _check(weights, objectives)
        return (), ()

    def apply(params: Any, state: Any, losses: Array, gradient_norms: Array) -> Any:
        del gradient_norms
        return jnp.asarray(weights, losses.dtype), params, state

    return Combination(init, apply)


def uncertainty(weights: Sequence[float], *, cap: float = 10.0) -> Combination:
    """Homoscedastic uncertainty (Kendall et al. 2018, arXiv 1705.07115, eq. 7).

    Minimises ``sum_k e^{-s_k} L_k + s_k`` over the ``s_k``, in the form without the halves, whose
    stationary weight is ``1 / L_k``. That weight grows without bound as a mined loss goes to 0,
    so it is capped, a deviation: at the cap ``s_k`` stops falling.

    Args:
      weights: where the weights ``e^{-s}`` start.
      cap: the largest weight.
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
    """Weights driven until the shares of both groups meet their targets (this project's).

    The weights are ``o * softmax(v)``. The gradient for ``v`` is the shares less their targets,
    summed over the groups: that of the Kullback-Leibler divergence from targets to shares, which
    is convex in ``v``. With three objectives of which one reaches only ``X``, one only ``P`` and
    one both, two ratios are asked for and two are free: both targets are met exactly.

    Args:
      weights: where the weights start, up to a common factor.
      targets: ``[2 o]``, for the embeddings and the proxies; each row sums to 1, or to 0 where
        the group has no target.
    """

    def init(objectives: int) -> tuple[Any, Any]:
        _check(weights, objectives)
        return jnp.log(jnp.asarray(weights)), ()

    def apply(params: Any, state: Any, losses: Array, gradient_norms: Array) -> Any:
        result = losses.shape[0] * jax.nn.softmax(params)
        goal = jnp.asarray(targets, params.dtype)
        shares = contribution_shares(result, gradient_norms)
        # A group in which nothing has a gradient, or no target is set, says nothing.
        speaks = (jnp.sum(shares, axis=1) > 0) & (jnp.sum(goal, axis=1) > 0)
        return result, jnp.sum(jnp.where(speaks[:, None], shares - goal, 0), axis=0), state

    return Combination(init, apply)


def gradnorm(weights: Sequence[float], *, alpha: float = 1.5) -> Combination:
    """GradNorm (Chen et al. 2018, arXiv 1711.02257, eq. 2 and algorithm 1).

    Gradient norms ``G_k = w_k g_k`` are drawn to ``mean_j(G_j) r_k^alpha`` with the relative
    inverse training rate ``r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0))``, by the gradient of
    ``sum_k |G_k - target|`` with the target held constant; the weights keep the sum ``o``.

    Deviations: norms are taken at the embeddings and at the proxies rather than at one shared
    layer, each group among the objectives that reach it, and summed; the weights are
    ``o * softmax(v)`` and the gradient is that for ``v`` divided by the group's mean norm, so
    that the rate has no unit.
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
    """Random weights at every step, ``o * softmax`` of normal draws (Lin et al. 2022).

    The control: a learned combination that is no better than this has learned nothing
    (arXiv 2111.10603, RLW).
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
    """Factors of the gradients after projecting conflicts away (Yu et al. 2020, PCGrad).

    arXiv 2001.06782, algorithm 1: each gradient, in turn, loses its component along every other
    gradient with which it has a negative inner product. Everything follows from the inner
    products, so no gradient is touched. The others are taken in their order rather than in a
    random one, a deviation that keeps the step a function of the state.

    Args:
      gram: inner products ``g_i . g_j`` of the weighted gradients.

    Returns:
      ``f`` such that the sum after surgery is ``sum_j f_j g_j``.
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
        raise ValueError(f"{len(weights)} weights for {objectives} objectives")

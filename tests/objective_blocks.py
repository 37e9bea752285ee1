"""Random similarity blocks, and the check of an objective against a slow loop in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmljax.types import PairMasks

SIZES = [(5, 6), (7, 12), (6, 24)]  # rows, columns: never square, always groups of 2 and of 3
TERM_WEIGHTS = (1.0, 1.7)


def _known(**options):
    """These XLA options, or none where the installed XLA has dropped one."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


quick_jit = functools.partial(
    jax.jit,
    compiler_options=_known(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=False),
)
"""Compiles five times as fast, which is nearly all the time that the tests take."""


def random_block(n, m, *, seed, d=3, centers=0):
    """Asymmetric similarities and masks; rows 0 to 2 lack positives, negatives, and both.

    Columns have random labels, or, with ``centers``, a class for each group of that many.
    About a quarter of the columns is in neither mask.
    """
    rng = np.random.default_rng(seed)
    rows, columns = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    owner = np.arange(m) // centers if centers else rng.permutation(np.arange(m) % 3)
    same = rng.integers(owner.max() + 1, size=n)[:, None] == owner
    kept = rng.random((n, m)) > 0.25
    kept[np.arange(n), np.argmax(same, axis=1)] = True
    kept[0] &= ~same[0]
    kept[1] &= same[1]
    kept[2] = False
    return rows @ columns.T, PairMasks(same & kept, ~same & kept)


def check_against_loop(loss, loop, *, centers=0):
    """Value, validity and gradient of every row of blocks of several sizes, in float64.

    ``loop(s, positives, negatives, at)`` takes a row as a list of floats and two lists of
    columns; ``at`` is the unperturbed row, for what the gradient must take as constant. It
    returns the value, or None where the row is not valid; a tuple of these for several terms.
    Blocks are padded to one size, so one compilation serves all; padding must play no part.
    """
    differentiate = quick_jit(_differentiate, static_argnums=0)
    largest = 0.0
    for n, m in SIZES:
        similarity, masks = random_block(n, m, seed=n, centers=centers)
        value, valid, gradient = _loop_over_rows(loop, similarity, masks)
        with jax.enable_x64(True):
            padding = ((0, 7 - n), (0, 24 - m))
            got, got_valid, got_gradient = differentiate(
                loss,
                np.pad(similarity, padding, constant_values=0.6),
                PairMasks(*(np.pad(mask, padding) for mask in masks)),
            )
        assert got.dtype == got_gradient.dtype == np.float64
        assert not got_gradient[n:].any()
        assert not got_gradient[:, m:].any()
        got, got_valid, got_gradient = got[:, :n], got_valid[:, :n], got_gradient[:n, :m]
        np.testing.assert_array_equal(got_valid, valid)
        np.testing.assert_allclose(np.where(valid, got, 0), value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got_gradient, gradient, rtol=1e-6, atol=1e-6)
        assert valid.any()
        largest = max(largest, np.abs(gradient).max())
    assert largest > 0.1


def check_slope(loop, given, value, gradient):
    """Value and slope of a loss of raw arrays, by name, against a loop in Python floats.

    The slope is along a random direction, the loop's by central differences.
    """
    np.testing.assert_allclose(value, loop(given), rtol=1e-10)
    rng = np.random.default_rng(8)
    step = {name: 1e-5 * rng.normal(size=array.shape) for name, array in given.items()}
    ends = [loop({n: a + sign * step[n] for n, a in given.items()}) for sign in (1, -1)]
    slope = sum(np.sum(step[name] * gradient[name]) for name in given)
    assert abs(slope) > 1e-8
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=1e-6)


def _differentiate(loss, similarity, masks):
    def total(s):
        values = loss(s, masks)
        value = values.value.reshape(-1, len(s))
        valid = values.valid.reshape(value.shape)
        return jnp.sum(jnp.where(valid, _weights(*value.shape) * value, 0)), (value, valid)

    (_, (value, valid)), gradient = jax.value_and_grad(total, has_aux=True)(similarity)
    return value, valid, gradient


def _weights(terms, rows):
    """Different for every row and term, so that no two can be swapped unseen."""
    return np.array(TERM_WEIGHTS[:terms])[:, None] * (1 + 0.1 * np.arange(rows))


def _loop_over_rows(loop, similarity, masks, step=1e-6):
    values, gradient = [], np.zeros_like(similarity)
    for i, row in enumerate(similarity):
        columns = [np.flatnonzero(mask[i]).tolist() for mask in masks]

        def terms(s, columns=columns, at=row):
            found = loop(list(s), *columns, list(at))
            return found if isinstance(found, tuple) else (found,)

        values.append(terms(row))
        weights = _weights(len(values[0]), len(similarity))[:, i]
        for j in range(len(row)):
            above, below = row.copy(), row.copy()
            above[j] += step
            below[j] -= step
            gradient[i, j] = sum(
                w * ((a or 0) - (b or 0)) / (2 * step)
                for w, a, b in zip(weights, terms(above), terms(below), strict=True)
            )
    valid = np.array([[v is not None for v in row] for row in values]).T
    return np.array([[v or 0 for v in row] for row in values]).T, valid, gradient

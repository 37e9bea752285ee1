"""Two-dimensional convolution and max pooling in the form that is fastest on the platform.

TPU and GPU always get ``lax.conv_general_dilated`` and ``lax.reduce_window``. XLA's CPU backend is
slow at some shapes, so each of these has a second form for CPU. ``lax.platform_dependent`` chooses
when the program is lowered, so that a program compiled or exported for another platform gets that
platform's form. The forms agree to rounding, in values and gradients. Forward-mode differentiation
(``jax.jvp``) is not defined, since gradients have forms of their own.

Times in milliseconds are of two cores, float32, batch 32: forward / gradient at the images /
gradient at the kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Pairs = tuple[tuple[int, int], tuple[int, int]]  # zeros before and after, in height and width


class Window(NamedTuple):
    """The static shape of a convolution or of a pooling."""

    size: tuple[int, int]
    strides: tuple[int, int]
    padding: Pairs
    groups: int = 1

    def outputs(self, x: Array) -> tuple[int, int]:
        """Height and width of the result for the images ``x``."""
        height, width = (
            (n + sum(pad) - k) // s + 1
            for n, pad, k, s in zip(
                x.shape[1:3], self.padding, self.size, self.strides, strict=True
            )
        )
        return height, width


Forward = Callable[[Array, Array, Window], Array]  # from images and kernel
Backward = Callable[[Array, Array, Array, Window], tuple[Array, Array]]  # gradient as third


def conv(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i2 o"],
    *,
    strides: int | tuple[int, int] = 1,
    padding: int | str | Pairs = 0,
    groups: int = 1,
) -> Float[Array, "b h2 w2 o"]:
    """Convolution of images (cross-correlation, as in every network), without a bias.

    Args:
      x: images or feature maps.
      kernel: of the same dtype; ``i2 = i / groups``.
      strides: in height and width.
      padding: zeros on each side, as one number, as pairs, or ``SAME`` or ``VALID``.
      groups: groups of channels that are convolved separately; ``i`` for a depthwise convolution.
    """
    window = _window(x, kernel.shape[:2], strides, padding, groups)
    forms = _choose_form(x, kernel, window)
    if forms is None:
        return _conv_lax(x, kernel, window)
    return _conv_by_platform(x, _varying_as(kernel, x), window, *forms)


def max_pool(
    x: Float[Array, "b h w c"],
    size: int,
    *,
    strides: int,
    padding: int | str | Pairs = 0,
) -> Float[Array, "b h2 w2 c"]:
    """Maximum over square windows; padding never wins.

    Where a window's maximum occurs more than once, the first in row order gets the gradient.
    """
    return _max_pool_by_platform(x, _window(x, (size, size), strides, padding, 1))


def _window(
    x: Array,
    size: tuple[int, ...],
    strides: int | tuple[int, int],
    padding: int | str | Pairs,
    groups: int,
) -> Window:
    strides = (strides, strides) if isinstance(strides, int) else strides
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
        padding = tuple((int(low), int(high)) for low, high in pads)  # type: ignore[assignment]
    elif isinstance(padding, int):
        padding = ((padding, padding),) * 2
    return Window(tuple(size), tuple(strides), padding, groups)  # type: ignore[arg-type]


def _varying_as(kernel: Array, x: Array) -> Array:
    """The kernel as varying over the mesh axes of ``x``, so that its gradient is summed over them.

    Inside ``shard_map`` JAX does this by itself, but not for a function with its own gradient. The
    condition is a constant, which the compiler removes.
    """
    return jnp.where(True, kernel, lax.stop_gradient(x)[0, 0, 0, 0])


def _choose_form(x: Array, kernel: Array, window: Window) -> tuple[Forward, Backward] | None:
    """Forward and backward for CPU; None for groups that are not depthwise, which stay as lax."""
    height, width = x.shape[1:3]
    padded = any(itertools.chain(*window.padding))
    if window.groups > 1:
        # lax: 5x5, 144 channels, 28 x 28: 99.6 / 98.8 / 80.6; this form: 3.1 / 3.1 / 14.9.
        depthwise = window.groups == x.shape[3] == kernel.shape[3]
        return (_depthwise, _depthwise_backward) if depthwise else None
    if window.size == (1, 1) and not padded:
        # lax: 256 to 64 channels, 28 x 28: 15.1 / 14.4 / 51.7; one dot: 5.1 / 8.0 / 17.8.
        return _pointwise, _pointwise_backward
    divisible = height % window.size[0] == width % window.size[1] == 0
    if window.size == window.strides and not padded and divisible:
        # lax: 16x16, 3 to 384 channels, 32 x 32: 2.9 in all; one dot: 0.8.
        return _tiles, functools.partial(_backward_of, _tiles)
    # lax: 3x3, 512 channels, 2 x 2: 171.4 / 175.4 / 1.7; patches and one dot: 1.7 / 1.6 / 1.9.
    # A kernel larger than the input (forward) or the output (gradient at the images) makes XLA
    # take naive loops. At larger maps lax is as fast as patches, or faster.
    rows, columns = window.outputs(x)
    if window.size[0] > min(height, rows) or window.size[1] > min(width, columns):
        return _patches, functools.partial(_backward_of, _patches)
    return _conv_lax, _dense_backward


# Convolution


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv_by_platform(
    x: Array, kernel: Array, window: Window, forward: Forward, backward: Backward
) -> Array:
    del backward
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: forward(x, kernel, window),
        default=lambda x, kernel: _conv_lax(x, kernel, window),
    )


def _conv_forward(
    x: Array, kernel: Array, window: Window, forward: Forward, backward: Backward
) -> tuple[Array, tuple[Array, Array]]:
    return _conv_by_platform(x, kernel, window, forward, backward), (x, kernel)


def _conv_backward(
    window: Window, forward: Forward, backward: Backward, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    del forward
    return lax.platform_dependent(
        *saved,
        dy,
        cpu=lambda x, kernel, dy: backward(x, kernel, dy, window),
        default=lambda x, kernel, dy: _backward_of(_conv_lax, x, kernel, dy, window),
    )


_conv_by_platform.defvjp(_conv_forward, _conv_backward)


def _backward_of(
    form: Forward, x: Array, kernel: Array, dy: Array, window: Window
) -> tuple[Array, Array]:
    """JAX's own derivative of a form."""
    return jax.vjp(lambda x, kernel: form(x, kernel, window), x, kernel)[1](dy)


def _conv_lax(x: Array, kernel: Array, window: Window) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.groups,
    )


def _dot(x: Array, kernel: Array) -> Array:
    """Product of the last axis with the first axis of a matrix."""
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _pointwise(x: Array, kernel: Array, window: Window) -> Array:
    rows, columns = window.strides
    return _dot(x[:, ::rows, ::columns], kernel[0, 0])


def _pointwise_backward(x: Array, kernel: Array, dy: Array, window: Window) -> tuple[Array, Array]:
    matrix, (rows, columns) = kernel[0, 0], window.strides
    seen = x[:, ::rows, ::columns]
    dx = lax.dot_general(dy, matrix, (((3,), (1,)), ((), ())))
    if window.strides != (1, 1):
        dx = jnp.zeros_like(x).at[:, ::rows, ::columns].set(dx)
    dmatrix = _product_of_rows(seen.reshape(-1, seen.shape[3]), dy.reshape(-1, dy.shape[3]))
    return dx, dmatrix[None, None]


_PARTS = 4  # of the rows in _product_of_rows


def _product_of_rows(x: Array, y: Array) -> Array:
    """``x.T @ y`` of two matrices of many rows.

    XLA copies the factor of fewer columns into another layout, together with all that computes it.
    A loop keeps that out: its arrays exist before it begins (ResNet-50, 112 px: 820 ms of a step in
    such copies).
    """
    if x.shape[1] < y.shape[1]:
        return _product_of_rows(y, x).T
    rows = x.shape[0] // _PARTS

    def add(i: Array, total: Array) -> Array:
        a, b = (lax.dynamic_slice_in_dim(z, i * rows, rows) for z in (x, y))
        return total + lax.dot_general(a, b, (((0,), (0,)), ((), ())))

    total = jnp.zeros((x.shape[1], y.shape[1]), x.dtype) + 0 * x[0, 0]  # varies as x does
    total = lax.fori_loop(0, _PARTS, add, total)
    rest = _PARTS * rows
    return total + lax.dot_general(x[rest:], y[rest:], (((0,), (0,)), ((), ())))


def _tiles(x: Array, kernel: Array, window: Window) -> Array:
    """Patches that neither overlap nor leave a gap, as in a ViT's first layer."""
    (kh, kw), (rows, columns) = window.size, window.outputs(x)
    x = x.reshape(-1, rows, kh, columns, kw, x.shape[3]).swapaxes(2, 3)
    return _dot(x.reshape(-1, rows, columns, math.prod(kernel.shape[:3])), _matrix(kernel))


def _dense_backward(x: Array, kernel: Array, dy: Array, window: Window) -> tuple[Array, Array]:
    rows, columns = window.outputs(x)
    # lax, 3x3: 512 channels, 4 x 4: 10.0, patches: 5.9; 256, 7 x 7: 5.9 and 4.7; 128, 14 x 14: 4.7
    # and 5.7.
    by = _patches if rows * columns <= 49 and window.strides == (1, 1) else _conv_lax
    dx = jax.vjp(lambda x: by(x, kernel, window), x)[1](dy)[0]

    def gradient(x: Array, dy: Array) -> Array:
        return jax.vjp(lambda kernel: _conv_lax(x, kernel, window), kernel)[1](dy)[0]

    # At large maps XLA divides half a batch better over its threads than a whole one: 7x7 with
    # stride 2, 3 to 64 channels, 112 x 112: 27 in one, 16 in two; 3x3, 128, 14 x 14: 10.0 and 8.3.
    half = len(x) // 2
    if half and rows * columns > 49:
        return dx, gradient(x[:half], dy[:half]) + gradient(x[half:], dy[half:])
    return dx, gradient(x, dy)


def _patches(x: Array, kernel: Array, window: Window) -> Array:
    patches = jnp.concatenate([x for _, _, x in _taps(x, window)], axis=-1)
    return _dot(patches, _matrix(kernel))


def _matrix(kernel: Array) -> Array:
    return kernel.reshape(-1, kernel.shape[3])


def _taps(x: Array, window: Window, *, fill: float = 0) -> Iterator[tuple[int, int, Array]]:
    """For each place in the kernel: row, column, and what it meets in each window."""
    rows, columns = window.outputs(x)
    (sh, sw) = window.strides
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)), constant_values=fill)
    # Without the barrier each tap pads again, pixel by pixel (first maxima: 24.1 ms; with it 6.7).
    x = lax.optimization_barrier(x)
    for i, j in itertools.product(*map(range, window.size)):
        yield i, j, x[:, i : i + sh * (rows - 1) + 1 : sh, j : j + sw * (columns - 1) + 1 : sw]


def _gather_back(term: Callable[..., Array], outputs: Any, x: Array, window: Window) -> Array:
    """The transpose of ``_taps``: for each pixel a sum over the windows that contain it.

    Pixels whose row and column have the same remainders by the strides are in windows by the same
    places of the kernel, so each remainder is one sum of slices and nothing is scattered
    (depthwise 5x5, 144 channels, 28 x 28: 3.1 ms; the derivative of ``_taps``: 14.1 ms).

    Args:
      term: from row and column in the kernel, and the outputs of these windows, to a summand.
      outputs: arrays of the result's height and width.
      x: images of the wanted shape.
      window: of the convolution or pooling.
    """
    (sh, sw), (kh, kw) = window.strides, window.size
    (top, _), (left, _) = window.padding
    rows, columns = -(-x.shape[1] // sh), -(-x.shape[2] // sw)

    def padded(y: Array) -> Array:
        below = max(0, rows + (sh - 1 + top) // sh - y.shape[1])
        beside = max(0, columns + (sw - 1 + left) // sw - y.shape[2])
        return jnp.pad(y, ((0, 0), (kh, below), (kw, beside), (0, 0)))

    outputs = jax.tree.map(padded, outputs)

    def windows_at(row: int, column: int) -> Any:
        return jax.tree.map(lambda y: y[:, row : row + rows, column : column + columns], outputs)

    phases = []
    for a, b in itertools.product(range(sh), range(sw)):
        total = jnp.zeros((x.shape[0], rows, columns, x.shape[3]), x.dtype)
        for i, j in itertools.product(range(kh), range(kw)):
            (down, rest), (right, other) = divmod(a + top - i, sh), divmod(b + left - j, sw)
            if rest == other == 0:
                total += term(i, j, windows_at(kh + down, kw + right))
        phases.append(total)
    if len(phases) == 1:
        return phases[0]
    y = jnp.stack(phases, axis=3).reshape(-1, rows, columns, sh, sw, x.shape[3])
    y = y.swapaxes(2, 3).reshape(-1, rows * sh, columns * sw, x.shape[3])
    return y[:, : x.shape[1], : x.shape[2]]


def _depthwise(x: Array, kernel: Array, window: Window) -> Array:
    """Shifted copies of the images, each times one row of the kernel; sums at least in float32."""
    (wide,), dtype = _at_least_float32(x), x.dtype
    (kernel,) = _at_least_float32(kernel)
    terms = (tap * kernel[i, j, 0] for i, j, tap in _taps(wide, window))
    return functools.reduce(jnp.add, terms).astype(dtype)


def _depthwise_backward(x: Array, kernel: Array, dy: Array, window: Window) -> tuple[Array, Array]:
    dtype = x.dtype
    x, wide, dy = _at_least_float32(x, kernel, dy)
    dx = _gather_back(lambda i, j, dy: dy * wide[i, j, 0], dy, x, window)

    products = [tap * dy for *_, tap in _taps(x, window)]
    # One reduction with an accumulator per place in the kernel, so that each product stays in the
    # processor's registers. Sums of the lite0 layers at 112 px: 70 ms; a reduction per place: 131.
    sums = lax.reduce(
        products,
        [jnp.zeros((), dy.dtype)] * len(products),
        lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
        (1, 2),
    )
    dkernel = jnp.sum(jnp.stack(sums), axis=1)
    return dx.astype(dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)


def _at_least_float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)


# Max pooling


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool_by_platform(x: Array, window: Window) -> Array:
    return lax.platform_dependent(
        x,
        cpu=lambda x: _max_pool_taps(x, window),  # 3.2 ms; lax: 11.2
        default=lambda x: _max_pool_lax(x, window),
    )


def _max_pool_forward(x: Array, window: Window) -> tuple[Array, Array]:
    return _max_pool_by_platform(x, window), x


def _max_pool_backward(window: Window, x: Array, dy: Array) -> tuple[Array]:
    def by_lax(x: Array, dy: Array) -> Array:
        return jax.vjp(lambda x: _max_pool_lax(x, window), x)[1](dy)[0]

    def by_place(x: Array, dy: Array) -> Array:
        def term(i: int, j: int, at: tuple[Array, Array]) -> Array:
            place, dy = at
            return jnp.where(place == i * window.size[1] + j + 1, dy, 0)

        return _gather_back(term, (_first_maximum(x, window), dy), x, window)

    # lax: 3x3, stride 2, 64 channels, 56 x 56: 158 ms with the gradient; this form: 27.
    return (lax.platform_dependent(x, dy, cpu=by_place, default=by_lax),)


_max_pool_by_platform.defvjp(_max_pool_forward, _max_pool_backward)


def _max_pool_lax(x: Array, window: Window) -> Array:
    sizes = ((1, *window.size, 1), (1, *window.strides, 1))
    return lax.reduce_window(
        x, -jnp.inf, lax.max, *sizes, padding=((0, 0), *window.padding, (0, 0))
    )


def _max_pool_taps(x: Array, window: Window) -> Array:
    return functools.reduce(jnp.maximum, (x for _, _, x in _taps(x, window, fill=-jnp.inf)))


def _first_maximum(x: Array, window: Window) -> Int[Array, "b h2 w2 c"]:
    """The place in the kernel, counted by rows from 1, of each window's first maximum."""
    taps = [x for _, _, x in _taps(x, window, fill=-jnp.inf)]
    best, place = taps[0], jnp.ones(taps[0].shape, jnp.int32)
    for number, tap in enumerate(taps[1:], 2):
        place = jnp.where(tap > best, number, place)
        best = jnp.maximum(best, tap)
    return place

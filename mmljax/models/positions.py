"""Position embeddings of vision transformers: interpolation of learned ones, rotary tables."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Filter = Literal["bicubic_antialias", "bicubic", "bilinear"]
"""Filters of PyTorch's ``interpolate``: ``bicubic_antialias`` (a = -0.5) as in timm, OpenCLIP and
DINOv2 with registers; ``bicubic`` (a = -0.75) as in DINOv2 without registers; ``bilinear`` as in
the Perception Encoder. The last two have no antialiasing."""


def resample_positions(
    positions: Float[Array, "1 m f"],
    grid: int,
    rows: int,
    columns: int,
    *,
    kind: Filter = "bicubic_antialias",
) -> Float[Array, "1 n f"]:
    """Interpolate position embeddings to a grid of another size.

    The filter is two small matrices that depend on sizes alone, so they are constants of the
    compiled program, and the resampling is done once for a batch.

    Args:
      positions: of the class token if there is one, then of ``grid * grid`` patches by rows.
      grid: patches along a side.
      rows: patches from top to bottom, of the result.
      columns: patches from left to right.
      kind: the filter.

    Returns:
      ``[1, n, f]`` with ``n = m - grid^2 + rows * columns``; as given where the grid is the same.
    """
    if (rows, columns) == (grid, grid):
        return positions
    first = positions.shape[1] - grid * grid
    size = positions.shape[-1]
    patches = positions[0, first:].reshape(grid, grid, size)
    vertical, horizontal = (
        jnp.asarray(filter_matrix(n, grid, kind), positions.dtype) for n in (rows, columns)
    )
    patches = jnp.einsum("ri,cj,ijf->rcf", vertical, horizontal, patches, precision="highest")
    return jnp.concatenate([positions[:, :first], patches.reshape(1, rows * columns, size)], axis=1)


@functools.lru_cache
def filter_matrix(new: int, old: int, kind: Filter) -> Float[np.ndarray, "new old"]:
    """Return the weights of ``old`` samples in each of ``new``; rows sum to 1.

    With antialiasing the filter is stretched where samples get fewer, and its weights beyond the
    border are left out; without it the samples at the border are repeated. So does PyTorch's
    ``interpolate`` with ``align_corners=False``.
    """
    antialias = kind == "bicubic_antialias"
    stretch = max(old / new, 1.0) if antialias else 1.0
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        reach = math.ceil(2 * stretch)
        for j in range(math.floor(centre) - reach, math.floor(centre) + reach + 2):
            if antialias and not 0 <= j < old:
                continue
            weights[i, min(max(j, 0), old - 1)] += _filter(abs(j - centre) / stretch, kind)
    return weights / weights.sum(axis=1, keepdims=True)


def _filter(distance: float, kind: Filter) -> float:
    """The cubic convolution of Keys (1981), or the triangle filter."""
    if kind == "bilinear":
        return max(0.0, 1 - distance)
    a = -0.5 if kind == "bicubic_antialias" else -0.75
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


class Rotary(NamedTuple):
    """Rotary position embedding: angles by which channel pairs of a patch turn (2104.09864)."""

    cosines: Float[np.ndarray, "n d2"] | Float[Array, "b n d2"]  # of all examples, or of each
    sines: Float[np.ndarray, "n d2"] | Float[Array, "b n d2"]
    interleaved: bool  # pairs are channels 2i and 2i + 1, else i and i + d / 2


RotaryKind = Literal["none", "dinov3", "perception"]


@functools.lru_cache
def rotary_table(
    kind: RotaryKind, rows: int, columns: int, head_dim: int, start: int
) -> Rotary | None:
    """Return cosines and sines for the patches by rows; None without rotary positions.

    Half of the pairs depend on the row, half on the column. DINOv3 (2508.10104) scales coordinates
    to the range from -1 to 1 for any grid; its random jitter of them in pretraining is left out.
    The Perception Encoder (2504.13181) uses integer coordinates.

    Args:
      kind: of rotary positions.
      rows: patches from top to bottom.
      columns: patches from left to right.
      head_dim: channels of a head, a multiple of 4.
      start: coordinate of the first row and column, for the Perception Encoder.
    """
    if kind == "none":
        return None
    quarter = head_dim // 4
    base = 100.0 if kind == "dinov3" else 10_000.0
    bands = base ** -(np.arange(quarter) / quarter)
    if kind == "dinov3":
        y, x = (2 * np.pi * (2 * (np.arange(n) + 0.5) / n - 1) for n in (rows, columns))
    else:
        y, x = (start + np.arange(n, dtype=np.float64) for n in (rows, columns))
    y, x = np.repeat(y, columns)[:, None] * bands, np.tile(x, rows)[:, None] * bands
    angles = np.concatenate([y, x] if kind == "dinov3" else [x, y], axis=1)
    return Rotary(
        np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), kind != "dinov3"
    )

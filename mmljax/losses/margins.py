"""Margins of softmax losses that differ between classes, and rise over the first steps.

The losses that take them are those from samples to proxies with a ``margin``: CosFace, ArcFace,
sub-center ArcFace and SoftTriple.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from mmljax.errors import UserError
from mmljax.types import Margin

SCHEDULES = {
    "linear": lambda part: part,
    "cosine": lambda part: (1 - jnp.cos(jnp.pi * part)) / 2,
}
"""Shapes of the rise: from 0 at the part 0 of its steps to 1 at 1."""


def dynamic_margins(
    class_sizes: ArrayLike, *, least: float = 0.05, most: float = 0.5, power: float = 0.25
) -> Float[np.ndarray, " classes"]:
    """A margin for each class, from ``most`` for the smallest to ``least`` for the largest.

    ``least + (most - least) (n^-p - min n^-p) / (max n^-p - min n^-p)`` for a class of ``n``
    images. Where all classes are of one size each of them is the smallest, and has ``most``.

    Source: Ha et al. 2020, arXiv 2010.05350 (Google Landmark Recognition 2020), for sub-center
    ArcFace; the scaling to the two bounds is the authors' code's.

    >>> [round(float(m), 3) for m in dynamic_margins([1, 16, 81])]
    [0.5, 0.163, 0.05]

    Args:
      class_sizes: ``[classes]`` training images of each class, at least 1.
      least: margin of the largest class; default of the authors' code.
      most: margin of the smallest class; default of the authors' code.
      power: ``p``; default of the paper.

    Returns:
      In float64, to be given as ``margin`` of a softmax loss.

    Raises:
      UserError: if a size is not a positive number, or ``least`` is above ``most``.
    """
    sizes = np.asarray(class_sizes)
    if sizes.ndim != 1 or not sizes.size or not (sizes > 0).all():
        raise UserError(
            "class_sizes must be the number of training images of each class, at least 1 each"
        )
    if not least <= most:
        raise UserError(f"the least margin, {least:g}, is above the greatest, {most:g}")
    rarity = sizes.astype(np.float64) ** -power
    spread = rarity.max() - rarity.min()
    if not spread:
        return np.full(len(sizes), most, np.float64)
    return least + (most - least) * (rarity - rarity.min()) / spread


def margins_at(margin: Margin, step: Int[Array, ""]) -> Float[Array, "*classes"]:
    """The margin of all classes, or of each, at a step: 0 at step 0, in full from ``rise`` on."""
    full = jnp.asarray(margin.value, float)
    if not margin.rise:
        return full
    part = jnp.clip(step / margin.rise, 0, 1).astype(full.dtype)
    return full * SCHEDULES[margin.schedule](part)


def row_margins(
    margin: Float[Array, "*classes"], labels: Int[Array, " n"]
) -> Float[Array, "#n 1"] | Float[Array, ""]:
    """The margins of rows as a column, or the one margin of all classes."""
    return margin[labels][:, None] if margin.ndim else margin

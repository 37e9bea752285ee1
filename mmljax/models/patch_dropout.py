"""Patch dropout: a vision transformer trains on some of the patches of each image.

Liu et al. (2022, arXiv 2208.07220) and Li et al. (2022, arXiv 2212.00794).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mmljax.models.positions import Rotary

_STREAM = 0  # of the backbone's keys; stochastic depth uses those from 2 on


def draw_patches(keys: PRNGKeyArray, *, patches: int, share: float) -> Int[Array, "b kept"]:
    """Return the numbers of the patches of each example that are kept, in rising order.

    Every set of ``max(1, round(share * patches))`` patches is as likely as any other. Example ``i``
    depends on ``keys[i]`` alone, so the result is the same on any number of devices.

    Args:
      keys: one per example.
      patches: of an image.
      share: of them, above 0 and at most 1.
    """
    kept = max(1, round(share * patches))

    def draw(key: PRNGKeyArray) -> Int[Array, " kept"]:
        order = jax.random.permutation(jax.random.fold_in(key, _STREAM), patches)
        return jnp.sort(order[:kept])

    return jax.vmap(draw)(keys)


def keep_patches(
    x: Float[Array, "b n f"], rotary: Rotary | None, numbers: Int[Array, "b kept"], *, first: int
) -> tuple[Float[Array, "b n2 f"], Rotary | None]:
    """Return the first tokens and the kept patches of each example, and the patches' rotations.

    Args:
      x: tokens with their position embeddings.
      rotary: rotations of all patches, if any.
      numbers: of the patches that are kept.
      first: tokens before the patches, all of which are kept.
    """
    kept = jnp.take_along_axis(x[:, first:], numbers[:, :, None], axis=1)
    if rotary is not None:
        cosines, sines = (jnp.asarray(table)[numbers] for table in rotary[:2])
        rotary = rotary._replace(cosines=cosines, sines=sines)
    return jnp.concatenate([x[:, :first], kept], axis=1), rotary

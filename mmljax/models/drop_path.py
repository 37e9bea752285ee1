"""Base of residual blocks: stochastic depth, which drops branches, and rematerialisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mmljax.models.remat import rematerialized


class ResidualBlock(nnx.Module):
    """Base of the blocks whose branches stochastic depth drops (Huang et al. 2016, 1603.09382)."""

    drop_rate = 0.0
    number = 0  # of the block in its network, from 1
    remat = False  # whether the backward pass computes its activations again

    def run(
        self, x: Float[Array, "b *n f"], *, keys: PRNGKeyArray | None, **options: Any
    ) -> Float[Array, "b *n2 f2"]:
        """Return the block's output, rematerialised where ``remat`` says so."""

        def apply(block: Any, inputs: Any) -> Array:
            return block(inputs[0], keys=inputs[1], **options)

        return rematerialized(apply, self, (x, keys)) if self.remat else apply(self, (x, keys))

    def drop(
        self, branch: Float[Array, "b *n f"], keys: PRNGKeyArray | None, *, place: int = 0
    ) -> Float[Array, "b *n f"]:
        """Return a branch that is 0 for some examples and is divided by ``1 - rate`` for the rest.

        Example ``i`` depends on ``keys[i]`` alone, so the result is the same on any number of
        devices. Deviation: the paper drops a branch for a whole batch, and in evaluation multiplies
        it by ``1 - rate`` instead.

        Args:
          branch: what the block adds to its input.
          keys: of the network, one per example; without them nothing is dropped.
          place: 0 or 1, of the branch in the block.
        """
        if keys is None or not self.drop_rate:
            return branch
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, 2 * self.number + place)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.drop_rate))(own)
        kept = kept.reshape(-1, *(1 for _ in branch.shape[1:]))
        return jnp.where(kept, branch / (1 - self.drop_rate), 0)


def set_drop_path(blocks: Sequence[ResidualBlock], rate: float) -> None:
    """Number the blocks, and drop block ``l`` of ``L`` at ``rate * l / L`` (equation 4).

    A block without a residual branch counts among the ``L`` and is never dropped.
    """
    for number, block in enumerate(blocks, 1):
        block.number, block.drop_rate = number, rate * number / len(blocks)

"""The embedding head: pooling, and one or two linear layers to unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from mmljax.config import ModelConfig, choose
from mmljax.mesh import AXIS
from mmljax.models.pooling import POOLINGS
from mmljax.numerics import at_least_float32, l2_normalize

LAYER_NORMS = ("none", "before", "after")


class Head(nnx.Module):
    """Pooling, one or two linear layers and unit length.

    The layers are, with the parts that the arguments ask for::

        pool, standardize, [dropout, linear, norm, relu], dropout, linear, standardize, unit length

    With one layer, ``norm`` is applied to the pooled features. Computes in float32 for any dtype of
    the features (in float64 for float64).

    Args:
      features: channels of the backbone's result.
      size: of an embedding.
      config: ``pooling``, ``layer_norm`` (which standardises without parameters), ``head``,
        ``head_width``, ``head_norm`` (trainable; ``batch`` over the global batch) and ``dropout``.
      rngs: for the parameters.
      output: the backbone's, a key of ``POOLINGS``.

    Raises:
      UserError: on an unknown name.
    """

    def __init__(
        self,
        features: int,
        size: int,
        *,
        config: ModelConfig,
        rngs: nnx.Rngs,
        output: str = "map",
    ) -> None:
        self.pool = choose(POOLINGS[output], config.pooling, key="config.model.pooling")()
        self.layer_norm = choose(
            {name: name for name in LAYER_NORMS}, config.layer_norm, key="config.model.layer_norm"
        )
        self.dropout = config.dropout
        heads = {"linear": features, "mlp": config.head_width}
        last = choose(heads, config.head, key="config.model.head")
        self.hidden = (
            nnx.Linear(
                features,
                last,
                use_bias=config.head_norm != "batch",  # whose mean would cancel it
                precision="highest",
                rngs=rngs,
            )
            if config.head == "mlp"
            else None
        )
        norms: Mapping[str, Callable[[], nnx.Module | None]] = {
            "none": lambda: None,
            "batch": lambda: nnx.BatchNorm(last, momentum=0.9, axis_name=AXIS, rngs=rngs),
            "layer": lambda: nnx.LayerNorm(last, rngs=rngs),
        }
        self.norm = choose(norms, config.head_norm, key="config.model.head_norm")()
        self.projection = nnx.Linear(last, size, precision="highest", rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b *n f"],
        *,
        train: bool,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "b d"]:
        """Return unit vectors.

        Args:
          x: a feature map, tokens, or pooled features ``[b f]``.
          train: whether to drop features, and to normalise by the global batch's statistics.
          keys: one per row, for the dropout; without them nothing is dropped.
        """
        x = self.pooled(x)
        if self.layer_norm == "before":
            x = jax.nn.standardize(x)
        if self.hidden is not None:
            x = self.hidden(self._drop(x, keys, layer=0, train=train))
        if isinstance(self.norm, nnx.BatchNorm):
            x = self.norm(x, use_running_average=not train)
        elif self.norm is not None:
            x = self.norm(x)
        if self.hidden is not None:
            x = nnx.relu(x)
        x = self.projection(self._drop(x, keys, layer=1, train=train))
        if self.layer_norm == "after":
            x = jax.nn.standardize(x)
        return l2_normalize(x)

    def pooled(self, x: Float[Array, "b *n f"]) -> Float[Array, "b f"]:
        """Return pooled features, in float32 at least; ``[b f]`` stays as it is."""
        x = x.astype(at_least_float32(x.dtype))
        return self.pool(x) if x.ndim > 2 else x

    def _drop(self, x: Array, keys: PRNGKeyArray | None, *, layer: int, train: bool) -> Array:
        if not (train and self.dropout) or keys is None:
            return x
        return dropout(x, jax.vmap(jax.random.fold_in, (0, None))(keys, layer), rate=self.dropout)


def dropout(x: Float[Array, "b f"], keys: PRNGKeyArray, *, rate: float) -> Float[Array, "b f"]:
    """Set each value to 0 with probability ``rate`` and divide the others by ``1 - rate``.

    Srivastava et al. (2014). Row ``i`` depends on ``keys[i]`` alone, so the result is the same on
    any number of devices.
    """
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)

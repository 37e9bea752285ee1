"""Rematerialisation: activations that the backward pass computes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

REMATS = {"none": (False, False), "blocks": (True, False), "full": (True, True)}
"""By the value of ``config.model.remat``: whether of each block, and of the backbone around them.

``blocks`` keeps the input of each block, and in the backward pass the activations of one block at a
time (Chen et al. 2016, arXiv 1604.06174), for one further forward pass. ``full`` keeps the images
alone while the objectives are computed, for two further ones.
"""

_Module = TypeVar("_Module", bound=nnx.Module)


def rematerialized(apply: Callable[[_Module, Any], Array], module: _Module, inputs: Any) -> Array:
    """``apply(module, inputs)``, whose activations the backward pass computes again.

    BatchNorm's running statistics move once. Its sums over the devices are kept, so the second
    computation has no collective.

    Args:
      apply: of a module and a pytree of arrays; what is not differentiated or static, it binds.
      module: whose state other than parameters is updated.
      inputs: of the module.
    """
    graphdef, parameters, *rest = nnx.split(module, nnx.Param, ...)

    @partial(jax.checkpoint, policy=_is_collective)
    def pure(parameters: Any, rest: Any, inputs: Any) -> tuple[Array, Any]:
        inner = nnx.merge(graphdef, parameters, *rest)
        return apply(inner, inputs), nnx.state(inner, nnx.Not(nnx.Param))

    result, moved = pure(parameters, rest, inputs)
    nnx.update(module, moved)
    return result


def _is_collective(primitive: Any, *_: Any, **__: Any) -> bool:
    return "psum" in primitive.name

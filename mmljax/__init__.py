"""Image-retrieval embeddings from several metric-learning objectives at once, in JAX and Flax.

The public API, imported on first use, so that ``import mmljax`` is immediate:

- :class:`MultiObjective` and :class:`Objective`: the method in anybody's own training loop;
- :mod:`mmljax.losses`, :mod:`mmljax.miners`, :mod:`mmljax.combinations`, :mod:`mmljax.metrics`:
  its parts, on plain arrays;
- :func:`nearest_neighbors`: exact search;
- :func:`default_config`, :func:`train`, :func:`load_embedder`: a whole run, and its network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmljax import combinations, losses, metrics, miners
    from mmljax.config import Objective, default_config
    from mmljax.inference.embedder import load_embedder
    from mmljax.losses.multi_objective import MultiObjective
    from mmljax.retrieval.search import nearest_neighbors
    from mmljax.training.loop import train

_MODULES = ("combinations", "losses", "metrics", "miners")
_NAMES = {  # public name: the module that defines it
    "MultiObjective": "mmljax.losses.multi_objective",
    "Objective": "mmljax.config",
    "default_config": "mmljax.config",
    "load_embedder": "mmljax.inference.embedder",
    "nearest_neighbors": "mmljax.retrieval.search",
    "train": "mmljax.training.loop",
}

__all__ = [
    "MultiObjective",
    "Objective",
    "combinations",
    "default_config",
    "load_embedder",
    "losses",
    "metrics",
    "miners",
    "nearest_neighbors",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"mmljax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    from mmljax.text import nearest

    raise AttributeError(f"module 'mmljax' has no attribute {name!r}; {nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""What a train state takes on one device, from shapes and shardings alone; see docs/scale.md."""

from __future__ import annotations

import math
from typing import Any

import jax

from mmljax.types import TrainState


def state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes per device by group: of arrays, or of shapes with shardings.

    What the optimiser holds for the proxies stands apart from the rest of its state, as it is
    split over the devices with them.
    """
    groups = {
        "network": state.params["network"],
        "proxies": state.params["proxies"],
        "statistics": state.model_state,
        "memory": state.memory,
    }
    sizes = {name: sum(map(_bytes, jax.tree.leaves(tree))) for name, tree in groups.items()}
    of_proxies = of_others = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer_state):
        names = {str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path}
        if "proxies" in names:
            of_proxies += _bytes(leaf)
        else:
            of_others += _bytes(leaf)
    return {**sizes, "optimizer of proxies": of_proxies, "optimizer of the rest": of_others}


def _bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def describe(state: TrainState) -> str:
    """One line for the log."""
    sizes = {name: size for name, size in state_bytes(state).items() if size}
    parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items())
    return f"state per device: {sum(sizes.values()) / 2**20:.1f} MiB ({parts})"

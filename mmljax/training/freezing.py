"""Which of the network's parameters a run trains.

The others are constants of the step: no gradient is computed for them, and the optimiser keeps no
state for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from mmljax.config import Config
from mmljax.errors import UserError
from mmljax.models.lora import is_adapter
from mmljax.types import Params

Trains = Callable[[str], bool]
"""Whether a parameter is trained, by its name such as ``backbone.blocks.0.attn.qkv.kernel``."""


def all_train(name: str) -> bool:
    """Return True: the rule of a run that trains every parameter."""
    del name
    return True


def choose_trained(config: Config, *, frozen_steps: int, total_steps: int) -> Trains:
    """Return the rule of a run.

    The head always trains. Of the backbone, adapters train alone where there are any
    (``model.lora``), and nothing trains that is frozen for the whole run
    (``optimizer.freeze_backbone``).

    Args:
      config: of the run.
      frozen_steps: for which the backbone is frozen.
      total_steps: of the run.

    Raises:
      UserError: if adapters would never train.
    """
    whole = frozen_steps >= total_steps
    if whole and config.model.lora.rank:
        raise UserError(
            f"--config.optimizer.freeze_backbone={config.optimizer.freeze_backbone!r} would freeze "
            "the adapters of --config.model.lora for the whole run; set it to '0 steps', or "
            "--config.model.lora.rank=0"
        )
    if not whole and not config.model.lora.rank:
        return all_train
    return lambda name: not name.startswith("backbone.") or is_adapter(name)


def split_network(network: Params, trains: Trains) -> tuple[Params, Params]:
    """Return the trained and the frozen parameters.

    Each has the network's structure with None, which is no leaf, in place of the others;
    :func:`mmljax.types.overlaid` joins them.
    """

    def part(wanted: bool) -> Params:
        def keep(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return leaf if trains(name) == wanted else None

        return jax.tree_util.tree_map_with_path(keep, network)

    return part(True), part(False)

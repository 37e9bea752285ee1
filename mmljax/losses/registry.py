"""Losses, miners and combinations by name, and the one way to bind their hyperparameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mmljax.errors import UserError
from mmljax.losses import combination, mining, pair, proxy, ranking, separation
from mmljax.text import nearest
from mmljax.types import Combination

LOSSES: dict[str, tuple[str, Callable[..., Any]]] = {  # name: (relation, loss on a block)
    "multi_similarity": ("sample_to_sample", pair.multi_similarity_loss),
    "contrastive": ("sample_to_sample", pair.contrastive_loss),
    "triplet_hard": ("sample_to_sample", pair.triplet_hard_loss),
    "triplet_semihard": ("sample_to_sample", pair.triplet_semihard_loss),
    "triplet_all": ("sample_to_sample", pair.triplet_all_loss),
    "margin": ("sample_to_sample", pair.margin_loss),
    "circle": ("sample_to_sample", pair.circle_loss),
    "supcon": ("sample_to_sample", pair.supcon_loss),
    "nt_xent": ("sample_to_sample", pair.nt_xent_loss),
    "smooth_ap": ("sample_to_sample", ranking.smooth_ap_loss),
    "recall_at_k": ("sample_to_sample", ranking.recall_at_k_loss),
    "proxy_anchor": ("proxy_to_sample", proxy.proxy_anchor_loss),
    "proxy_nca_pp": ("sample_to_proxy", proxy.proxy_nca_pp_loss),
    "normalized_softmax": ("sample_to_proxy", proxy.normalized_softmax_loss),
    "cosface": ("sample_to_proxy", proxy.cosface_loss),
    "arcface": ("sample_to_proxy", proxy.arcface_loss),
    "subcenter_arcface": ("sample_to_proxy", proxy.subcenter_arcface_loss),
    "soft_triple": ("sample_to_proxy", proxy.soft_triple_loss),
    "soft_triple_regularizer": ("proxy_to_proxy", separation.soft_triple_regularizer),
    "nearest_proxy": ("proxy_to_proxy", separation.nearest_proxy_separation_loss),
    "soft_orthogonality": ("proxy_to_proxy", separation.soft_orthogonality_loss),
    "hyperspherical_energy": ("proxy_to_proxy", separation.hyperspherical_energy_loss),
}

MINERS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "sample": mining.sample_miner,
    "proxy": mining.proxy_miner,
    "either": mining.either_miner,
    "both": mining.both_miner,
    "blend": mining.blend_miner,
    "hard": mining.hard_miner,
    "semi_hard": mining.semi_hard_miner,
    "distance_weighted": mining.distance_weighted_miner,
}

COMBINATIONS: dict[str, Callable[..., Combination]] = {
    "fixed": combination.fixed,
    "uncertainty": combination.uncertainty,
    "share": combination.share,
    "gradnorm": combination.gradnorm,
    "random": combination.random,
}


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    return name in inspect.signature(function).parameters


def bind(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    key: str,
    supplied: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``partial`` of a function's keyword-only hyperparameters, checked by name and type.

    Args:
      function: whose keyword-only parameters are hyperparameters.
      given: hyperparameters by name, as the user states them.
      key: of the mapping in the config, for errors.
      supplied: values that the caller has; those that the function takes are bound too.

    Raises:
      UserError: on a name that the function does not take, a value of the wrong type, or a missing
        hyperparameter.
    """
    parameters = inspect.signature(function).parameters
    known = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    supplied = {n: value for n, value in (supplied or {}).items() if n in parameters}
    open_names = [n for n in known if n not in supplied]
    for name, value in given.items():
        if name not in open_names:
            what = function.__name__.removesuffix("_loss").removesuffix("_miner")
            raise UserError(
                f"--{key}.{name} is unknown: {what} takes {', '.join(open_names) or 'nothing'}"
                f" ({nearest(name, open_names)})"
                if open_names
                else f"--{key}.{name} is unknown: {what} takes no hyperparameters; "
                f"clear them by --{key}='{{}}'"
            )
        wanted = str(known[name].annotation).partition(" | ")[0]  # a config has no arrays
        kinds = (str, ("str", "Literal")), (tuple, "tuple")
        if any(isinstance(value, kind) != wanted.startswith(names) for kind, names in kinds):
            raise UserError(f"--{key}.{name} must be of type {wanted}, found {value!r}")
    missing = [n for n in open_names if known[n].default is inspect.Parameter.empty]
    if missing := [n for n in missing if n not in given]:
        raise UserError(f"--{key} lacks {', '.join(missing)}, found {', '.join(given) or 'none'}")
    return partial(function, **supplied, **given)

"""The one file where a config's names meet functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmljax.config import Config, ObjectiveConfig, choose, nearest
from mmljax.errors import UserError
from mmljax.losses import combination, mining, pair, proxy, ranking, separation
from mmljax.losses.relations import RELATIONS
from mmljax.mesh import AXIS, spread
from mmljax.models.embedder import make_embedder
from mmljax.models.pretrained import load_pretrained
from mmljax.types import Combination, Objective, TrainState

OBJECTIVES: dict[str, tuple[str, Callable[..., Any]]] = {  # name: (relation, loss)
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

PROXY_MULTIPLE = 128  # classes are padded to it, so that a checkpoint fits any device count


def make_objectives(config: Config) -> list[Objective]:
    """The run's objectives, hyperparameters bound, in the config's order.

    Raises:
      UserError: on an unknown loss, rule or hyperparameter, or a combination that cannot be.
    """
    if not config.objectives:
        raise UserError("--config.objectives is empty; name at least one objective")
    return [_objective(name, row, config) for name, row in config.objectives.items()]


def _objective(name: str, row: ObjectiveConfig, config: Config) -> Objective:
    key = f"config.objectives.{name}"
    relation, loss = choose(OBJECTIVES, row.loss, key=f"{key}.loss")
    given = {**config.losses.get(row.loss, {}), **row.params}
    if _takes(loss, "centers"):
        given["centers"] = config.centers
    bound = _bind(loss, given, key=f"{key}.params")
    miner = choose(MINERS, row.mining.rule, key=f"{key}.mining.rule")
    rows, columns = RELATIONS[relation]
    if columns == "proxies" and (miner is not None or row.memory):
        raise UserError(
            f"--{key} has proxies as columns, which are neither mined nor remembered: "
            f"set {key}.mining.rule='none' and {key}.memory=False"
        )
    if row.memory and not config.memory.size:
        raise UserError(f"--{key}.memory=True needs --config.memory.size above 0, found 0")
    if miner is not None:
        extra = {"dimension": config.model.embedding_size} if _takes(miner, "dimension") else {}
        miner = partial(miner, margin=row.mining.margin, blend=row.mining.blend, **extra)
    if row.sampled_proxies and relation != "proxy_to_proxy":
        raise UserError(
            f"--{key}.sampled_proxies={row.sampled_proxies} is for losses between proxies, and "
            f"{row.loss} is none: set it to 0"
        )
    return Objective(name, relation, bound, miner, row.memory, row.sampled_proxies)


def make_combination(config: Config) -> Combination:
    """The combination of losses, in the order of the objectives.

    Raises:
      UserError: on an unknown name, a missing weight or shares that do not sum to 1.
    """
    row = config.combination
    function = choose(COMBINATIONS, row.name, key="config.combination.name")
    names = list(config.objectives)
    targets = []
    for group in ("embedding", "proxy"):
        key = f"config.combination.{group}_shares"
        shares = _in_order(getattr(row, f"{group}_shares"), names, key=key, default=0.0)
        if sum(shares) and abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"--{key} must sum to 1, found {sum(shares):g}")
        targets.append(shares)
    available = {
        "weights": _in_order(row.weights, names, key="config.combination.weights"),
        "targets": targets,
        "cap": row.cap,
        "alpha": row.alpha,
        "seed": config.seed,
    }
    return function(**{k: v for k, v in available.items() if _takes(function, k)})


def _in_order(
    values: Mapping[str, float], names: list[str], *, key: str, default: float | None = None
) -> list[float]:
    for name in values:
        if name not in names:
            raise UserError(f"--{key}.{name} is no objective; {nearest(name, names)}")
    ordered = [values.get(name, default) for name in names]
    missing = [name for name, value in zip(names, ordered, strict=True) if value is None]
    if missing:
        raise UserError(f"--{key} lacks {', '.join(missing)}")
    return [value for value in ordered if value is not None]


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _bind(function: Callable[..., Any], given: Mapping[str, Any], *, key: str) -> Any:
    """``partial`` of a function's keyword-only hyperparameters, all checked by name and type."""
    known = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for name, value in given.items():
        if name not in known:
            raise UserError(f"--{key}.{name} is unknown; {nearest(name, known)}")
        wanted = str(known[name].annotation)
        if isinstance(value, str) != wanted.startswith(("str", "Literal")):
            raise UserError(f"--{key}.{name} must be of type {wanted}, found {value!r}")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
    if missing:
        raise UserError(f"--{key} lacks {', '.join(missing)}, found {', '.join(given) or 'none'}")
    return partial(function, **given)


def make_state(
    config: Config,
    *,
    classes: int,
    channels: int,
    objectives: int,
    combination: Combination,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    pretrained: bool = True,
) -> tuple[nnx.GraphDef, TrainState]:
    """The graph of the embedder and the state before the first step, laid out on the mesh.

    Proxies start as random directions, ``N(0, 1 / d)`` per component; they are used at unit
    length, so their stored length only sets how far a step turns them. The backbone starts from
    ``config.model.pretrained``, where that names weights and ``pretrained`` holds.

    Raises:
      UserError: if the proxies do not divide over the devices, or the weights cannot be used.
    """
    devices = mesh.devices.size
    if PROXY_MULTIPLE % devices:
        raise UserError(
            f"{devices} devices do not divide the proxies, padded to a multiple of "
            f"{PROXY_MULTIPLE}; use a power of two up to {PROXY_MULTIPLE}"
        )
    # This generator compiles several times faster than the default one, per shape of a parameter.
    rngs = nnx.Rngs(jax.random.key(config.seed, impl="rbg"))
    model = make_embedder(config.model, channels=channels, rngs=rngs)
    if pretrained and config.model.pretrained:
        load_pretrained(model.backbone, config.model.pretrained)
    graphdef, network, *rest = nnx.split(model, nnx.Param, ...)
    dtype = jnp.float64 if config.model.compute_dtype == "float64" else jnp.float32
    size = config.model.embedding_size
    key = jax.random.key(config.seed)
    rows = -(-classes // PROXY_MULTIPLE) * PROXY_MULTIPLE * config.centers
    proxies = jax.random.normal(jax.random.fold_in(key, 0), (rows, size), dtype) / np.sqrt(size)
    weights, combination_state = combination.init(objectives)
    params = {"network": nnx.to_pure_dict(network), "proxies": proxies, "weights": weights}
    memory: Any = ()
    if config.memory.size:
        slots = -(-config.memory.size // PROXY_MULTIPLE) * PROXY_MULTIPLE
        memory = {
            "vectors": jnp.zeros((slots, size), dtype),
            "labels": jnp.full((slots,), -1, jnp.int32),
        }
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=nnx.to_pure_dict(rest[0]),
        combination_state=combination_state,
        optimizer_state=optimizer.init(params),
        memory=memory,
        key=jax.random.fold_in(key, 1),
    )
    return graphdef, spread(state, state_shardings(state, mesh))


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """Proxies, their optimiser moments and the memory split by rows; all else replicated."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = {str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path}
        split = bool(names & {"proxies", "memory"}) and jnp.ndim(leaf) > 0
        return NamedSharding(mesh, PartitionSpec(AXIS) if split else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)

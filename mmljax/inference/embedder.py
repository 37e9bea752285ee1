"""Load the trained network of a run from its checkpoint.

Only the network's weights and BatchNorm statistics are read, or their moving average where the run
has one, not the proxies and the optimiser's state, which are larger. The data set is not needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from mmljax.config import Config, ModelConfig, fingerprint
from mmljax.errors import UserError
from mmljax.mesh import make_mesh, replicated
from mmljax.models.embedder import make_embedder
from mmljax.retrieval.evaluate import make_embed
from mmljax.runs.reader import CONFIG, read_config
from mmljax.training.checkpoints import PartialCheckpoint, steps_in
from mmljax.types import Params


class Weights(NamedTuple):
    """What a network in evaluation mode consists of."""

    network: Params
    model_state: Params  # BatchNorm statistics


class TrainedEmbedder(NamedTuple):
    """A network in evaluation mode, on all devices."""

    config: Config  # of its run
    identity: dict[str, Any]  # the run's name, and what comparable embeddings share
    channels: int  # of the images
    graphdef: nnx.GraphDef
    network: Params
    model_state: Params  # BatchNorm statistics
    embed: Callable[[UInt8[Array, "b s s ch"]], Float[Array, "b d"]]  # crops to unit vectors
    mesh: Mesh


def load_embedder(path: Path | str, *, step: int | None = None) -> TrainedEmbedder:
    """The network of a run, as its own evaluation uses it.

    ``embed`` takes crops of ``config.data.image_size`` pixels a side, uint8, made as evaluation
    makes them: the short side resized to ``config.data.resize_size``, then cropped at the centre.
    ``identity`` has ``config`` (its fingerprint), ``step``, ``weights`` (sixteen hexadecimal
    digits of their bytes) and the sizes.

    >>> trained = load_embedder(run)  # the --workdir of a run
    >>> size = trained.config.data.image_size
    >>> vectors = trained.embed(np.zeros((1, size, size, trained.channels), np.uint8))
    >>> vectors.shape == (1, trained.config.model.embedding_size)
    True

    Args:
      path: a run's directory, its ``checkpoints``, or one of these.
      step: of the checkpoint; the latest if None.

    Raises:
      UserError: if there is no run, no checkpoint or no such step, the config is damaged, or the
        checkpoint does not fit it.
    """
    run, step = _run_and_step(Path(path), step)
    config = read_config(run)
    step = _checked_step(run, step)
    checkpoint = PartialCheckpoint(run / "checkpoints", step=step)
    shapes = checkpoint.shapes()
    averaged = any(name.startswith("average.") for name in shapes)
    channels = _channels(config.model, shapes, run=run, averaged=averaged)
    graphdef, weights = _abstract(config.model, channels)
    mesh = make_mesh()
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), weights
    )
    state = checkpoint.restore(_named(target, averaged=averaged))
    kept = state["average"] if averaged else {**state["params"], **state}
    network, model_state = kept["network"], kept["model_state"]
    data, size = config.data, config.model.embedding_size
    identity = {
        "run": run.resolve().name,
        "step": step,
        "config": fingerprint(config),
        "weights": _digest(_named(Weights(network, model_state), averaged=False)),
        "image_size": data.image_size,
        "resize_size": data.resize_size,
        "embedding_size": size,
    }
    embed_with = make_embed(graphdef)
    crop = (data.image_size, data.image_size, channels)

    def embed(images: UInt8[Array, "b s s ch"]) -> Float[Array, "b d"]:
        if images.dtype != np.uint8 or images.shape[1:] != crop:
            raise UserError(
                f"images must be uint8 [b {data.image_size} {data.image_size} {channels}], found "
                f"{images.dtype} {images.shape}; crop them as the run's evaluation does"
            )
        return embed_with(network, model_state, images)

    return TrainedEmbedder(config, identity, channels, graphdef, network, model_state, embed, mesh)


def _run_and_step(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The run's directory, and the step if the path or the argument names one."""
    try:
        if (path / CONFIG).exists():
            return path, step
        path = path.resolve()
        if path.name == "checkpoints" and (path.parent / CONFIG).exists():
            return path.parent, step
        run = path.parent.parent
        if path.name.isascii() and path.name.isdigit() and (run / CONFIG).exists():
            named = int(path.name)
            if step not in (None, named):
                raise UserError(f"run {path} names step {named} and --step {step}; name it once")
            return run, named
        found = f"has no {CONFIG}" if path.is_dir() else "does not exist"
    except (OSError, RuntimeError) as error:  # too long, not accessible, or a link to itself
        found = f"cannot be read ({getattr(error, 'strerror', None) or 'a link to itself'})"
    raise UserError(f"run {path} {found}; give the --workdir of a run")


def _checked_step(run: Path, step: int | None) -> int:
    steps = steps_in(run / "checkpoints")
    if not steps:
        raise UserError(
            f"run {run} has no complete checkpoint yet; wait for the first one "
            "(--config.checkpoint.every), or start the run again"
        )
    if step is not None and step not in steps:
        raise UserError(f"--step={step} is not kept in {run}; kept: {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _abstract(config: ModelConfig, channels: int) -> tuple[nnx.GraphDef, Weights]:
    """The network's graph, and the shapes of its weights."""
    model = nnx.eval_shape(
        lambda: make_embedder(config, channels=channels, rngs=nnx.Rngs(jax.random.key(0)))
    )
    graphdef, network, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, Weights(nnx.to_pure_dict(network), nnx.to_pure_dict(rest[0]))


def _named(weights: Weights, *, averaged: bool) -> dict[str, Any]:
    """Weights as the part of a train state that holds them: trained ones, or their average."""
    if averaged:
        return {"average": weights._asdict()}
    return {"params": {"network": weights.network}, "model_state": weights.model_state}


def _channels(
    config: ModelConfig, saved: dict[str, tuple[int, ...]], *, run: Path, averaged: bool
) -> int:
    """Channels of the images, from the one parameter whose shape depends on them.

    Raises:
      UserError: if the checkpoint is not of the config's network.
    """

    def shapes(channels: int) -> dict[str, tuple[int, ...]]:
        return _shapes(_named(_abstract(config, channels)[1], averaged=averaged))

    one, two = shapes(1), shapes(2)
    (name,) = (name for name in one if one[name] != two[name])
    axis = next(i for i, size in enumerate(one[name]) if size != two[name][i])
    channels = saved[name][axis] if name in saved else 0
    expected = shapes(channels) if channels else {name: two[name]}
    wrong = [name for name, shape in expected.items() if saved.get(name) != shape]
    if wrong:
        raise UserError(
            f"the checkpoint in {run} does not fit its config.json: {wrong[0]} is "
            f"{saved.get(wrong[0])}, not {expected[wrong[0]]}; restore the run's own config.json"
        )
    return channels


def _shapes(target: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(target)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _digest(state: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that change with any weight."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]

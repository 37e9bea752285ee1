"""Load the trained network of a run from its checkpoint.

Only the network's weights and BatchNorm statistics are read, or their moving average where the run
has one, not the proxies and the optimiser's state, which are larger. The data set is not needed. A
head that was trained on features is joined with the backbone that made them. Adapters are merged
into the layers that they adapt, so the network is one without adapters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from mmljax.config import Config, LoraConfig, ModelConfig, fingerprint
from mmljax.data.load import FEATURES
from mmljax.data.readers.features import read_identity
from mmljax.errors import UserError
from mmljax.inference import hub
from mmljax.mesh import make_mesh, replicated
from mmljax.models.embedder import make_embedder
from mmljax.models.lora import merge_adapters
from mmljax.retrieval.evaluate import first_dimensions, make_embed
from mmljax.runs.reader import CONFIG, read_config
from mmljax.runs.remote import checkpoints_of
from mmljax.training.checkpoints import PartialCheckpoint, steps_in
from mmljax.training.freezing import split_network
from mmljax.training.state import make_model
from mmljax.types import Params, overlaid

FIRST_OF = "first_of"
"""Of an identity whose embeddings are the first dimensions of longer ones: the longer size."""


class Weights(NamedTuple):
    """What a network in evaluation mode consists of."""

    network: Params
    model_state: Params  # BatchNorm statistics


class TrainedEmbedder(NamedTuple):
    """A network in evaluation mode, on all devices."""

    config: Config  # of its run, without adapters
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
    digits of their bytes in the checkpoint), the sizes and the filter of resizing. Merged adapters
    change embeddings by rounding only.

    >>> trained = load_embedder(run)  # the --workdir of a run
    >>> size = trained.config.data.image_size
    >>> vectors = trained.embed(np.zeros((1, size, size, trained.channels), np.uint8))
    >>> vectors.shape == (1, trained.config.model.embedding_size)
    True

    Args:
      path: a run's directory, its ``checkpoints``, or one of these; or the address of a run; or the
        folder of ``mmljax export --format hub``, or ``hf:OWNER/NAME@COMMIT`` with such a folder.
      step: of the checkpoint; the latest if None.

    Raises:
      UserError: if there is no run, no checkpoint or no such step, the config is damaged, or the
        checkpoint does not fit it.
    """
    path = hub.located(path)
    if hub.is_folder(path):
        return _published(path, step)
    run, step = _run_and_step(path, step)
    config = read_config(run)
    step = _checked_step(run, step)
    checkpoint = PartialCheckpoint(checkpoints_of(run), step=step)
    shapes, mesh = checkpoint.shapes(), make_mesh()
    if config.data.source == FEATURES:
        channels, graphdef, weights = _joined(run, config, checkpoint, mesh)
    else:
        channels = _channels(config.model, shapes, run=run)
        graphdef, target = _abstract(config.model, channels)
        weights = _restored(checkpoint, target, mesh)
    data, size = config.data, config.model.embedding_size
    identity = {
        "run": run.resolve().name,
        "step": step,
        "config": fingerprint(config),
        "weights": weights_digest(_named(weights)),
        "image_size": data.image_size,
        "resize_size": data.resize_size,
        "resampling": data.resampling,
        "embedding_size": size,
    }
    network, model_state = weights
    if config.model.lora.rank:
        network = merge_adapters(network, config.model.lora)
        model = dataclasses.replace(config.model, lora=LoraConfig())
        config = dataclasses.replace(config, model=model)
        graphdef, _ = _abstract(model, channels)
    return _trained(config, identity, channels, graphdef, Weights(network, model_state), mesh)


def _published(folder: Path, step: int | None) -> TrainedEmbedder:
    """The network of an exported folder."""
    found = hub.read_folder(folder)
    if step not in (None, found.identity["step"]):
        raise UserError(
            f"--step={step} is not in {folder}, which has step {found.identity['step']} alone"
        )
    graphdef, target = _abstract(found.config.model, found.channels)
    whole = hub.filled(target._asdict(), found, folder=folder)
    mesh = make_mesh()
    weights = Weights(**jax.device_put(whole, replicated(mesh)))
    return _trained(found.config, found.identity, found.channels, graphdef, weights, mesh)


def _trained(
    config: Config,
    identity: dict[str, Any],
    channels: int,
    graphdef: nnx.GraphDef,
    weights: Weights,
    mesh: Mesh,
) -> TrainedEmbedder:
    """The network with its function of crops."""
    data, embed_with = config.data, make_embed(graphdef)
    crop = (data.image_size, data.image_size, channels)

    def embed(images: UInt8[Array, "b s s ch"]) -> Float[Array, "b d"]:
        features = images.ndim == 2 and config.data.source == FEATURES
        if not features and (images.dtype != np.uint8 or images.shape[1:] != crop):
            raise UserError(
                f"images must be uint8 [b {data.image_size} {data.image_size} {channels}], found "
                f"{images.dtype} {images.shape}; crop them as the run's evaluation does"
            )
        return embed_with(*weights, images)

    return TrainedEmbedder(config, identity, channels, graphdef, *weights, embed, mesh)


def with_dimensions(trained: TrainedEmbedder, dims: int) -> TrainedEmbedder:
    """The network with the first dimensions of its embeddings, at unit length.

    Its ``identity`` has their number as ``embedding_size``, and the whole size as ``FIRST_OF``.

    Raises:
      UserError: if the embeddings have fewer dimensions.
    """
    size = trained.identity["embedding_size"]
    if dims > size:
        raise UserError(
            f"--dims={dims} is more than the {size} dimensions of the run's embeddings; name at "
            f"most {size}"
        )
    if dims == size:
        return trained

    def embed(images: UInt8[Array, "b s s ch"]) -> Float[Array, "b d"]:
        return first_dimensions(trained.embed(images), dims)

    identity = trained.identity | {"embedding_size": dims, FIRST_OF: size}
    return trained._replace(identity=identity, embed=embed)


def in_float32(trained: TrainedEmbedder) -> TrainedEmbedder:
    """The same network, computed in float32 whatever the run's compute dtype is."""
    model = dataclasses.replace(trained.config.model, compute_dtype="float32", remat="none")
    weights = jax.tree.map(lambda x: x.astype(np.float32), (trained.network, trained.model_state))
    return _rebuilt(trained, dataclasses.replace(trained.config, model=model), Weights(*weights))


def at_image_size(trained: TrainedEmbedder, size: int) -> TrainedEmbedder:
    """The same network for crops of ``size`` pixels a side.

    The short side before the crop is in the proportion that the run has.

    Raises:
      UserError: if the network does not take such images.
    """
    data = trained.config.data
    side = round(data.resize_size * size / data.image_size)
    data = dataclasses.replace(data, image_size=size, resize_size=side)
    identity = trained.identity | {"image_size": size, "resize_size": side}
    config = dataclasses.replace(trained.config, data=data)
    weights = Weights(trained.network, trained.model_state)
    resized = _rebuilt(trained._replace(identity=identity), config, weights)
    try:
        shape = (1, size, size, trained.channels)
        jax.eval_shape(resized.embed, jax.ShapeDtypeStruct(shape, np.uint8))
    except UserError as error:
        reason = str(error).removeprefix("--config.data.image_size: ")
        raise UserError(f"--image-size={size}: {reason}") from None
    return resized


def _rebuilt(trained: TrainedEmbedder, config: Config, weights: Weights) -> TrainedEmbedder:
    graphdef, _ = _abstract(config.model, trained.channels)
    return _trained(config, trained.identity, trained.channels, graphdef, weights, trained.mesh)


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
    steps = steps_in(checkpoints_of(run))
    if not steps:
        raise UserError(
            f"run {run} has no complete checkpoint yet; wait for the first one "
            "(--config.checkpoint.every), or start the run again"
        )
    if step is not None and step not in steps:
        raise UserError(f"--step={step} is not kept in {run}; kept: {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _restored(checkpoint: PartialCheckpoint, target: Weights, mesh: Mesh) -> Weights:
    """The weights, or their average where there is one, whole on every device."""
    network, model_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), target
    )
    saved = checkpoint.shapes()
    if not any(name.startswith("average.") for name in saved):
        state = checkpoint.restore(_named(Weights(network, model_state)))
        return Weights(state["params"]["network"], state["model_state"])
    averaged, rest = split_network(network, lambda name: f"average.network.{name}" in saved)
    average = {"network": averaged, "model_state": model_state}
    state = checkpoint.restore({"params": {"network": rest}, "average": average})
    average = state["average"]
    return Weights(overlaid(average["network"], state["params"]["network"]), average["model_state"])


def _joined(
    run: Path, config: Config, checkpoint: PartialCheckpoint, mesh: Mesh
) -> tuple[int, nnx.GraphDef, Weights]:
    """The network of a head that was trained on features, with the backbone of the features.

    Raises:
      UserError: if the backbone's weights are absent, or are not those of the features.
    """
    identity = read_identity(run, where=f"run {run}")
    channels = identity["channels"]
    try:
        graphdef, *state = make_model(
            config.model, seed=identity["seed"], channels=channels, pretrained=True
        )
    except UserError as error:
        raise UserError(
            f"run {run} is a head on features, which needs its backbone to embed images: {error}"
        ) from error
    backbone = nnx.merge(graphdef, *state).backbone
    if weights_digest(nnx.to_pure_dict(nnx.state(backbone))) != identity["weights"]:
        raise UserError(
            f"run {run} is a head on features of other weights than "
            f"--config.model.pretrained={config.model.pretrained!r} has now; restore those weights"
        )
    whole = [jax.device_put(part, replicated(mesh)) for part in state]
    heads = Weights(*({"head": part["head"]} if "head" in part else {} for part in whole))
    trained = _restored(checkpoint, heads, mesh)
    return channels, graphdef, Weights(*({**a, **b} for a, b in zip(whole, trained, strict=True)))


def _abstract(config: ModelConfig, channels: int) -> tuple[nnx.GraphDef, Weights]:
    """The network's graph, and the shapes of its weights."""
    model = nnx.eval_shape(
        lambda: make_embedder(config, channels=channels, rngs=nnx.Rngs(jax.random.key(0)))
    )
    graphdef, network, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, Weights(nnx.to_pure_dict(network), nnx.to_pure_dict(rest[0]))


def _named(weights: Weights) -> dict[str, Any]:
    """Weights as the part of a train state that holds them."""
    return {"params": {"network": weights.network}, "model_state": weights.model_state}


def _channels(config: ModelConfig, saved: dict[str, tuple[int, ...]], *, run: Path) -> int:
    """Channels of the images, from the one parameter whose shape depends on them.

    Raises:
      UserError: if the checkpoint is not of the config's network.
    """

    def shapes(channels: int) -> dict[str, tuple[int, ...]]:
        return _shapes(_named(_abstract(config, channels)[1]))

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
    return {name: tuple(leaf.shape) for name, leaf in hub.arrays_by_name(target).items()}


def weights_digest(state: Any) -> str:
    """Sixteen hexadecimal digits that change with any weight."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]

"""What a run leaves behind, without training: a config, and checkpoints of random networks."""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import small_runs
from mmljax.config import Config, load_config, to_dict
from mmljax.data import load
from mmljax.inference.embedder import TrainedEmbedder, load_embedder
from mmljax.mesh import make_mesh
from mmljax.retrieval.evaluate import embed_batches, make_embed
from mmljax.training.checkpoints import Checkpoints
from mmljax.training.state import shardings
from mmljax.training.trainer import make_trainer
from mmljax.types import Split, TrainState

STEPS = (3, 5)


class SavedRun(NamedTuple):
    """What was written, and the trainer's own evaluation of it."""

    folder: Path
    config: Config
    states: dict[int, TrainState]  # by step
    embed: Any  # (network, model_state, images) -> embeddings, of the trainer's own graph


def write_run(folder: Path, *, noise: float = 0.3, **changes: Any) -> SavedRun:
    """A run's directory with checkpoints of ``STEPS``.

    Also BatchNorm's statistics differ from those of a new network, and from step to step, by about
    that share of their values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "images.npz"
    if "data__directory" not in changes:
        small_runs.write_images(images)
    path = small_runs.write_config(folder / "small.py", images, **changes)
    config = load_config(str(path))
    mesh = make_mesh()
    dataset = load.load_dataset(config)
    trainer = make_trainer(
        config,
        classes=dataset.classes,
        channels=load.image_channels(dataset),
        train_examples=len(dataset.train.labels),
        mesh=mesh,
    )
    run, states = folder / "run", {}
    saved = Checkpoints(run / "checkpoints", keep_last=2, keep_best=0)
    for step in STEPS:
        changed = partial(noised, noise=noise, seed=step)
        network = jax.tree.map(changed, trainer.state.params["network"])
        state = trainer.state._replace(
            objective=trainer.state.objective._replace(step=np.int32(step)),
            params=trainer.state.params | {"network": network},
            model_state=jax.tree.map(changed, trainer.state.model_state),
        )
        state = jax.device_put(state, shardings(state, trainer.objective, mesh))
        saved.save(state, step=step, metrics=None)
        states[step] = state
    saved.close()
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    return SavedRun(run, config, states, make_embed(trainer.graphdef))


def own_embeddings(run: SavedRun, split: Split, *, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and labels of a split as the trainer's own evaluation makes them."""
    state = run.states[step]
    embed = partial(run.embed, state.params["network"], state.model_state)
    return embed_batches(embed, load.eval_batches(split, run.config, make_mesh()))


@functools.cache
def load_once(path: Path, *, step: int | None = None) -> TrainedEmbedder:
    """``load_embedder``, with nothing compiled twice for the commands of one test session."""
    return load_embedder(path, step=step)


def noised(x: jax.Array, *, noise: float, seed: int) -> np.ndarray:
    """Weights or statistics, each changed by about that share of its value."""
    values = np.asarray(x)  # in NumPy, which compiles nothing
    scaled, moved = np.random.default_rng(seed).uniform(-noise, noise, (2, *x.shape))
    return (values * (1 + scaled) + moved / 6).astype(values.dtype)

"""The time of a training step with each key of fine-tuning, as a ratio to the step without it.

    python -m benchmarks.fine_tuning                       # EfficientNet-Lite0, 112 px, batch 32

The step is that of ``benchmarks.train_step``, with frozen BatchNorm. Rows take turns; the best of
each counts. Below them, what batches of hard classes add: the choice of the images, which the host
makes while a step runs, and refreshes of near classes: by proxies, and by images, which takes the
embedding of a batch of that size for each of their batches and a search.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from benchmarks.train_step import CLASSES, Row, make_batch, make_config
from mmljax.config import CompositionConfig, DataConfig
from mmljax.data.composition import Neighbors, batch_sampler
from mmljax.mesh import make_mesh, place
from mmljax.retrieval.evaluate import make_embed
from mmljax.training.neighbors import nearest_classes, nearest_wrong_classes
from mmljax.training.trainer import make_trainer

ROWS: Mapping[str, Mapping[str, Any]] = {  # what differs in config.optimizer
    "none": {},
    "optimizer.layer_decay": {"layer_decay": 0.75},
    "optimizer.ema_decay": {"ema_decay": 0.99},
}


def make_step(options: argparse.Namespace, changes: Mapping[str, Any]) -> Callable[[], None]:
    """A function that runs one step to its end."""
    row = Row(options.backbone, options.image_size, separation=False)
    config, mesh = make_config(row, options), make_mesh()
    optimizer = dataclasses.replace(config.optimizer, **changes)
    config = dataclasses.replace(config, optimizer=optimizer)
    trainer = make_trainer(config, classes=CLASSES, channels=3, train_examples=25_882, mesh=mesh)
    placed, held = place(make_batch(row, options.batch_size), mesh), [trainer.state]

    def step() -> None:
        held[0], _ = trainer.step(held[0], placed)
        jax.block_until_ready(held[0])

    return step


def main() -> None:
    """Time the rows and print milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--batch-norm", default="frozen", choices=["global", "frozen"])
    parser.add_argument("--repeats", type=int, default=40, help="steps of each row")
    options = parser.parse_args()
    print(f"{machine.describe()}, batch {options.batch_size}, {options.dtype}")
    steps = {name: make_step(options, changes) for name, changes in ROWS.items()}
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
        step()  # the first two compile
    for _ in range(options.repeats):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - begin)
    best["embedding of a batch"] = embedding_time(options)
    for name, seconds in best.items():
        print(f"{name:<30}{1e3 * seconds:>8.1f} ms  ratio {seconds / best['none']:.3f}")
    for name, seconds in composition_times().items():
        print(f"{name:<30}{1e3 * seconds:>8.1f} ms")


def embedding_time(options: argparse.Namespace) -> float:
    """Seconds in which a batch of the step's size is embedded, as for a refresh by images."""
    row = Row(options.backbone, options.image_size, separation=False)
    config, mesh = make_config(row, options), make_mesh()
    trainer = make_trainer(config, classes=CLASSES, channels=3, train_examples=25_882, mesh=mesh)
    images = place(make_batch(row, options.batch_size), mesh).images
    embed = make_embed(trainer.graphdef)
    return best_time(
        lambda: jax.block_until_ready(embed(*trainer.state.evaluated, images)), options.repeats
    )


def best_time(function: Callable[[], Any], repeats: int) -> float:
    """The least seconds of several calls; the first one may compile."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def composition_times() -> dict[str, float]:
    """Seconds of a refresh and of the choice of a batch, on as many classes as In-Shop has."""
    proxies = np.random.default_rng(0).normal(size=(CLASSES, 512)).astype(np.float32)
    labels = np.arange(25_882) % CLASSES
    mesh = make_mesh()

    def refresh() -> Any:
        return nearest_classes(proxies, centers=1, count=3, mesh=mesh)

    data = DataConfig(composition=CompositionConfig("proxy", share=1.0))
    ordinary = batch_sampler(labels, data, seed=0)
    composed = batch_sampler(labels, data, seed=0, neighbors=Neighbors(classes=refresh()))
    images = np.random.default_rng(0).normal(size=(len(labels), 512)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)

    def search() -> Any:
        return nearest_wrong_classes(images, np.sort(labels), classes=CLASSES, count=3)

    timed: dict[str, tuple[Callable[[], Any], int]] = {
        "refresh of near classes": (refresh, 7),
        "search of a refresh by images": (search, 2),
        "images of a batch": (lambda: ordinary(7), 7),
        "of a composed batch": (lambda: composed(7), 7),
    }
    return {name: best_time(function, repeats) for name, (function, repeats) in timed.items()}


if __name__ == "__main__":
    main()

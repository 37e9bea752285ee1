"""One whole training step of ours beside PyTorch's, on the same device in one run.

    python -m benchmarks.train_step    # ResNet-50, 224 px, bf16, batch 180
    python -m benchmarks.train_step --rows cpu --dtype float32 --batch-size 32
    python -m benchmarks.train_step --backbone resnet18 --image-size 64 --separation

Both sides: average pooling, a projection to 512, Multi-Similarity with its miner and 0.03 times
Proxy-Anchor over 3,997 classes, AdamW, the same uint8 batch already on the device. With
``--separation`` also 0.3 times the repulsion of proxies. PyTorch's side: torchvision's ResNet or
efficientnet_lite_pytorch's network in channels-last, and pytorch-metric-learning's miner and
losses; compiled by ``torch.compile`` on a GPU, or with ``--compile``. On CPU the process keeps
freed memory, as the command ``mmljax`` does; with ``--default-allocator`` it does not. The setting
holds for both sides. Runs of the sides alternate; the best of each counts. Without PyTorch's
packages only our side is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import machine
from benchmarks.torch_peer import import_torchvision
from mmljax.allocator import keep_freed_memory
from mmljax.config import Config, from_mapping
from mmljax.mesh import make_mesh, place
from mmljax.training.trainer import make_trainer
from mmljax.types import Batch

CLASSES = 3997  # In-Shop's training items
SIZE = 512  # of an embedding
PROXY_WEIGHT, SEPARATION_WEIGHT = 0.03, 0.3
SHARPNESS, MARGIN = 32, 0.1  # of the separation

CPU_ROWS = (
    ("efficientnet_lite0", 112, False),
    ("resnet18", 64, False),
    ("resnet18", 64, True),
    ("resnet18", 112, False),
    ("resnet50", 112, False),
)


class Row(NamedTuple):
    """What is timed."""

    backbone: str
    image_size: int
    separation: bool


def make_batch(row: Row, batch_size: int) -> Batch:
    """Return noise, four images to a class."""
    random = np.random.default_rng(0)
    size = (batch_size, row.image_size, row.image_size, 3)
    labels = np.repeat(random.permutation(CLASSES)[: batch_size // 4], 4)
    images = random.integers(0, 256, size, dtype=np.uint8)
    batch: Any = (images, labels.astype(np.int32), np.ones(batch_size, bool))
    return Batch(*batch)


def make_config(row: Row, options: argparse.Namespace) -> Config:
    """Return the config of one row: the only place that knows its schema."""
    from mmljax import default_config

    config = default_config()
    config.data.batch_size = options.batch_size
    config.model.update(
        backbone=row.backbone,
        compute_dtype=options.dtype,
        batch_norm=options.batch_norm,
        embedding_size=SIZE,
        pooling="average",
        layer_norm="none",
    )
    pair, proxy, separation = (config.objectives[x] for x in ("pair", "proxy", "separation"))
    pair.update(mining="sample", mining_params={"margin": 0.1}, weight=1.0)
    proxy.weight = PROXY_WEIGHT
    separation.update(weight=SEPARATION_WEIGHT, params={"gamma": SHARPNESS, "margin": MARGIN})
    if not row.separation:
        del config.objectives["separation"]
    config.combination.name = "fixed"
    config.optimizer.clip_norm = 0.0
    return from_mapping(config)


def our_step(row: Row, options: argparse.Namespace, batch: Batch) -> Callable[[int], None]:
    """Return a function that runs a number of steps to their end."""
    mesh = make_mesh()
    trainer = make_trainer(
        make_config(row, options), classes=CLASSES, channels=3, train_examples=25_882, mesh=mesh
    )
    placed = place(batch, mesh)
    held = [trainer.state]

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0], _ = trainer.step(held[0], placed)
        jax.block_until_ready(held[0].params)

    return run


def torch_network(row: Row) -> Any:
    """Return PyTorch's network with a projection in place of the classifier."""
    import torch

    if row.backbone.startswith("efficientnet"):
        from efficientnet_lite_pytorch import EfficientNet

        name = row.backbone.replace("_", "-")
        network = EfficientNet.from_name(name, image_size=row.image_size, drop_connect_rate=0)
        network._dropout = torch.nn.Identity()
        network._fc = torch.nn.Linear(network._fc.in_features, SIZE)
        return network
    network = import_torchvision().models.get_model(row.backbone, weights=None)
    network.fc = torch.nn.Linear(network.fc.in_features, SIZE)
    return network


def torch_step(row: Row, options: argparse.Namespace, batch: Batch) -> Callable[[int], None]:
    """Return the same for PyTorch.

    Raises:
      ImportError: if one of its packages is absent.
    """
    import torch
    from pytorch_metric_learning import losses, miners

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = torch_network(row).to(device, memory_format=torch.channels_last)
    if options.batch_norm == "frozen":
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    miner = miners.MultiSimilarityMiner(epsilon=0.1)
    pair = losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
    proxy = losses.ProxyAnchorLoss(CLASSES, SIZE, margin=0.1, alpha=32).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters()}, {"params": proxy.parameters(), "lr": 1e-2}], lr=1e-4
    )
    images = torch.from_numpy(batch.images).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(batch.labels).long().to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1) * 255
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1) * 255
    compiled = torch.compile(network) if options.compile or device == "cuda" else network
    itself = torch.eye(CLASSES, dtype=torch.bool, device=device)

    def separation() -> Any:
        unit = torch.nn.functional.normalize(proxy.proxies)
        logits = (SHARPNESS * (unit @ unit.T - MARGIN)).masked_fill(itself, -torch.inf)
        return torch.nn.functional.softplus(torch.logsumexp(logits, 1)).mean() / SHARPNESS

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            x = ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)
            embeddings = torch.nn.functional.normalize(compiled(x).float())
        loss = pair(embeddings, labels, miner(embeddings, labels))
        loss = loss + PROXY_WEIGHT * proxy(embeddings, labels)
        if row.separation:
            loss = loss + SEPARATION_WEIGHT * separation()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def run(steps: int) -> None:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def time_row(row: Row, options: argparse.Namespace) -> None:
    """Time both sides in turn and print milliseconds, images per second and their ratio."""
    batch = make_batch(row, options.batch_size)
    sides = {"mmljax": our_step(row, options, batch)}
    try:
        sides["PyTorch"] = torch_step(row, options, batch)
    except ImportError as error:
        print(f"no PyTorch side: {error}; pip install 'mmljax[peers]'")
    best = dict.fromkeys(sides, float("inf"))
    for run in sides.values():
        run(2)
    for _ in range(options.repeats):
        for name, run in sides.items():
            begin = time.perf_counter()
            run(options.steps)
            best[name] = min(best[name], (time.perf_counter() - begin) / options.steps)
    text = f"{row.backbone} {row.image_size} px{' + separation' if row.separation else ''}"
    text = f"{text:<32}"
    for name, seconds in best.items():
        text += f"  {name}{1e3 * seconds:>8.1f} ms {options.batch_size / seconds:>6.0f} images/s"
    if len(best) > 1:
        text += f"  ratio {best['PyTorch'] / best['mmljax']:.2f}"
    print(text, flush=True)


def main() -> None:
    """Time one row, or the rows for CPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="one", choices=["one", "cpu"], help="cpu: all of CPU's")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--separation", action="store_true")
    parser.add_argument("--batch-size", type=int, default=180)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch-norm", default="global", choices=["global", "frozen"])
    parser.add_argument("--compile", action="store_true", help="torch.compile on CPU too")
    parser.add_argument("--default-allocator", action="store_true", help="malloc's defaults")
    parser.add_argument("--steps", type=int, default=20, help="per timing")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    kept = not options.default_allocator and keep_freed_memory()
    one = (options.backbone, options.image_size, options.separation)
    allocator = "freed memory is kept" if kept else "default allocator"
    print(f"{machine.describe()}, batch {options.batch_size}, {options.dtype}, {allocator}")
    for row in CPU_ROWS if options.rows == "cpu" else (one,):
        time_row(Row(*row), options)


if __name__ == "__main__":
    main()

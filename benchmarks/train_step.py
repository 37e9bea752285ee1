"""One whole training step of ours beside PyTorch's, on the same device in one run.

    python -m benchmarks.train_step    # ResNet-50, 224 px, bf16, batch 180
    python -m benchmarks.train_step --backbone resnet18 --image-size 64 --batch-size 32
    python -m benchmarks.train_step --batch-norm frozen    # folded into the convolutions, and not

Ours: the step of ``configs/inshop.py`` (mined Multi-Similarity, Proxy-Anchor, separation, learned
weights, AdamW). PyTorch's: torchvision's network in channels-last and the same precision under
``torch.compile``, with pytorch-metric-learning's Multi-Similarity miner and loss and Proxy-Anchor,
AdamW. Both are fed the same uint8 batch, already on the device. Runs alternate; the best of each
side counts. Without torch, torchvision or pytorch-metric-learning only our side is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from mmljax.config import Config, from_mapping
from mmljax.mesh import make_mesh, place
from mmljax.models import resnet
from mmljax.training.trainer import assemble
from mmljax.types import Batch

CLASSES = 3997  # In-Shop's training items


def make_batch(options: argparse.Namespace) -> Batch:
    """Noise, four images to a class."""
    random = np.random.default_rng(0)
    size = (options.batch_size, options.image_size, options.image_size, 3)
    labels = np.repeat(random.permutation(CLASSES)[: options.batch_size // 4], 4)
    images = random.integers(0, 256, size, dtype=np.uint8)
    batch: Any = (images, labels.astype(np.int32), np.ones(options.batch_size, bool))
    return Batch(*batch)


def make_config(options: argparse.Namespace) -> Config:
    """The In-Shop config at the asked size."""
    from configs import inshop

    config = inshop.get_config()
    config.data.batch_size = options.batch_size
    config.model.backbone = options.backbone
    config.model.compute_dtype = options.dtype
    config.model.batch_norm = options.batch_norm
    return from_mapping(config)


def our_step(options: argparse.Namespace, batch: Batch, *, fold: bool) -> Callable[[int], None]:
    """A function that runs that many steps to their end; ``fold`` is of frozen BatchNorm."""
    config = make_config(options)
    mesh = make_mesh()
    trainer = assemble(config, classes=CLASSES, channels=3, train_examples=25_882, mesh=mesh)
    placed = place(batch, mesh)
    held = [trainer.state]

    def run(steps: int) -> None:
        resnet.FOLD = fold  # looked at in the first step, which traces
        for _ in range(steps):
            held[0], _ = trainer.step(held[0], placed)
        jax.block_until_ready(held[0].params)

    return run


def torch_step(options: argparse.Namespace, batch: Batch) -> Callable[[int], None]:
    """The same for PyTorch.

    Raises:
      ImportError: if torch, torchvision or pytorch-metric-learning is absent.
    """
    import torch
    import torchvision
    from pytorch_metric_learning import losses, miners

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = torchvision.models.get_model(options.backbone, weights=None)
    network.fc = torch.nn.Linear(network.fc.in_features, 512)
    network = network.to(device, memory_format=torch.channels_last)
    if options.batch_norm == "frozen":
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    miner = miners.MultiSimilarityMiner(epsilon=0.1)
    pair = losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5)
    proxy = losses.ProxyAnchorLoss(CLASSES, 512, margin=0.1, alpha=32).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters()}, {"params": proxy.parameters(), "lr": 1e-2}], lr=1e-4
    )
    images = torch.from_numpy(batch.images).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(batch.labels).long().to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1) * 255
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1) * 255
    compiled = torch.compile(network)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            x = ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)
            embeddings = torch.nn.functional.normalize(compiled(x).float())
        loss = pair(embeddings, labels, miner(embeddings, labels)) + proxy(embeddings, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def run(steps: int) -> None:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Time both sides in turn and print images per second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=180)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch-norm", default="global", choices=["global", "frozen"])
    parser.add_argument("--steps", type=int, default=20, help="per timing")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    batch = make_batch(options)
    sides = {"mmljax": our_step(options, batch, fold=True)}
    if options.batch_norm == "frozen":
        sides["not folded"] = our_step(options, batch, fold=False)
    try:
        sides["PyTorch"] = torch_step(options, batch)
    except ImportError as error:
        print(f"no PyTorch side: {error}; install torch, torchvision, pytorch-metric-learning")
    best = dict.fromkeys(sides, float("inf"))
    for name, run in sides.items():
        begin = time.perf_counter()
        run(2)
        print(f"{name}: compiled and warm after {time.perf_counter() - begin:.1f} s")
    for _ in range(options.repeats):
        for name, run in sides.items():
            begin = time.perf_counter()
            run(options.steps)
            best[name] = min(best[name], (time.perf_counter() - begin) / options.steps)
    print(machine.describe())
    for name, seconds in best.items():
        speed = options.batch_size / seconds
        print(f"{name:<11}{1e3 * seconds:>9.1f} ms per step{speed:>9.0f} images/s")
    for name in list(best)[1:]:
        print(f"ratio mmljax / {name}: {best[name] / best['mmljax']:.2f}")


if __name__ == "__main__":
    main()

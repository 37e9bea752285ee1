"""Peak memory of training a head on a million features of 1,280 channels.

    python -m benchmarks.feature_memory

A process writes noise in the layout of ``mmljax features`` (5.2 GB below ``--directory``, removed
at the end). This one trains a linear head on it by ``mmljax.train`` and prints the peak of its
memory: anonymous pages and pages of mapped files. The classes have 50 images each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import machine
from mmljax import train
from mmljax.config import Config, load_config
from mmljax.data.readers.features import FORMAT, IDENTITY, IMAGES, network_input

CHANNELS, TEST = 1280, 1000


def write_noise(folder: Path, config: Config, *, images: int) -> None:
    """Write a folder of features that are noise."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", images), ("query", TEST)):
        file = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", np.float32, (1, count, CHANNELS)
        )
        for first in range(0, count, 10_000):
            rows = file[0, first : first + 10_000]
            rows[:] = random.normal(size=rows.shape)
        file.flush()
        arrays[f"{name} labels"] = np.arange(count, dtype=np.int32) // 50
        arrays[f"{name} names"] = np.char.add(f"{name}/", np.arange(count).astype(str))
    np.savez(folder / IMAGES, **arrays)
    identity = {
        "format": FORMAT,
        **network_input(config),
        "weights": "",
        "seed": 0,
        "channels": 3,
        "features": CHANNELS,
        "dtype": "float32",
        "views": {"train": 1, "query": 1},
        "classes": images // 50,
    }
    (folder / IDENTITY).write_text(json.dumps(identity))


def main() -> None:
    """Write the features, train, and print the peak."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", help="where to write; default: a temporary one")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        changes = [
            f"duration={options.steps} steps",
            f"data.directory={folder / 'features'}",
            "data.batch_size=512",
            "objectives.separation.sampled_proxies=1024",  # of 20,000: all pairs would fill 1.6 GB
            "log.plot=False",
            "log.tensorboard=False",
        ]
        config = load_config("heads", changes)
        (folder / "features").mkdir()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_noise, folder / "features", config, images=options.images).result()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        train(config, folder / "run")
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{machine.describe()}, {options.images:,} x {CHANNELS} float32, batch 512")
        print(
            f"{options.steps} steps and an evaluation in {seconds:.0f} s; peak of the process "
            f"{peak / 2**20:.2f} GiB, {before / 2**20:.2f} GiB of it before training"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""Time the training input (decode, random resized crop, flip, batch) against torch's DataLoader.

    python -m benchmarks.input                                # generated JPEGs of 256 px
    python -m benchmarks.input --images data/grocery/Img      # and all the images below a folder
    python -m benchmarks.input --side 2000 --count 200        # JPEGs of the size of photographs
    python -m benchmarks.input --shards array_record          # ours reads a prepared data set
    python -m benchmarks.input --parts                        # decoding alone, one thread

Both sides read the same files with the same settings (area 0.16 to 1, width over height 3/4 to
4/3, half of them mirrored, bilinear with antialiasing, 224 px, uint8) and as many threads or
worker processes. They take turns within one process. Each rate is the median of its turns; the
ratio is that of the medians. Each input is started before its first turn and idles between turns;
the batches that it made ahead meanwhile are not counted. All files were read before, so that the
disk plays no part. The torch side decodes and crops with Pillow at full size, as torchvision's
loader does. Other work on the machine slows one process with two threads and three processes
differently, so the CPU time of an image, with that of worker processes, is compared too. With
``--shards`` ours reads the images as ``mmljax prepare`` writes them, from an address: TensorFlow's
file system in memory stands for a bucket. That they are copied and opened once is timed apart.
Needs the extra ``peers``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from configs import common
from mmljax.config import DataConfig, from_mapping
from mmljax.data.readers import in_shop_list
from mmljax.data.readers.image_files import list_images
from mmljax.types import Batch, Split

QUALITY = 90  # of the JPEGs that are generated


def generate(folder: Path, *, count: int, side: int) -> None:
    """Write JPEGs of smooth colours under noise, about as many bytes each as a photograph."""
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        coarse = noise.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + noise.normal(0, 6, (side, side, 3))
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(folder / f"{number:05}.jpg", quality=QUALITY)


def sharded(images: Path, folder: Path, file_format: str) -> tuple[Split, float]:
    """The images as a data set that TFDS prepared, at an address, and the seconds to open it."""
    import tensorflow as tf

    from mmljax.data.readers import in_shop_builder, tfds

    layout, prepared, address = folder / "layout", folder / "prepared", "ram://benchmark"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # of the copies
    (layout / "Img").mkdir(parents=True)
    (layout / "Img" / "img").symlink_to(images)
    names = sorted(path.name for path in images.iterdir())
    splits = ["train"] * (len(names) - 2) + ["query", "gallery"]
    items = [*range(len(names) - 1), len(names) - 2]
    rows = (f"img/{n} id_{i:08} {s}" for n, i, s in zip(names, items, splits, strict=True))
    partition = layout / in_shop_list.PARTITION
    partition.parent.mkdir()
    partition.write_text("\n".join([str(len(names)), in_shop_list.HEADER, *rows, ""]))
    in_shop_builder.prepare(layout, prepared, check_counts=False, file_format=file_format)
    for path in filter(Path.is_file, prepared.rglob("*")):
        target = f"{address}/{path.relative_to(prepared).as_posix()}"
        tf.io.gfile.makedirs(os.path.dirname(target))
        tf.io.gfile.copy(str(path), target)
    begin = time.perf_counter()
    train = tfds.read_tfds("in_shop/low", address, check_counts=False).train
    return train, time.perf_counter() - begin


def settings(threads: int, batch_size: int) -> DataConfig:
    """The published augmentation, at the given threads and batch size."""
    mapping = common.get_config()
    mapping.data.threads = threads
    mapping.data.batch_size = batch_size
    mapping.data.images_per_class = 1
    return from_mapping(mapping).data


def our_batches(split: Split, config: DataConfig) -> Iterator[Batch]:
    """Batches of mmljax's pipeline, in host memory."""
    from mmljax.data import pipeline

    return pipeline.train_batches(
        split,
        config=config,
        seed=0,
        steps=range(1_000_000),
        rows=slice(0, config.batch_size),
        place=lambda batch: batch,
    )


class PillowImages:
    """The work of a torch DataLoader's worker: Pillow decodes, crops and mirrors the images.

    The same as torchvision's RandomResizedCrop and RandomHorizontalFlip, without their overhead.
    """

    def __init__(self, paths: list[str], config: DataConfig) -> None:
        self._paths = paths
        self._config = config

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        from PIL import Image

        size = (self._config.image_size, self._config.image_size)
        with Image.open(self._paths[index]) as file:
            image = file.convert("RGB")
        image = image.crop(self._window(*image.size)).resize(size, Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image)

    def _window(self, width: int, height: int) -> tuple[int, int, int, int]:
        least, most = map(math.log, self._config.crop_ratio)
        for _ in range(10):
            area = width * height * random.uniform(*self._config.crop_scale)
            ratio = math.exp(random.uniform(least, most))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side


def torch_batches(split: Split, config: DataConfig) -> Iterator[Any]:
    """Batches of torch's DataLoader, with one worker process for each of our threads."""
    from torch.utils.data import DataLoader, RandomSampler

    images = PillowImages(split.images.tolist(), config)
    sampler = RandomSampler(images, replacement=True, num_samples=1_000_000_000)
    loader = DataLoader(
        images,
        batch_size=config.batch_size,
        sampler=sampler,
        num_workers=config.threads,
        prefetch_factor=2,
        multiprocessing_context="spawn",
    )
    return iter(loader)


def cpu_seconds() -> float:
    """CPU time of this process and of its worker processes so far."""
    total = time.process_time()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == os.getpid():
            total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return total


def rate(
    batches: Iterator[Any], *, ahead: int, batch_size: int, seconds: float
) -> tuple[float, float]:
    """Images per second, and per second of CPU time, of an input that was idle.

    Its ``ahead`` ready batches do not count.
    """
    for _ in itertools.islice(batches, ahead):
        pass
    begin, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while (took := time.perf_counter() - begin) < seconds or not count:
        next(batches)
        count += 1
    return count * batch_size / took, count * batch_size / (cpu_seconds() - cpu)


def compare(split: Split, files: Split, config: DataConfig, *, repeats: int, seconds: float) -> str:
    """A row of the table: images per second of both, the ratio, and that of CPU time.

    Ours reads ``split``, torch the same images as ``files``.
    """
    size = config.batch_size
    sides = {
        "ours": (our_batches(split, config), config.prefetch + 2),
        "torch": (torch_batches(files, config), 2 * config.threads + 1),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for batches, _ in sides.values():
        next(batches)
    for _ in range(repeats):
        for name, (batches, ahead) in sides.items():
            time.sleep(0.5)  # time to make the batches ahead that are not counted
            rates[name].append(rate(batches, ahead=ahead, batch_size=size, seconds=seconds))
    ours, torch = (np.median(rates[name], axis=0) for name in sides)
    turns = np.divide(rates["ours"], rates["torch"])[:, 0]
    return (
        f"{ours[0]:8.0f} | {torch[0]:8.0f} | {ours[0] / torch[0]:5.2f} | "
        f"{turns.min():.2f} to {turns.max():.2f} | {ours[1] / torch[1]:5.2f}"
    )


def compare_parts(split: Split, config: DataConfig, *, repeats: int) -> str:
    """A table of the CPU time of an image in one thread: decoding alone, and all of it."""
    import tensorflow as tf
    from PIL import Image

    for pool in (
        tf.config.threading.set_intra_op_parallelism_threads,
        tf.config.threading.set_inter_op_parallelism_threads,
    ):
        pool(1)
    config = dataclasses.replace(config, threads=1, prefetch=1)
    ours, images = our_batches(split, config), PillowImages(split.images.tolist(), config)
    order, size = itertools.cycle(range(len(images))), config.batch_size

    def decode(path: tf.Tensor) -> tf.Tensor:
        return tf.io.decode_jpeg(tf.io.read_file(path), 3, dct_method="INTEGER_ACCURATE")[0, 0]

    paths = tf.data.Dataset.from_tensor_slices(split.images.tolist()).repeat()
    decoded = iter(paths.map(decode).batch(size))
    work: dict[str, Callable[[], Any]] = {
        "TensorFlow decodes": lambda: next(decoded),
        "Pillow decodes": lambda: [
            Image.open(split.images[next(order)]).convert("RGB") for _ in range(size)
        ],
        "mmljax, all": lambda: next(ours),
        "Pillow, all, no DataLoader": lambda: [images[next(order)] for _ in range(size)],
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, call in work.items():
            begin = time.process_time()
            call()
            time.sleep(2.0)  # tf.data and mmljax make a batch ahead for the one that was taken
            times[name].append((time.process_time() - begin) / size * 1e6)
    rows = (f"| {name} | {statistics.median(took[1:]):.0f} |" for name, took in times.items())
    return "\n".join(["| part | us of CPU time per image |", "|---|---|", *rows])


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder of JPEGs to time too")
    parser.add_argument("--side", type=int, default=256, help="of the generated images, pixels")
    parser.add_argument("--count", type=int, default=2_000, help="of the generated images")
    parser.add_argument("--shards", choices=("tfrecord", "array_record"))
    parser.add_argument("--parts", action="store_true", help="time one thread's parts instead")
    parser.add_argument("--threads", type=int, default=2, help="and worker processes of torch")
    parser.add_argument("--batch-size", type=int, default=180)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    options = parser.parse_args()
    if options.shards and options.images:
        parser.error("--shards takes the generated images alone; leave out --images")
    config = settings(options.threads, options.batch_size)
    print(f"{describe()}; {options.threads} threads, batches of {options.batch_size}")
    if not options.parts:
        print(
            "| images | bytes each | ours, images/s | torch, images/s | ratio | of the turns | "
            "of CPU time |\n|---|---|---|---|---|---|---|"
        )
    with tempfile.TemporaryDirectory() as folder:
        images = os.path.join(folder, "images")
        generate(Path(images), count=options.count, side=options.side)
        for path in (images, options.images) if options.images else (images,):
            split = list_images([path], flag="--images")
            split = split._replace(labels=np.arange(len(split.labels), dtype=np.int32))
            if options.parts:
                print(compare_parts(split, config, repeats=options.repeats))
                continue
            size = statistics.mean(len(Path(image).read_bytes()) for image in split.images)
            what = f"generated, {options.side} px" if path == images else os.path.basename(path)
            ours = split
            if options.shards:
                ours, took = sharded(Path(path), Path(folder), options.shards)
                what += f", {options.shards}, opened in {took:.1f} s"
            row = compare(ours, split, config, repeats=options.repeats, seconds=options.seconds)
            print(f"| {len(split.images)}, {what} | {size:.0f} | {row} |")


if __name__ == "__main__":
    main()

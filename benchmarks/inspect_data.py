"""How many planted faults ``mmljax inspect`` finds: near copies of images, and wrong labels.

    python -m benchmarks.inspect_data --photographs photos

Of the photographs, a folder per item (``train/`` and ``test/`` are put together), 2 % get a near
copy in an item drawn at random: cut by up to 5 % a side, resized by up to 30 %, brightened or
darkened by up to 15 %, written as JPEG of quality 60 to 90. 5 % of the others are moved into
another item.

Pairs of near copies without a planted one are not counted as wrong: some photographs of one thing
are near copies. Images of pairs in two items are listed as such, and their labels are not judged;
so moved images among them are left out of the recall of labels, and are counted in a figure beside
it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageEnhance

from benchmarks.machine import describe
from mmljax.cli.inspect import PRECISION
from mmljax.config import load_config
from mmljax.inference.baseline import make_pretrained_embed
from mmljax.inference.inspect_data import Finding, Images, Seen, compare, see
from mmljax.mesh import make_mesh
from mmljax.retrieval.suspects import SuspectLabels
from mmljax.types import Dataset, Split

COPIES, WRONG = 0.02, 0.05


def gather(photographs: Path) -> list[tuple[str, Path]]:
    """Item and file of each photograph."""
    return sorted((path.parent.name, path) for path in photographs.rglob("*.jpg"))


def near_copy(path: Path, random: np.random.Generator) -> Image.Image:
    """A photograph, cut, resized and brightened."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    left, top, right, bottom = random.uniform(0, 0.05, 4) * (width, height, width, height)
    image = image.crop((int(left), int(top), int(width - right), int(height - bottom)))
    factor = random.uniform(0.7, 1.3)
    image = image.resize([max(8, round(side * factor)) for side in image.size])
    return ImageEnhance.Brightness(image).enhance(random.uniform(0.85, 1.15))


class Planted(NamedTuple):
    """Photographs and copies of some of them, under labels of which some are wrong."""

    paths: list[Path]
    labels: Int[np.ndarray, " n"]
    copies: dict[int, int]  # by row of a copy, the row of its original
    moved: set[int]  # rows


def plant(photographs: list[tuple[str, Path]], folder: Path, *, seed: int) -> Planted:
    """Write near copies of some photographs, and move others into another item."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    items, labels = np.unique([item for item, _ in photographs], return_inverse=True)
    order = random.permutation(len(photographs))
    copied, moved = np.split(order, [round(COPIES * len(order))])
    moved = moved[: round(WRONG * len(order))]
    other = (labels + random.integers(1, len(items), len(labels))) % len(items)
    labels[moved] = other[moved]
    paths, of_copies = [path for _, path in photographs], []
    for row in copied.tolist():
        paths.append(folder / f"{row}.jpg")
        of_copies.append(random.integers(len(items)))
        quality = int(random.integers(60, 91))
        near_copy(photographs[row][1], random).save(paths[-1], quality=quality)
    copies = dict(enumerate(copied.tolist(), start=len(labels)))
    return Planted(paths, np.append(labels, of_copies), copies, set(moved.tolist()))


def found_in(
    planted: list[Planted],
) -> Iterator[tuple[list[Finding], SuspectLabels | None]]:
    """What ``mmljax inspect`` finds in each; every file is decoded once."""
    paths = list(dict.fromkeys(path for one in planted for path in one.paths))
    names = np.array([str(path) for path in paths])
    split = Split(names, np.zeros(len(names), np.int32), names)
    config = load_config("finetune", [])
    dataset = Dataset(train=split, query=split, gallery=None, classes=1)
    seen = see(split, config, make_pretrained_embed(config, dataset, make_mesh()))
    places = {path: place for place, path in enumerate(paths)}
    for one in planted:
        rows = np.array([places[path] for path in one.paths])
        numbers = np.arange(len(rows))
        split = Split(names[rows], one.labels, numbers.astype(str))
        taken = Seen(numbers, seen.vectors[rows], seen.pictures[rows], [])
        yield compare(Images(split, np.zeros(len(rows), int)), taken, precision=PRECISION)


def scores(planted: Planted, findings: list[Finding]) -> dict[str, float]:
    """Recall and precision of both kinds of findings."""
    of_copies = [f.rows for f in findings if f.reason.startswith("copy")]
    across = {row for f in findings if f.reason == "copy in another item" for row in f.rows}
    pairs = {frozenset(rows) for rows in of_copies}
    expected = {frozenset(rows) for rows in planted.copies.items()}
    with_copy = {pair for pair in pairs if pair & planted.copies.keys()}
    right = expected & pairs
    labels = {f.rows[0] for f in findings if f.reason == "label"}
    wrong = len(labels & planted.moved)
    return {
        "copies: recall": len(right) / len(expected),
        "precision": len(right) / max(1, len(with_copy)),
        "copy listed": sum(rows in planted.copies.items() for rows in of_copies) / len(expected),
        "other pairs": len(pairs - with_copy),
        "labels: recall": wrong / len(planted.moved - across),
        "recall with those in pairs": wrong / len(planted.moved),
        "precision of labels": wrong / max(1, len(labels)),
    }


def main() -> None:
    """Print a row of recall and precision per seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print(describe())
    photographs = gather(options.photographs)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        planted = [
            plant(photographs, Path(folder) / str(seed), seed=seed) for seed in range(options.seeds)
        ]
        for seed, (one, (findings, suspects)) in enumerate(
            zip(planted, found_in(planted), strict=True)
        ):
            rows.append(scores(one, findings))
            _show(f"seed {seed}", rows[-1])
            if suspects is not None:
                print(f"estimated share of wrong labels {suspects.wrong:.4f}", flush=True)
    _show("mean", {name: float(np.mean([row[name] for row in rows])) for name in rows[0]})


def _show(title: str, row: dict[str, float]) -> None:
    print(title, ", ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()

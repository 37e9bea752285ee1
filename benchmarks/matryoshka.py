"""What fewer dimensions cost, with and without Matryoshka training: linear heads on features.

    mmljax features --config finetune --config.data.directory=photos --output photos.features
    python -m benchmarks.matryoshka --set foods --features photos.features --out OUT

Rows of ten seeds each: ``plain`` trains the whole embedding alone and cuts it afterwards,
``matryoshka`` also trains its half, quarter and eighth, ``half`` the half alone. All else is equal:
the recipe ``heads``, its three objectives, and the same rates. The table has Recall@1 of the first
dimensions, and its paired differences to all dimensions of ``plain`` and of the same training.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import mmljax
from benchmarks import machine
from benchmarks.ablation import apply, rates
from benchmarks.ablation_table import difference
from benchmarks.pretrained_ablation import SETS
from mmljax.config import Config, from_mapping
from mmljax.training.sweep import Run, sweep

SEEDS = 10
PARTS = (8, 4, 2, 1)
"""The sizes, as parts of the whole embedding."""

ROWS = {"plain": (0.0, 0.0, 0.0, 1.0), "half": (0.0, 0.0, 1.0, 1.0), "matryoshka": ()}
"""The weights of the sizes; a size of weight 0 is evaluated and has no part in training."""


def make_config(options: argparse.Namespace, weights: tuple[float, ...], *, seed: int) -> Config:
    """The config of one run."""
    config = mmljax.default_config("heads")
    config.evaluation.update(recall_at=(1,), untrained=False, geometry=False)
    config.log.update(plot=False, tensorboard=False)
    chosen = SETS[options.set] | rates(options.rate, 10 * options.rate)
    chosen = chosen | {"data.directory": str(options.features)}
    with config.unlocked():
        for key, value in chosen.items():
            apply(config, key, value)
    made = from_mapping(config)
    model = dataclasses.replace(
        made.model,
        embedding_size=options.size,
        matryoshka=sizes(options),
        matryoshka_weights=weights,
    )
    return dataclasses.replace(made, seed=seed, model=model)


def sizes(options: argparse.Namespace) -> tuple[int, ...]:
    """The whole embedding, its half, quarter and eighth, in rising order."""
    return tuple(options.size // part for part in PARTS)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", required=True, choices=SETS)
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512, help="of the whole embedding")
    parser.add_argument("--rate", type=float, default=1e-3, help="of the head; proxies: ten times")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    scores: dict[str, dict[int, Any]] = {}
    for name, weights in ROWS.items():
        runs = [
            Run(name, make_config(options, weights, seed=seed), options.out / f"{name}-{seed}")
            for seed in range(SEEDS)
        ]
        found = sweep(runs, options.out / name)
        scores[name] = {row["seed"]: row["scores"] for row in found}
    print(f"{options.set}: head rate {options.rate:g}, {SEEDS} seeds; {machine.describe()}\n")
    print("| dimensions | training | R@1 % | difference to all, plain | to all, same training |")
    print("|---|---|---|---|---|")
    for size in reversed(sizes(options)):
        key = "recall@1" if size == options.size else f"recall@1@{size}"
        for name, by_seed in scores.items():
            print(f"| {size} | {name} | {' | '.join(cells(by_seed, scores['plain'], key))} |")


def cells(by_seed: dict[int, Any], plain: dict[int, Any], key: str) -> list[str]:
    """The mean of a score, and its differences to Recall@1 of plain and of the same training."""
    cut = {seed: {"recall@1": row[key]} for seed, row in by_seed.items()}
    mean = sum(row["recall@1"] for row in cut.values()) / len(cut)
    compared = (difference(cut, other, "recall@1") for other in (plain, by_seed))
    return [f"{100 * mean:.1f}", *compared]


if __name__ == "__main__":
    main()

"""What the ablation's records say: the chosen settings, and the table of the test runs."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

METRICS = ("recall@1", "map@r")
SELECT_BY = "map@r"  # the less noisy of the two
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # n: t 97.5 %

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """Records so far: of a file, or of ``FILE.gz`` as ``benchmarks/results`` keeps them."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        return [json.loads(line) for line in gzip.open(packed, "rt")]
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(record: Record) -> tuple[str, bool, str, int]:
    """What tells one run from another."""
    setting = json.dumps(record["setting"], sort_keys=True)
    return record["row"], record["tuning"], setting, record["seed"]


def choose(records: list[Record]) -> dict[str, Any]:
    """Of each row that was tuned, the setting that validated best, as a mean over its seeds."""
    return {row: setting for row, (_, setting) in _validated(records).items()}


def validation_scores(records: list[Record]) -> dict[str, float]:
    """Of each row that was tuned, the mean score of its best setting."""
    return {row: score for row, (score, _) in _validated(records).items()}


def best_single(records: list[Record]) -> str:
    """The single objective that validated best."""
    scores = validation_scores([r for r in records if r["group"] == "single"])
    return max(scores, key=scores.__getitem__)


def _validated(records: list[Record]) -> dict[str, tuple[float, dict[str, Any]]]:
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        if record["tuning"]:
            setting = json.dumps(record["setting"])
            scores[record["row"], setting].append(record[SELECT_BY])
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for (row, setting), found in scores.items():
        mean = sum(found) / len(found)
        if row not in best or mean > best[row][0]:
            best[row] = mean, json.loads(setting)
    return best


def add_table_command(commands: Any) -> None:
    """Add ``table`` to the commands of a study's command line."""
    table = commands.add_parser("table")
    table.add_argument("--out", type=Path, required=True)
    table.add_argument("--reference", help="row to compare with, not the best single objective")
    table.set_defaults(function=lambda options: print(markdown(options.out, options.reference)))


def markdown(directory: Path, reference: str | None = None) -> str:
    """The table of the test runs, each row beside the best single objective, paired by seed."""
    records = read(directory / "results.jsonl")
    reference = reference or best_single(records)
    scores: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        if not record["tuning"]:
            scores[record["row"]][record["seed"]] = record
    lines = [
        f"Compared with: {reference}.",
        "",
        "| row | tuned | R@1 % | difference | MAP@R % | difference | shares |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, by_seed in scores.items():
        cells = []
        for metric in METRICS:
            values = 100 * np.array([by_seed[seed][metric] for seed in sorted(by_seed)])
            cells.append(f"{values.mean():.1f} ± {values.std(ddof=1):.1f}")
            cells.append(difference(by_seed, scores[reference], metric))
        first = by_seed[min(by_seed)]
        setting = dict(first["setting"])
        if not any(v for k, v in first.get("ledger", {}).items() if k.startswith("share_proxies/")):
            setting.pop("optimizer.proxies.learning_rate", None)  # nothing trains the proxies
        cells.append(describe_shares(list(by_seed.values())))
        lines.append(f"| {row} | {describe(setting)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_shares(records: list[Record]) -> str:
    """Each objective's share of the gradient at the embeddings and at the proxies, in per cent."""
    found = []
    for place, short in (("embeddings", "X"), ("proxies", "P")):
        prefix = f"share_{place}/"
        names = [key for key in records[0].get("ledger", {}) if key.startswith(prefix)]
        if len(names) < 2:
            continue
        means = {key: 100 * np.mean([r["ledger"][key] for r in records]) for key in names}
        shown = [f"{k.removeprefix(prefix)} {v:.0f}" for k, v in means.items() if 0.5 <= v < 99.5]
        if shown:
            found.append(f"{short}: {', '.join(shown)}")
    return "; ".join(found)


def difference(one: dict[int, Record], other: dict[int, Record], metric: str) -> str:
    """Mean of the paired differences in points, with its 95 % interval (Student's t)."""
    seeds = sorted(one.keys() & other.keys())
    values = 100 * np.array([one[s][metric] - other[s][metric] for s in seeds])
    if not values.any():
        return "0"
    half = STUDENT[len(seeds)] * values.std(ddof=1) / len(seeds) ** 0.5
    return f"{values.mean():+.1f} [{values.mean() - half:+.1f}, {values.mean() + half:+.1f}]"


def describe(setting: dict[str, Any]) -> str:
    """A setting in short: the last part of each key, or the mining margin of objectives."""
    parts = []
    for key, value in setting.items():
        if key == "optimizer.backbone.learning_rate":  # that of the head, or of both
            continue
        if key == "objectives":
            parts.append(f"margin {value['pair']['mining_params']['margin']}")
        elif isinstance(value, dict):
            shown = ", ".join(f"{name} {number:.3g}" for name, number in value.items())
            parts.append(f"{key.split('.')[-1]} ({shown})")
        else:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            parts.append(f"{key.split('.', 1)[-1].replace('learning_rate', 'rate')} {shown}")
    return ", ".join(parts)

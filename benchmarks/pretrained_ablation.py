"""Which objectives, combination, mining and batches, on a pretrained network: a paired study.

    mmljax features --config finetune --config.data.directory=photos --output photos.features
    python -m benchmarks.pretrained_ablation heads --set foods --features photos.features --out OUT
    python -m benchmarks.pretrained_ablation finetune --set foods --photographs photos --out OUT
    python -m benchmarks.pretrained_ablation table --out OUT

``heads`` trains linear heads of 128 dimensions on the features of EfficientNet-Lite0, ten seeds of
each row side by side. Each row is tuned beforehand: every candidate of its settings trains with two
other seeds on the first three quarters of the training classes and is scored on the rest, by
MAP@R. The test classes play no part in it. Later rows build on what earlier ones chose.

``finetune`` trains the whole network with the settings that ``heads`` chose, five seeds of the rows
that matter. It takes hours. Both append to ``results.jsonl`` as results come; an interrupted study
resumes. ``benchmarks/results`` keeps what docs/ablation.md shows: name a folder of it as ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import mmljax
from benchmarks import ablation_table
from benchmarks.ablation import Overrides, Row, apply, objective, rates, shares, single
from mmljax.config import Config, from_mapping
from mmljax.runs.writer import read_metrics, read_results
from mmljax.training.loop import train
from mmljax.training.sweep import Run, sweep

SEEDS, TUNING_SEEDS = range(10), (100, 101)
STAGES = ("single", "combination", "mining", "batches", "changes")
MEANS: Overrides = {"proxies_init": "class_means"}

SETS: dict[str, Overrides] = {
    "foods": {"data.images_per_class": 2},
    "groceries": {"data.images_per_class": 4},
    "omniglot": {
        "data.images_per_class": 4,
        "data.batch_size": 128,
        "data.image_size": 112,
        "data.resize_size": 112,
        "data.flip": False,
        "data.crop_scale": (0.6, 1.0),
        "data.rotate": 10.0,
    },
}
"""What differs between the sets: two to five photographs of a dish, dozens of a product, 20 of a
character."""

WHOLE_SETS: dict[str, Overrides] = {
    "foods": {"data.source": "folder"},
    "groceries": {"data.source": "in_shop"},
    "omniglot": {"data.source": "arrays"},
}
"""How the images of a set are read."""


def tuned(*settings: Overrides, proxies: Iterable[float] = (10.0,)) -> list[Overrides]:
    """Every setting with four learning rates of the head, and of the proxies as multiples."""
    return [
        setting | rates(rate, factor * rate)
        for setting in settings
        for rate in (1e-4, 3e-4, 1e-3, 3e-3)
        for factor in proxies
    ]


def single_rows() -> dict[str, Row]:
    """Each objective alone; of proxy objectives also the start of the proxies is open."""

    def pair(loss: str, *settings: Overrides, rule: str = "none") -> Row:
        return single(loss, *tuned(*settings), rule=rule)

    def proxy(loss: str, *settings: Overrides, **more: Any) -> Row:
        row = single(loss, *tuned(*settings, proxies=(1.0, 10.0)), **more)
        random = row.settings[: len(row.settings) // len(settings)]
        return row._replace(settings=[*random, *(setting | MEANS for setting in row.settings)])

    return {
        "multi_similarity": pair(
            "multi_similarity", {}, {"base": 0.7}, {"beta": 20.0}, {"alpha": 10.0, "base": 0.7}
        ),
        "multi_similarity, mined": pair(
            "multi_similarity", {}, {"base": 0.7}, {"beta": 20.0}, rule="sample"
        ),
        "contrastive": pair("contrastive", {"negative_margin": 0.3}, {"negative_margin": 0.5}),
        "triplet_semihard": pair("triplet_semihard", {"margin": 0.1}, {"margin": 0.2}),
        "margin": pair("margin", {"beta": 0.8}, {"beta": 1.0}, rule="distance_weighted"),
        "circle": pair("circle", {"gamma": 40.0}, {"margin": 0.25, "gamma": 40.0}),
        "supcon": pair("supcon", {"temperature": 0.05}, {"temperature": 0.1}),
        "smooth_ap": pair("smooth_ap", {"temperature": 0.03}, {"temperature": 0.1}),
        "proxy_anchor": proxy("proxy_anchor", {}, {"alpha": 16.0}, {"alpha": 8.0}),
        "proxy_nca_pp": proxy("proxy_nca_pp", {"temperature": 0.1}, {"temperature": 0.2}),
        "cosface": proxy("cosface", {"scale": 16.0, "margin": 0.1}, {"scale": 32.0, "margin": 0.1}),
        "soft_triple": proxy("soft_triple", {}, {"scale": 10.0}, centers=2),
    }


def is_proxy(row: Row) -> bool:
    """Whether a single objective has proxies: then their start is open."""
    return any("proxies_init" in setting for setting in row.settings)


def together(
    objectives: dict[str, Overrides], combination: str, *settings: Overrides, **more: Any
) -> Row:
    """Several objectives under one combination, tuned over its open values and the rates."""
    start = {"pair": 1.0, "proxy": 0.03, "separation": 0.3}
    base = {
        "objectives": objectives,
        "combination.name": combination,
        "weights": {name: start[name] for name in objectives},
        **more,
    }
    return Row("combination", base, tuned(*(settings or ({},))))


def three(**mining: Any) -> dict[str, Overrides]:
    """The objectives of the method, the pair objective mined by a rule."""
    return {
        "pair": objective("multi_similarity", **mining),
        "proxy": objective("proxy_anchor"),
        "separation": objective("nearest_proxy"),
    }


def losses_of(chosen: dict[str, Overrides]) -> Overrides:
    """The hyperparameters of every loss as it was tuned alone."""
    return {
        key: value
        for name in single_rows().keys() & chosen.keys() - {"multi_similarity, mined"}
        for key, value in chosen[name].items()
        if key.startswith("losses.")
    }


def best_of(scores: dict[str, float], *, proxies: bool) -> str:
    """The single objective of one kind that validated best."""
    names = [name for name, row in single_rows().items() if is_proxy(row) == proxies]
    return max((name for name in names if name in scores), key=scores.__getitem__)


def combination_rows(chosen: dict[str, Overrides], scores: dict[str, float]) -> dict[str, Row]:
    """Two objectives and three, under every combination; then those that are best alone."""
    all_three = three()
    alone = single_rows()
    pair, proxy = (alone[best_of(scores, proxies=kind)] for kind in (False, True))
    best = {
        "pair": pair.base["objectives"]["only"],
        "proxy": proxy.base["objectives"]["only"],
    }
    best_three = best | {"separation": all_three["separation"]}
    more = MEANS | {key: proxy.base[key] for key in ("centers",) if key in proxy.base}
    two = {name: all_three[name] for name in ("pair", "proxy")}
    of_pair = [shares(a, None) for a in (0.95, 0.9, 0.8, 0.5)]
    targets = [shares(a, b) for a in (0.9, 0.8, 0.5) for b in (0.02, 0.1)]
    weights = [
        {"weights": {"pair": 1.0, "proxy": a, "separation": b}}
        for a in (0.03, 0.1, 0.3)
        for b in (0.003, 0.03, 0.3)
    ]
    rows = {
        "pair + proxy, random proxies": together(two, "share", *of_pair),
        "pair + proxy": together(two, "share", *of_pair, **MEANS),
        "all, tuned weights": together(all_three, "fixed", *weights, **MEANS),
        "all, uncertainty": together(
            all_three,
            "uncertainty",
            *({"combination.params.cap": c} for c in (10.0, 100.0)),
            **MEANS,
        ),
        "all, gradnorm": together(
            all_three, "gradnorm", *({"combination.params.alpha": a} for a in (0.5, 1.5)), **MEANS
        ),
        "all, share": together(all_three, "share", *targets, **MEANS),
        "all, random": together(all_three, "random", **MEANS),
        "best pair + best proxy": together(best, "share", *of_pair, **more),
        "best pair, best proxy, separation": together(best_three, "share", *targets, **more),
    }
    return {name: row._replace(base=losses_of(chosen) | row.base) for name, row in rows.items()}


def _on(row: Row, setting: Overrides, group: str, settings: list[Overrides]) -> Row:
    """A row with its chosen setting, and something else open."""
    return Row(group, row.base | setting, settings)


def mining_rows(chosen: dict[str, Overrides], scores: dict[str, float]) -> dict[str, Row]:
    """Rules for pairs on the three objectives under learned shares."""
    base, setting = combination_rows(chosen, scores)["all, share"], chosen["all, share"]
    return {
        rule: _on(
            base,
            setting,
            "mining",
            [{"objectives": three(rule=rule, margin=margin)} for margin in (0.1, 0.4)],
        )
        for rule in ("sample", "proxy", "either", "both")
    }


def batch_rows(chosen: dict[str, Overrides], scores: dict[str, float]) -> dict[str, Row]:
    """Composed batches: for three objectives by each rule, for fewer by the best of the rules."""

    def open_values(*rules: str) -> list[Overrides]:
        return [
            {
                "data.composition.rule": rule,
                "data.composition.share": share,
                "data.composition.group": group,
            }
            for rule in rules
            for share in (0.2, 0.5)
            for group in (4, 16)
        ]

    rows = single_rows() | combination_rows(chosen, scores)
    found = {
        f"all, share, batches {rule}": _on(
            rows["all, share"], chosen["all, share"], "batches", open_values(rule)
        )
        for rule in ("proxy", "sample", "either")
    }
    found["pair + proxy, batches"] = _on(
        rows["pair + proxy"], chosen["pair + proxy"], "batches", open_values("proxy", "either")
    )
    found["multi_similarity, batches"] = _on(
        rows["multi_similarity"], chosen["multi_similarity"], "batches", open_values("sample")
    )
    found["proxy_anchor, batches"] = _on(
        rows["proxy_anchor"], chosen["proxy_anchor"], "batches", open_values("proxy")
    )
    return found


def change_rows(chosen: dict[str, Overrides], scores: dict[str, float]) -> dict[str, Row]:
    """Changes of the method that the ledgers of the first rows suggested."""
    rows = combination_rows(chosen, scores)
    strong = [shares(a, b) for a in (0.9, 0.8) for b in (0.3, 0.5)]
    caps = [{"combination.params.cap": cap} for cap in (10.0, 100.0)]
    composed = [
        {
            "data.composition.rule": rule,
            "data.composition.share": share,
            "data.composition.group": 4,
        }
        for rule in ("proxy", "either")
        for share in (0.2, 0.5)
    ]
    best = rows["best pair, best proxy, separation"]
    uncertain = {"combination.name": "uncertainty"}
    return {
        "all, share, strong separation": rows["all, share"]._replace(
            group="changes", settings=tuned(*strong)
        ),
        "best three, uncertainty": best._replace(
            group="changes", base=best.base | uncertain, settings=tuned(*caps)
        ),
        "all, uncertainty, batches": _on(
            rows["all, uncertainty"], chosen["all, uncertainty"], "changes", composed
        ),
    }


ROWS: dict[str, Callable[[dict[str, Overrides], dict[str, float]], dict[str, Row]]] = {
    "single": lambda chosen, scores: single_rows(),
    "combination": combination_rows,
    "mining": mining_rows,
    "batches": batch_rows,
    "changes": change_rows,
}


def make_config(recipe: str, row: Row, setting: Overrides, own: Overrides, *, seed: int) -> Config:
    """The config of one run; ``own`` belongs to the data set."""
    config = mmljax.default_config(recipe)
    config.seed = seed
    config.model.embedding_size = 128
    config.evaluation.update(recall_at=(1,), untrained=False, geometry=False)
    config.log.update(plot=False, tensorboard=False)
    overrides = own | row.base | setting
    with config.unlocked():
        config.objectives = ConfigDict(overrides.pop("objectives"))
        for key, value in overrides.items():
            apply(config, key, value)
    return from_mapping(config)


def make_tuning_set(features: Path, target: Path) -> None:
    """Features of the training classes: three quarters train, the others search each other."""
    if (target / "features.json").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    identity = json.loads((features / "features.json").read_text())
    images, rows = np.load(features / "images.npz"), np.load(features / "train.npy", mmap_mode="r")
    labels, names = images["train labels"], images["train names"]
    last = 3 * identity["classes"] // 4
    fits = labels < last
    np.save(target / "train.npy", rows[:, fits])
    np.save(target / "query.npy", rows[:1, ~fits])
    arrays: Any = {
        f"{split} {key}": array[kept]
        for split, kept in (("train", fits), ("query", ~fits))
        for key, array in (("labels", labels), ("names", names))
    }
    np.savez(target / "images.npz", **arrays)
    views = {"train": identity["views"]["train"], "query": 1}
    whole = identity | {"classes": last, "views": views}
    (target / "features.json").write_text(json.dumps(whole))


def record_of(name: str, row: Row, setting: Overrides, seed: int, run: Path, **more: Any) -> Any:
    """The scores of a run, and its ledger's shares over the last fifth of its steps."""
    scores = (read_results(run) or {})["scores"]
    ledger = [r for r in read_metrics(run) if r["kind"] == "train"]
    last = ledger[-max(len(ledger) // 5, 1) :]
    kept = [key for key in last[0] if key.startswith(("share_", "weight/", "conflict"))]
    return {
        "row": name,
        "group": row.group,
        "setting": setting,
        "seed": seed,
        "recall@1": round(scores["recall@1"], 6),
        "map@r": round(scores["map@r"], 6),
        "ledger": {key: round(float(np.mean([r[key] for r in last])), 4) for key in kept},
        **more,
    }


class Study:
    """The results so far, and the next ones."""

    def __init__(self, out: Path) -> None:
        """Continue what ``out`` has."""
        out.mkdir(parents=True, exist_ok=True)
        self.out, self._path = out, out / "results.jsonl"

    @property
    def records(self) -> list[Any]:
        """All results."""
        return ablation_table.read(self._path)

    def chosen(self) -> dict[str, Overrides]:
        """The setting of each row that validated best."""
        return ablation_table.choose(self.records)

    def scores(self) -> dict[str, float]:
        """The validation score of each row's chosen setting."""
        return ablation_table.validation_scores(self.records)

    def missing(
        self, name: str, settings: Iterable[Overrides], seeds: Iterable[int], *, tuning: bool
    ) -> list[tuple[Overrides, int]]:
        """Which settings and seeds of a row have no result."""
        done = {ablation_table.key(record) for record in self.records}
        probe = {"row": name, "tuning": tuning}
        return [
            (setting, seed)
            for setting in settings
            for seed in seeds
            if ablation_table.key({**probe, "setting": setting, "seed": seed}) not in done
        ]

    def add(self, record: Any) -> None:
        """Keep a result and print it."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{'tune' if record['tuning'] else 'test'} {record['row']:<30}{record['seed']:>4} "
            f"R@1 {100 * record['recall@1']:5.1f} MAP@R {100 * record['map@r']:5.1f} "
            f"{record['setting']}",
            flush=True,
        )


def heads(options: argparse.Namespace) -> None:
    """All stages, in order: tune, choose, train the chosen setting with every seed."""
    study = Study(options.out)
    tuning_set = options.out / "tuning.features"
    make_tuning_set(options.features, tuning_set)

    def finish(name: str, row: Row, settings: list[Overrides], *, tuning: bool) -> None:
        seeds = TUNING_SEEDS if tuning else SEEDS
        left = study.missing(name, settings, seeds, tuning=tuning)
        if not left:
            return
        runs = options.out / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        features = tuning_set if tuning else options.features
        own = SETS[options.set] | {"data.directory": str(features)}
        found = sweep(
            [
                Run("", make_config("heads", row, setting, own, seed=seed), runs / str(i))
                for i, (setting, seed) in enumerate(left)
            ],
            runs,
        )
        for i, ((setting, seed), result) in enumerate(zip(left, found, strict=True)):
            if "error" in result:  # a setting that diverges is not chosen
                print(f"{name} {setting}: {result['error']}", flush=True)
                continue
            study.add(record_of(name, row, setting, seed, runs / str(i), tuning=tuning))
        shutil.rmtree(runs)

    for stage in options.stages:
        for name, row in ROWS[stage](study.chosen(), study.scores()).items():
            if options.rows and name not in options.rows:
                continue
            finish(name, row, row.settings, tuning=True)
            finish(name, row, [study.chosen()[name]], tuning=False)


def finetune(options: argparse.Namespace) -> None:
    """The whole network, with the settings of the heads; the rates are those of the recipe."""
    study, whole = Study(options.out), Study(options.out / "finetune")
    chosen = study.chosen()
    scores = study.scores()
    rows = {
        **single_rows(),
        **combination_rows(chosen, scores),
        **batch_rows(chosen, scores),
        **change_rows(chosen, scores),
    }
    pair, proxy = (best_of(scores, proxies=kind) for kind in (False, True))
    composed = max((n for n in rows if n.startswith("all, share, b")), key=scores.__getitem__)
    names = [pair, proxy, "multi_similarity", "pair + proxy", "all, share", "all, uncertainty"]
    names += [composed]
    for seed in range(options.seeds):  # seed by seed, so that an unfinished study is paired too
        for name in dict.fromkeys(names):
            setting = {k: v for k, v in chosen[name].items() if not k.startswith("optimizer.")}
            if not whole.missing(name, [setting], [seed], tuning=False):
                continue
            base = {k: v for k, v in rows[name].base.items() if not k.startswith("optimizer.")}
            row = rows[name]._replace(base=base)
            own = SETS[options.set] | WHOLE_SETS[options.set]
            own = own | {
                "data.directory": str(options.photographs),
                "data.image_size": options.image_size,
                "data.resize_size": options.image_size,
                "duration": f"{options.steps} steps",
                "optimizer.warmup": f"{options.steps // 4} steps",
                "evaluation.every": f"{options.steps} steps",
            }
            config = make_config("finetune", row, setting, own, seed=seed)
            run = whole.out / "runs" / f"{name}-{seed}"
            train(config, run)
            whole.add(record_of(name, row, setting, seed, run, tuning=False))
            shutil.rmtree(run)


def main() -> None:
    """Run the study or print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function, source in ((heads, "--features"), (finetune, "--photographs")):
        study = commands.add_parser(function.__name__)
        study.add_argument("--set", required=True, choices=SETS)
        study.add_argument(source, type=Path, required=True)
        study.add_argument("--out", type=Path, required=True)
        study.set_defaults(function=function)
        if function is heads:
            study.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
            study.add_argument("--rows", nargs="+", help="only these")
        else:
            study.add_argument("--image-size", type=int, default=96)
            study.add_argument("--steps", type=int, default=100)
            study.add_argument("--seeds", type=int, default=5)
    ablation_table.add_table_command(commands)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    sys.exit(main())

"""Which objectives, which combination, which mining: a paired study with tuned rows.

    python -m benchmarks.ablation run --data omniglot_background_56.npz --out runs/ablation
    python -m benchmarks.ablation table --out runs/ablation

Every row of the table trains the same small network on the same batches for the same number of
steps, five times with other seeds, and is scored after its last step on classes it has never seen.
What a row leaves open is tuned beforehand: each of its settings trains once on the first three
quarters of the training alphabets and is scored on the rest; the test classes play no part in it.
Later rows build on what earlier ones chose: combinations take the pair and the proxy objective
that validated best, mining takes the combination that did. ``--data grocery_inshop.zip`` runs
fewer rows on photographs.

Results are appended to ``results.jsonl`` as they come; an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import mmljax
from benchmarks import ablation_table

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
STAGES = ("single", "combination", "mining", "changes")
Overrides = dict[str, Any]


class Row(NamedTuple):
    """One row of the table: what is trained, and what of it is open."""

    group: str  # which part of the table
    base: Overrides  # by dotted key
    settings: list[Overrides]  # candidates, at least one


def objective(loss: str, *, rule: str = "none", **mining_params: float) -> Overrides:
    """One row of ``config.objectives``; hyperparameters follow as ``losses.LOSS.NAME``."""
    row = mmljax.Objective(loss, mining=rule, mining_params=mining_params)
    return dataclasses.asdict(row)


def single(loss: str, *settings: Overrides, rule: str = "none", **more: Any) -> Row:
    """One objective alone; a key without a dot is one of its hyperparameters."""
    base = {
        "objectives": {"only": objective(loss, rule=rule)},
        "combination.name": "fixed",
        **more,
    }
    return Row(
        "single",
        base,
        [{k if "." in k else f"losses.{loss}.{k}": v for k, v in s.items()} for s in settings],
    )


def rates(network: float, proxies: float) -> Overrides:
    """Learning rates."""
    return {
        "optimizer.backbone.learning_rate": network,
        "optimizer.head.learning_rate": network,
        "optimizer.proxies.learning_rate": proxies,
    }


SLOW = rates(0.01, 0.01)  # a third of the rate that a few trials of Multi-Similarity settled on
QUICK_PROXIES = rates(0.01, 0.05)

PAIR = {
    "multi_similarity": single(
        "multi_similarity", {}, {"base": 0.7}, {"alpha": 10.0, "base": 0.7}, {"beta": 20.0}, SLOW
    ),
    "multi_similarity, mined": single(
        "multi_similarity", {}, {"base": 0.7}, {"beta": 20.0}, SLOW, rule="sample"
    ),
    "contrastive": single(
        "contrastive", {}, {"negative_margin": 0.3}, {"negative_margin": 0.7}, SLOW
    ),
    "triplet_hard": single("triplet_hard", {}, {"margin": 0.2}, {"margin": 0.4}, SLOW),
    "triplet_semihard": single("triplet_semihard", {}, {"margin": 0.2}, {"margin": 0.4}, SLOW),
    "triplet_all": single("triplet_all", {}, {"margin": 0.2}, {"margin": 0.4}, SLOW),
    "margin": single("margin", {}, {"beta": 1.0}, {"beta": 0.8}, SLOW, rule="distance_weighted"),
    "circle": single("circle", {}, {"gamma": 40.0}, {"margin": 0.25, "gamma": 40.0}, SLOW),
    "supcon": single("supcon", {}, {"temperature": 0.05}, {"temperature": 0.2}, SLOW),
    "nt_xent": single("nt_xent", {}, {"temperature": 0.1}, {"temperature": 0.2}, SLOW),
    "smooth_ap": single("smooth_ap", {}, {"temperature": 0.03}, {"temperature": 0.1}, SLOW),
}
PROXY = {
    "proxy_anchor": single(
        "proxy_anchor",
        {"alpha": 16.0} | QUICK_PROXIES,
        {"alpha": 8.0} | QUICK_PROXIES,
        {"alpha": 4.0} | QUICK_PROXIES,
        {"alpha": 8.0, "margin": 0.3} | QUICK_PROXIES,
        {"alpha": 8.0},
    ),
    "proxy_nca_pp": single(
        "proxy_nca_pp",
        QUICK_PROXIES,
        {"temperature": 0.2} | QUICK_PROXIES,
        {"temperature": 0.4} | QUICK_PROXIES,
        {"temperature": 0.2},
    ),
    "cosface": single(
        "cosface",
        {"scale": 16.0} | QUICK_PROXIES,
        {"scale": 16.0, "margin": 0.1} | QUICK_PROXIES,
        {"scale": 8.0} | QUICK_PROXIES,
        {"scale": 16.0},
    ),
    "arcface": single(
        "arcface",
        {"scale": 16.0} | QUICK_PROXIES,
        {"scale": 16.0, "margin": 0.1} | QUICK_PROXIES,
        {"scale": 8.0} | QUICK_PROXIES,
        {"scale": 16.0},
    ),
    "soft_triple": single(
        "soft_triple",
        QUICK_PROXIES,
        {"scale": 10.0} | QUICK_PROXIES,
        {"scale": 10.0, "gamma": 0.2} | QUICK_PROXIES,
        {"scale": 10.0},
        centers=2,
    ),
}


def together(
    objectives: dict[str, Overrides], combination: str, *settings: Overrides, **more: Any
) -> Row:
    """Several objectives under one combination; settings give its open values."""
    start = {"pair": 1.0, "proxy": 0.03, "separation": 0.3}  # near where shares are as asked for
    base = {
        "objectives": objectives,
        "combination.name": combination,
        "weights": {name: start[name] for name in objectives},
        **more,
    }
    return Row("combination", base, list(settings or ({},)))


def shares(pair: float | None, separation: float | None) -> Overrides:
    """Targets of the shares: of the pair objective at X, of the separation objective at P."""
    result: Overrides = {}
    if pair is not None:
        result["embedding_shares"] = {"pair": pair, "proxy": 1 - pair}
    if separation is not None:
        result["proxy_shares"] = {"proxy": 1 - separation, "separation": separation}
    return result


def combination_rows(chosen: dict[str, Overrides]) -> dict[str, Row]:
    """Two and three of the design's own objectives, each as tuned alone; then the best ones."""
    found = _losses(chosen["multi_similarity"] | chosen["proxy_anchor"])
    pair = objective("multi_similarity")
    proxy = objective("proxy_anchor")
    separation = objective("nearest_proxy")
    three = {"pair": pair, "proxy": proxy, "separation": separation}
    ones = {"weights": dict.fromkeys(three, 1.0)}
    weights = [
        {"weights": {"pair": 1.0, "proxy": a, "separation": b}}
        for a in (0.03, 0.1, 0.3)
        for b in (0.03, 0.3)
    ]
    targets = [shares(a, b) for a in (0.9, 0.8, 0.5) for b in (0.02, 0.1)]
    rows = {
        "pair + proxy": together(
            {"pair": pair, "proxy": proxy}, "share", *(shares(a, None) for a in (0.9, 0.8, 0.5))
        ),
        "proxy + separation": together(
            {"proxy": proxy, "separation": separation},
            "share",
            *(shares(None, b) for b in (0.02, 0.1, 0.3)),
        ),
        "all, ones": together(three, "fixed", ones, ones | SLOW),
        "all, tuned weights": together(three, "fixed", *weights),
        "all, uncertainty": together(
            three,
            "uncertainty",
            {"combination.params.cap": 10.0},
            {"combination.params.cap": 100.0},
        ),
        "all, gradnorm": together(
            three, "gradnorm", {"combination.params.alpha": 0.5}, {"combination.params.alpha": 1.5}
        ),
        "all, share": together(three, "share", *targets),
        "all, share, pcgrad": together(
            three, "share", *targets[2:4], **{"combination.surgery": "pcgrad"}
        ),
        "all, random": together(three, "random", {}, SLOW),
    }
    return {name: row._replace(base=found | row.base) for name, row in rows.items()}


def _losses(setting: Overrides) -> Overrides:
    """Of a setting the hyperparameters of losses; rates do not carry over."""
    return {key: value for key, value in setting.items() if key.startswith("losses.")}


def mining_rows(chosen: dict[str, Overrides]) -> dict[str, Row]:
    """The rules on the three objectives under learned shares, proxies mined or not."""
    found = _losses(chosen["multi_similarity"] | chosen["proxy_anchor"]) | chosen["all, share"]
    rows = {}
    for rule in ("sample", "proxy", "either", "both", "blend"):
        for mined in (False, True):

            def objectives(margin: float, rule: str = rule, mined: bool = mined) -> Overrides:
                mining: Any = {"rule": rule, "margin": margin}
                pair = objective("multi_similarity", **mining)
                proxy = objective("proxy_anchor", **(mining if mined else {}))
                separation = objective("nearest_proxy")
                return {"objectives": {"pair": pair, "proxy": proxy, "separation": separation}}

            row = together(
                objectives(0.1)["objectives"], "share", *(objectives(m) for m in (0.05, 0.15, 0.4))
            )
            name = f"{rule}, proxies too" if mined else rule
            rows[name] = row._replace(group="mining", base=row.base | found)
    return rows


def change_rows(chosen: dict[str, Overrides]) -> dict[str, Row]:
    """Changes of the design, each on the three objectives under learned shares."""
    found = _losses(chosen["multi_similarity"] | chosen["proxy_anchor"] | chosen["margin"])
    found |= _losses(chosen["cosface"])
    pair = objective("multi_similarity")
    margin = objective("margin", rule="distance_weighted")
    proxy = objective("proxy_anchor")
    cosface = objective("cosface")
    separation = objective("nearest_proxy")

    def three(pair: Overrides, proxy: Overrides, *settings: Overrides) -> Row:
        objectives = {"pair": pair, "proxy": proxy, "separation": separation}
        row = together(objectives, "share", *settings)
        return row._replace(group="changes", base=found | row.base)

    base = chosen["all, share"]
    return {
        "smaller proxy share": three(pair, proxy, shares(0.95, 0.1), shares(0.98, 0.1)),
        "margin as pair": three(margin, proxy, shares(0.9, 0.1), shares(0.97, 0.1)),
        "cosface as proxy": three(pair, cosface, shares(0.9, 0.1), shares(0.8, 0.1)),
        "separation's reach": three(
            pair,
            proxy,
            base | {"losses.nearest_proxy.margin": 0.0},
            base | {"losses.nearest_proxy.margin": 0.3},
        ),
    }


def rows_of(stage: str, chosen: dict[str, Overrides]) -> dict[str, Row]:
    """The rows of one stage, given what earlier stages chose."""
    if stage == "single":
        return PAIR | PROXY
    later = {"combination": combination_rows, "mining": mining_rows, "changes": change_rows}
    return later[stage](chosen)


def make_config(
    row: Row, setting: Overrides, *, seed: int, steps: int, batch_size: int = 128
) -> Any:
    """The config of one run."""
    from mmljax.config import from_mapping

    config = mmljax.default_config("omniglot")
    config.duration = f"{steps} steps"
    config.model.width = 16
    config.model.embedding_size = 64
    config.data.batch_size = batch_size
    config.optimizer.warmup = "25 steps"
    config.optimizer.weights.learning_rate = 0.2
    for group, rate in rates(0.03, 0.01).items():
        config.optimizer[group.split(".")[1]].learning_rate = rate
    config.seed = seed
    config.evaluation.recall_at = (1,)
    overrides = row.base | setting
    with config.unlocked():
        config.objectives = ConfigDict(overrides["objectives"])
        for key, value in overrides.items():
            if key != "objectives":
                apply(config, key, value)
    return from_mapping(config)


PER_OBJECTIVE = {
    "weights": "weight",
    "embedding_shares": "embedding_share",
    "proxy_shares": "proxy_share",
}


def apply(config: Any, key: str, value: Any) -> None:
    """Set one override: of a loss wherever it is used, of each objective, or of a dotted key."""
    if key.startswith("losses."):
        _, loss, name = key.split(".")
        for row in config.objectives.values():
            if row.loss == loss:
                row.params[name] = value
        return
    if key in PER_OBJECTIVE:
        for name, row in config.objectives.items():
            row[PER_OBJECTIVE[key]] = value.get(name, 0.0)
        return
    *path, last = key.split(".")
    group = config
    for name in path:
        group = group[name]
    group[last] = value


def run_seeds(
    data: str,
    tuning: bool,
    name: str,
    row: Row,
    setting: Overrides,
    seeds: list[int],
    *,
    steps: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Train and score one setting once per seed, compiling once. Runs in a worker."""
    import jax
    import numpy as np

    from benchmarks import ablation_data
    from mmljax.data import load
    from mmljax.mesh import make_mesh
    from mmljax.retrieval.evaluate import evaluate, make_embed
    from mmljax.training.trainer import make_trainer

    dataset = ablation_data.load(data, tuning=tuning)
    mesh = make_mesh()
    records: list[dict[str, Any]] = []
    compiled = None
    for seed in seeds:
        config = make_config(row, setting, seed=seed, steps=steps, batch_size=batch_size)
        trainer = make_trainer(
            config,
            classes=dataset.classes,
            channels=dataset.train.images.shape[-1],
            train_examples=len(dataset.train.labels),
            mesh=mesh,
        )
        compiled = compiled or (trainer.step, make_embed(trainer.graphdef))
        step, embed = compiled
        state, ledger = trainer.state, []
        for batch in load.train_batches(dataset, config, mesh, range(steps)):
            state, scalars = step(state, batch)
            ledger.append(scalars)
        result = evaluate(
            partial(embed, *state.evaluated),
            load.eval_batches(dataset.query, config, mesh),
            dataset.gallery and load.eval_batches(dataset.gallery, config, mesh),
            recall_at=(1,),
            chunk=8192,
            mesh=mesh,
        )
        ledger = jax.device_get(ledger[-max(steps // 5, 1) :])
        records.append(
            {
                "row": name,
                "group": row.group,
                "tuning": tuning,
                "setting": setting,
                "seed": seed,
                "steps": steps,
                "recall@1": result.scores["recall@1"],
                "map@r": result.scores["map@r"],
                "ledger": {
                    key: float(np.mean([scalars[key] for scalars in ledger])) for key in ledger[0]
                },
            }
        )
    return records


def run(options: argparse.Namespace) -> None:
    """All stages, in order: tune, choose, train the chosen setting with every seed."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    tuned = (options.tuned or options.out) / "results.jsonl"
    # One thread to a worker: the paired runs then share the cores without getting in the way.
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:

        def finish(tasks: list[tuple[bool, str, Row, Overrides, list[int]]]) -> None:
            done = {ablation_table.key(record) for record in ablation_table.read(path)}
            waiting = []
            for tuning, name, row, setting, seeds in tasks:
                probe = {"row": name, "tuning": tuning, "setting": setting}
                left = [s for s in seeds if ablation_table.key({**probe, "seed": s}) not in done]
                if left:
                    arguments = (str(options.data), tuning, name, row, setting, left)
                    size = {"steps": options.steps, "batch_size": options.batch_size}
                    waiting.append(pool.submit(run_seeds, *arguments, **size))
            for future in as_completed(waiting):
                with path.open("a") as file:
                    for record in future.result():
                        file.write(json.dumps(record) + "\n")
                        print(
                            f"{'tune' if record['tuning'] else 'test'} {record['row']:<28}"
                            f"{record['seed']:>4} R@1 {100 * record['recall@1']:5.1f} "
                            f"MAP@R {100 * record['map@r']:5.1f} {record['setting']}",
                            flush=True,
                        )

        for stage in options.stages:
            chosen = ablation_table.choose(ablation_table.read(tuned))
            rows = rows_of(stage, chosen)
            if options.rows:
                rows = {name: row for name, row in rows.items() if name in options.rows}
            if not options.tuned:
                finish(
                    [(True, n, r, s, [TUNING_SEED]) for n, r in rows.items() for s in r.settings]
                )
                chosen = ablation_table.choose(ablation_table.read(tuned))
            finish([(False, n, r, chosen[n], list(SEEDS)) for n, r in rows.items()])


def main() -> None:
    """Run the study or print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    study = commands.add_parser("run")
    study.add_argument("--data", type=Path, required=True)
    study.add_argument("--out", type=Path, required=True)
    study.add_argument("--steps", type=int, default=250)
    study.add_argument("--batch-size", type=int, default=128, help="four images per class")
    study.add_argument("--rows", nargs="+", help="only these")
    study.add_argument("--tuned", type=Path, help="take the settings that this other study chose")
    study.add_argument("--workers", type=int, default=os.cpu_count())
    study.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    study.set_defaults(function=run)
    ablation_table.add_table_command(commands)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    sys.exit(main())

"""A run's directory as after an evaluation, without training: photographs, ledger, records."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import small_runs
from mmljax.config import Config, from_mapping, to_dict
from mmljax.data import load
from mmljax.mesh import make_mesh
from mmljax.retrieval import records
from mmljax.retrieval.evaluate import Retrieval, retrieval_scores
from mmljax.types import Dataset

KINDS = ("WOMEN/Dresses", "MEN/Shorts", "UNISEX/<b>&'hats'")
STEP = 20


class EvaluatedRun(NamedTuple):
    """The files of a run, and what they were made from."""

    folder: Path
    config: Config
    dataset: Dataset
    result: Retrieval


def write_evaluated_run(folder: Path, *, items: int = 12, views: int = 6) -> EvaluatedRun:
    """A run on photographs in In-Shop's layout; an embedding is its item's with much noise."""
    directory = folder / "data"
    _write_photographs(directory, items=items, views=views)
    path = small_runs.write_config(
        folder / "small.py", directory, data__source="in_shop", evaluation__recall_at=(1, 4, 10)
    )
    config = from_mapping(runpy.run_path(str(path))["get_config"]())
    dataset = load.load_dataset(config)
    assert dataset.gallery is not None
    random = np.random.default_rng(0)
    centers = random.normal(size=(items + 1, 8))

    def embed(labels: np.ndarray) -> np.ndarray:
        x = centers[labels] + 0.8 * random.normal(size=(len(labels), 8))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    query, gallery = dataset.query.labels, dataset.gallery.labels
    result = retrieval_scores(
        embed(query),
        query,
        embed(gallery),
        gallery,
        recall_at=config.evaluation.recall_at,
        chunk=64,
        mesh=make_mesh(jax.devices()[:1]),
    )
    result = result._replace(at_sizes={4: {"recall@1": 0.125, "map@r": 0.0625}})
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(result)))
    protocol = records.evaluation_protocol(dataset, config)
    records.write_records(run, records.make_records(protocol, STEP, dataset, result))
    return EvaluatedRun(run, config, dataset, result)


def _write_photographs(directory: Path, *, items: int, views: int) -> None:
    from PIL import Image

    random = np.random.default_rng(1)
    rows = []
    for item in range(items + 1):  # the first one trains
        ground = random.integers(40, 200, 3)
        for view in range(views):
            name = f"img/{KINDS[item % len(KINDS)]}/id_{item:08}/{view:02}_front.jpg"
            noise = random.integers(0, 56, (60, 40, 3))
            path = directory / "Img" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((ground + noise).astype(np.uint8)).save(path)
            test = "query" if view < views // 2 else "gallery"
            rows.append(f"{name} id_{item:08} {test if item else 'train'}")
    listed = directory / "Eval" / "list_eval_partition.txt"
    listed.parent.mkdir()
    header = "image_name item_id evaluation_status"
    listed.write_text("\n".join([str(len(rows)), header, *rows, ""]))


def _rows(result: Retrieval) -> list[dict[str, Any]]:
    untrained = {"recall@1": 0.25, "recall@4": 0.5, "recall@10": 0.75, "map@r": 0.125}
    rows: list[dict[str, Any]] = [{"step": 0, "kind": "evaluation", **untrained}]
    for step in range(1, STEP + 1):
        rows.append(
            {
                "step": step,
                "kind": "train",
                "loss": 3 / step,
                **{f"loss/{name}": k / step for k, name in enumerate(("pair", "proxy"), 1)},
                **{f"weight/{name}": 1 / k for k, name in enumerate(("pair", "proxy"), 1)},
                "share_embeddings/pair": 0.5 + 0.3 * step / STEP,
                "share_embeddings/proxy": 0.5 - 0.3 * step / STEP,
                "share_proxies/proxy": 0.9,
                "share_proxies/separation": 0.1,
                "conflict/pair_proxy": 0.5 - step / STEP,
                "kept_positive/pair": 0.9,
                "kept_negative/pair": 1 / step,
            }
        )
    return [*rows, {"step": STEP, "kind": "evaluation", **result.summary()}]

"""The model card of a trained network, from what its run has written."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmljax.errors import UserError
from mmljax.runs.writer import BEFORE_TRAINING, percent, read_metrics, score_keys, score_name

if TYPE_CHECKING:
    from mmljax.inference.embedder import TrainedEmbedder

IMAGES = "preprocessor_config.json"
"""The file that says how images become crops."""

LAST = 100
"""Steps at the end of a run over which its ledger is averaged."""

_LEDGER = {
    "loss": "loss",
    "weight": "weight",
    "share_embeddings": "share of the gradient at the embeddings",
    "share_proxies": "at the proxies",
}


def last_ledger(run: Path) -> dict[str, dict[str, float]]:
    """By objective the mean of each quantity of ``_LEDGER`` over the last steps of a run.

    Empty where the run has no metrics.
    """
    try:
        rows = read_metrics(run, kind="train")[-LAST:]
    except (OSError, UserError):
        return {}
    found: dict[str, dict[str, float]] = {}
    for key in rows[-1] if rows else ():
        quantity, _, objective = key.partition("/")
        if quantity in _LEDGER and objective:
            values = [row[key] for row in rows if key in row]
            found.setdefault(objective, {})[quantity] = float(np.mean(values))
    return found


def model_card(
    trained: TrainedEmbedder,
    *,
    results: Mapping[str, Any] | None,
    ledger: Mapping[str, Mapping[str, float]],
    license_id: str,
) -> str:
    """A README in Markdown with the hub's header.

    Args:
      trained: the network.
      results: of its run; None if it has not ended.
      ledger: as ``last_ledger`` returns it.
      license_id: one of the hub's, or ``unknown``.
    """
    parts = [
        _header(trained, license_id),
        _introduction(trained),
        _scores(results),
        _objectives(trained, ledger),
        _use(trained),
        _license(trained, license_id),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(trained: TrainedEmbedder, license_id: str) -> str:
    source = trained.config.model.pretrained
    base = [f"base_model: {source[3:].partition('@')[0]}"] if source.startswith("hf:") else []
    return "\n".join(
        [
            "---",
            "library_name: mmljax",
            "pipeline_tag: image-feature-extraction",
            f"license: {license_id}",
            *base,
            "tags:",
            *(f"- {tag}" for tag in ("image-retrieval", "metric-learning", "jax", "flax")),
            "---",
        ]
    )


def _introduction(trained: TrainedEmbedder) -> str:
    model, identity = trained.config.model, trained.identity
    version = importlib.metadata.version("mmljax")
    return (
        f"# {identity['run']}\n\n"
        f"Image embeddings of {identity['embedding_size']} dimensions for retrieval by cosine "
        f"similarity. The network is a `{model.backbone}` with a head, trained from "
        f"{_start(model.pretrained)} by mmljax {version} with several metric-learning objectives "
        f"at once. These are the weights after step {identity['step']} of the run "
        f"`{identity['run']}` (config `{identity['config']}`)."
    )


def _start(pretrained: str) -> str:
    if not pretrained:
        return "random weights"
    named = pretrained if pretrained.startswith("hf:") else Path(pretrained).name
    return f"the weights `{named}`"


def _scores(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "## Scores\n\nNone: the run has not ended."
    scores = results["scores"]
    before = {key: results[key] for key in BEFORE_TRAINING if results.get(key)}
    names = {"untrained": "at step 0", "pretrained": "pretrained backbone alone"}
    rows = [["%", "trained", *(names[key] for key in before)]]
    for key in score_keys(scores):
        columns = (scores, *before.values())
        rows.append([score_name(key), *(percent(column.get(key)) for column in columns)])
    protocol = [[key, str(value)] for key, value in results.get("protocol", {}).items()]
    lines = [
        "## Scores",
        "",
        f"At step {scores.get('step', '?')}, over {scores.get('queries', '?')} queries and "
        f"{scores.get('gallery', '?')} gallery images; Recall@1 by chance is "
        f"{percent(scores.get('chance'))} %.",
        "",
        _table(rows),
    ]
    if protocol:
        lines += ["", "The protocol; two results are comparable where it is equal:", ""]
        lines += [_table([["what", "value"], *protocol])]
    return "\n".join(lines)


def _objectives(trained: TrainedEmbedder, ledger: Mapping[str, Mapping[str, float]]) -> str:
    if not ledger:
        return ""
    rows = [["objective", *_LEDGER.values()]]
    for name, values in sorted(ledger.items()):
        rows.append([name, *(_number(values.get(quantity)) for quantity in _LEDGER)])
    text = f"Means over the last {LAST} steps at most."
    return f"## What each objective contributed\n\n{text}\n\n{_table(rows)}"


def _use(trained: TrainedEmbedder) -> str:
    data, size = trained.config.data, trained.config.data.image_size
    return "\n".join(
        [
            "## Use",
            "",
            "```python",
            "import mmljax, numpy as np",
            "",
            'embedder = mmljax.load_embedder("FOLDER")  # or "hf:OWNER/NAME@COMMIT"',
            f"crops = np.zeros((1, {size}, {size}, {trained.channels}), np.uint8)",
            "vectors = embedder.embed(crops)  # of unit length",
            "```",
            "",
            f"Crops are made as in `{IMAGES}`: the short side resized to {data.resize_size} "
            f"pixels ({data.resampling}, antialiased), then the central {size} x {size} pixels. "
            "`mmljax embed FOLDER --images PHOTOS` does this, `mmljax search` finds the nearest.",
        ]
    )


def _license(trained: TrainedEmbedder, license_id: str) -> str:
    stated = (
        "The licence of these weights has not been stated."
        if license_id == "unknown"
        else f"These weights are published under `{license_id}`."
    )
    source = trained.config.model.pretrained
    more = f" They were trained from {_start(source)}, whose licence applies too." if source else ""
    return f"## Licence\n\n{stated}{more}"


def _number(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.3g}"


def _table(rows: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *rest])

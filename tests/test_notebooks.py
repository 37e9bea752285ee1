"""The notebooks run from a clean kernel, and their tables equal what other code computes."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import small_runs

nbformat = pytest.importorskip("nbformat", reason="pip install 'mmljax[notebook]' brings it")

NOTEBOOKS = small_runs.ROOT / "notebooks"
EVERY = pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)


@EVERY
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@EVERY
def test_one_cell_installs_only_where_mmljax_is_absent(path):
    cells = nbformat.read(path, as_version=4).cells
    (install,) = (cell for cell in cells if "pip install" in cell.source)
    assert 'find_spec("mmljax") is None' in install.source


@EVERY
def test_each_plot_has_an_explanation(path):
    """At least two sentences before each cell that draws."""
    cells = nbformat.read(path, as_version=4).cells
    drawing = [i for i, cell in enumerate(cells) if cell.source.startswith(("show(", "SVG("))]
    drawing += [i for i, cell in enumerate(cells) if cell.source.endswith("circle_figure(after)))")]
    assert drawing
    for place in drawing:
        text = cells[place - 1].source
        assert cells[place - 1].cell_type == "markdown"
        assert text.count(". ") + text.count(".\n") + text.endswith(".") >= 2, text


def execute(path: Path, tables: list[str], *, parameters: str | None = None) -> dict:
    """Run a notebook in its own kernel; returns tables as lists of rows, and its pictures."""
    client = pytest.importorskip("nbclient", reason="pip install 'mmljax[notebook]' brings it")
    pytest.importorskip("ipykernel", reason="pip install 'mmljax[notebook]' brings it")
    notebook = nbformat.read(path, as_version=4)
    if parameters is not None:
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
        cell.source = parameters
    code = [f"{name!r}: json.loads({name}.to_json(orient='table'))['data']" for name in tables]
    source = f"import json\nprint(json.dumps({{{', '.join(code)}}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    client.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    found = json.loads(outputs[-1]["text"])
    found["pictures"] = [
        out["data"]["image/svg+xml"] for out in outputs if "image/svg+xml" in out.get("data", {})
    ]
    return found


@pytest.mark.slow
def test_quickstart():
    found = execute(NOTEBOOKS / "quickstart.ipynb", ["forces", "results", "table"])
    forces = {row["objective"]: row for row in found["forces"]}
    assert forces["pair"]["at proxies"] == 0
    assert forces["separation"]["at samples"] == 0
    for name, group in (("pair", "samples"), ("proxy", "samples"), ("proxy", "proxies")):
        assert forces[name][f"at {group}"] > 0.1
    results = {row["index"]: row for row in found["results"]}
    assert results["recall@1"]["before"] < 0.9
    assert results["recall@1"]["after"] == 1
    # Four proxies on a circle are furthest apart at right angles.
    assert results["nearest proxies"]["before"] > 0.7
    assert abs(results["nearest proxies"]["after"]) < 0.2
    losses = defaultdict(list)
    for row in found["table"]:
        assert row["quantity"] == "loss"
        losses[row["name"]].append(row["value"])
    assert {name: len(values) for name, values in losses.items()} == dict.fromkeys(forces, 600)
    assert all(values[-1] < values[0] for values in losses.values())
    assert len(found["pictures"]) == 3


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """Two short runs that differ only in their seed."""
    folder = tmp_path_factory.mktemp("curves") / "runs"
    folder.mkdir()
    images = small_runs.write_images(folder / "images.npz")
    workdirs = []
    for seed in (0, 1):
        config = small_runs.write_config(folder / f"seed{seed}.py", images, seed=seed)
        done = small_runs.run(config, folder / f"run{seed}")
        assert done.returncode == 0, done.stderr
        workdirs.append(folder / f"run{seed}")
    return workdirs


@pytest.mark.slow
def test_contribution_curves(two_seeds):
    parameters = f"RUNS = {{'tiny': {[str(path) for path in two_seeds]}}}"
    found = execute(
        NOTEBOOKS / "contribution_curves.ipynb",
        ["progress", "shares", "results", "table"],
        parameters=parameters,
    )
    rows = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in two_seeds
    ]
    assert [(row["seed"], row["train"], row["evaluation"]) for row in found["progress"]] == [
        (0, 20, 20),
        (1, 20, 20),
    ]
    # The last tenth of twenty steps.
    late = [row for run in rows for row in run if row["kind"] == "train" and row["step"] > 18]
    assert len(late) == 4
    targets = {"pair": 0.8, "proxy": 0.2}  # of the default config
    checked = 0
    for row in found["shares"]:
        assert row["run"] == "tiny"
        mean = np.mean([r[f"{row['quantity']}/{row['name']}"] for r in late])
        assert row["share"] == pytest.approx(mean, abs=1e-6)
        if row["quantity"] == "share_embeddings" and row["name"] in targets:
            assert row["target"] == pytest.approx(targets[row["name"]])
            checked += 1
    assert checked == 2
    last = [[row for row in run if row["kind"] == "evaluation"][-1] for run in rows]
    results = {row["quantity"]: row for row in found["results"]}
    assert set(results) == {"recall@1", "recall@2", "recall@4", "map@r"}
    for name, row in results.items():
        values = [run[name] for run in last]
        assert (row["min"], row["max"]) == pytest.approx((min(values), max(values)), abs=1e-6)
        assert row["count"] == 2
    own = sum(len(row) - 2 for run in rows for row in run)
    assert sum(row["kind"] != "target" for row in found["table"]) == own
    assert all(row["value"] is None or math.isfinite(row["value"]) for row in found["table"])
    assert len(found["pictures"]) == 7


@pytest.mark.slow
def test_contribution_curves_shows_the_runs_that_there_are(two_seeds):
    """Without parameters, it reads all runs in ``../runs``."""
    folder = two_seeds[0].parents[1] / "notebooks"
    folder.mkdir()
    shutil.copy(NOTEBOOKS / "contribution_curves.ipynb", folder)
    found = execute(folder / "contribution_curves.ipynb", ["progress", "results"])
    assert [(row["run"], row["seed"]) for row in found["progress"]] == [("run0", 0), ("run1", 1)]
    assert {row["run"] for row in found["results"]} == {"run0", "run1"}
    assert len(found["pictures"]) == 7

"""The picture of a run draws what the rows hold, whatever the objectives are called."""

from __future__ import annotations

import math
import re
import sys

import pytest

from mmljax.plot import _INK, plot_contributions


def rows_of(*names, steps=5, **constant):
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "kind": "train", "loss": 1.0, **constant}
        for k, name in enumerate(names, 1):
            row |= {f"loss/{name}": k / step, f"weight/{name}": 1.0, f"weighted/{name}": k / step}
        rows.append(row)
    return rows


def texts(svg):
    """Texts of a picture: matplotlib draws letters as shapes and leaves each text as a comment."""
    return re.findall(r"<!-- (.+?) -->", svg.read_text())


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib", reason="needs matplotlib")


def test_every_quantity_gets_its_panel(tmp_path):
    rows = rows_of(
        "tuples",
        "centres",
        **{
            "share_embeddings/tuples": 0.25,
            "share_proxies/centres": 0.75,
            "conflict/tuples_centres": -0.5,
            "kept_positive/tuples": 0.5,
            "kept_negative/tuples": 0.1,
        },
    )
    rows.append({"step": 5, "kind": "evaluation", "recall@1": 0.5, "recall@10": 0.9, "map@r": 0.1})
    path = plot_contributions(rows, tmp_path / "new" / "plot.svg")
    assert path == tmp_path / "new" / "plot.svg"
    drawn = texts(path)
    for text in (
        "raw loss",
        "contribution weight",
        "share of the gradient at the embeddings",
        "share of the gradient at the proxies",
        "cosine of gradients at the embeddings",
        "pairs kept by mining",
        "retrieval",
        "tuples",
        "centres",
        "tuples_centres",
        "positive, tuples",
        "negative, tuples",
        "Recall@1",
        "MAP@R",
    ):
        assert text in drawn
    assert "Recall@10" not in drawn


def test_missing_quantities_get_no_panel(tmp_path):
    drawn = texts(plot_contributions(rows_of("only"), tmp_path / "plot.svg"))
    assert drawn.count("step") == 2  # the axes of two panels
    assert "retrieval" not in drawn


def test_png_by_suffix_without_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    path = plot_contributions(rows_of("pair", "proxy"), tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_an_objective_looks_the_same_in_every_panel(tmp_path):
    rows = rows_of("pair", "proxy", **{"share_proxies/proxy": 1.0})
    svg = plot_contributions(rows, tmp_path / "plot.svg").read_text()
    colour = {"pair": _INK[0][0], "proxy": _INK[1][0]}
    # Curve and legend: two panels for each objective, one more for the proxies' share.
    curves = re.findall(r'id="line2d_\d+">\s*<path d="[^"]+" clip-path[^>]+stroke: (#\w+)', svg)
    assert curves.count(colour["pair"]) == 2
    assert curves.count(colour["proxy"]) == 3


def test_looks_differ_without_colour():
    assert len({str(line) for _, line, _ in _INK}) == len(_INK)
    assert len({marker for _, _, marker in _INK}) == len(_INK)


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
def test_values_that_no_logarithm_takes(tmp_path, value):
    rows = rows_of("pair", steps=30)
    rows[3]["loss/pair"] = value
    assert plot_contributions(rows, tmp_path / "plot.png").exists()


def test_a_run_without_one_finite_loss(tmp_path):
    rows = [{"step": 1, "kind": "train", "loss/pair": math.nan}]
    assert plot_contributions(rows, tmp_path / "plot.png").exists()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "kind": "train", "other": 1.0}]])
def test_nothing_to_draw(tmp_path, rows):
    assert plot_contributions(rows, tmp_path / "plot.png") is None
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert plot_contributions(rows_of("pair"), tmp_path / "plot.png") is None
    (record,) = caplog.records
    assert "pip install 'mmljax[plot]'" in record.getMessage()

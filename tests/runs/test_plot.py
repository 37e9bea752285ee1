"""The plots of a run show what its rows hold, whatever the objectives are called."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest

from mmljax.errors import UserError
from mmljax.runs.plot import (
    _INK,
    PANELS,
    Circle,
    circle_figure,
    contribution_figure,
    svg_of,
    write_figure,
)
from mmljax.runs.reader import tidy


def rows_of(*names, steps=5, **constant):
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "kind": "train", "loss": 1.0, **constant}
        for k, name in enumerate(names, 1):
            row |= {f"loss/{name}": k / step, f"weight/{name}": 1.0, f"weighted/{name}": k / step}
        rows.append(row)
    return rows


def plot_contributions(rows, path):
    return write_figure(contribution_figure(tidy(rows, run="", seed=0)), path)


def texts(svg):
    """Texts of an SVG: matplotlib draws letters as shapes and leaves each text as a comment."""
    return re.findall(r"<!-- (.+?) -->", svg.read_text())


@pytest.fixture(autouse=True)
def libraries():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    pytest.importorskip("pandas", reason="needs pandas")


def seeds_of(run, levels):
    """Runs of one label, one seed per level, whose share of ``pair`` is the level."""
    import pandas as pd

    return pd.concat(
        tidy(rows_of("pair", "proxy", **{"share_proxies/pair": level}), run=run, seed=seed)
        for seed, level in enumerate(levels)
    )


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
        "Recall@10",
        "MAP@R",
    ):
        assert text in drawn


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


@pytest.mark.parametrize("number", [7, 20])
def test_no_two_curves_of_a_panel_look_the_same(number):
    names = [f"loss/objective{k}" for k in range(number)]
    rows = [{"step": s, "kind": "train"} | dict.fromkeys(names, 1.0) for s in (1, 2)]
    (axes,) = contribution_figure(tidy(rows, run="", seed=0)).axes
    looks = [(line.get_linestyle(), line._dash_pattern, line.get_marker()) for line in axes.lines]
    assert len(set(map(str, looks))) == number


def test_a_legend_covers_no_curve_and_no_other_panel():
    rows = [
        {"step": s, "kind": "evaluation", "map@r": 0.1}
        | {f"recall@{k}": 1 - 1 / (k * s) for k in (1, 10, 20, 30, 40, 50)}
        | {f"loss/a_rather_long_name_{k}": 1.0 for k in range(3)}
        for s in (1, 2, 3)
    ]
    figure = contribution_figure(tidy(rows, run="", seed=0))
    figure.canvas.draw()
    plots = [axes.get_window_extent() for axes in figure.axes]
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
    assert len(legends) == 2
    assert not any(legend.overlaps(plot) for legend in legends for plot in plots)
    assert not legends[0].overlaps(legends[1])


def test_a_run_may_have_any_name():
    import pandas as pd

    tables = [tidy(rows_of("pair"), run=run, seed=0) for run in ("_hidden", "a & <b>")]
    legend = contribution_figure(pd.concat(tables), panels=("losses",)).axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_hidden", "a & <b>"]


def test_rows_of_several_runs_are_broken():
    import pandas as pd

    tables = [
        tidy(
            [{"step": 1, "kind": "evaluation"} | {f"recall@{k}": 0.5 for k in range(1, 8)}],
            run=run,
            seed=0,
        )
        for run in "ab"
    ]
    figure = contribution_figure(pd.concat(tables))
    assert [axes.get_subplotspec().colspan.start for axes in figure.axes] == [0, 1, 2, 3, 0, 1, 2]
    assert len(curves_of(figure)) == 7


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
def test_values_that_no_logarithm_takes(tmp_path, value):
    rows = rows_of("pair", steps=30)
    rows[3]["loss/pair"] = value
    assert plot_contributions(rows, tmp_path / "plot.png").exists()


def test_a_run_without_one_finite_loss(tmp_path):
    rows = [{"step": 1, "kind": "train", "loss/pair": math.nan}]
    assert plot_contributions(rows, tmp_path / "plot.png").exists()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "kind": "train", "other": 1.0}]])
def test_nothing_to_draw(rows):
    assert contribution_figure(tidy(rows, run="", seed=0)) is None


@pytest.mark.parametrize("name", ["$", "a$b$c", r"\$x^$", "$\\frac{1}{$"])
def test_dollar_signs_are_drawn_as_they_are(name):
    """Matplotlib's formulas begin and end with a dollar sign."""
    import pandas as pd

    tables = [tidy(rows_of(name), run=run, seed=0) for run in (name, "other")]
    for table in (tables[0], pd.concat(tables)):
        figure = contribution_figure(table, panels=("losses",))
        svg = svg_of(figure)  # a formula that cannot be parsed raises
        assert f"<!-- {name} -->" in svg


def test_numbers_of_any_size_are_drawn(tmp_path):
    """Without an error or a warning; rows of a damaged run may hold such."""
    rows = rows_of("pair", steps=30)
    for step, value in enumerate((1e308, -1e308, math.inf, -math.inf, 1e-320)):
        rows[step] |= {"loss/pair": value, "weight/pair": abs(value), "conflict/pair": value}
    rows[-1]["step"] = 10**18 - 1
    svg_of(contribution_figure(tidy(rows, run="", seed=0)))


def curves_of(figure):
    """Per panel's title, its curves: label to values."""
    return {
        axes.get_title(loc="left"): {
            line.get_label(): line.get_ydata().tolist()
            for line in axes.lines
            if not line.get_label().startswith("_")
        }
        for axes in figure.axes
    }


def test_several_runs_have_a_panel_per_objective_and_seeds_a_band():
    import pandas as pd

    table = pd.concat([seeds_of("a", (0.25, 0.5)), seeds_of("b", (1.0,))])
    figure = contribution_figure(table, panels=("losses", "proxy_shares"))
    curves = curves_of(figure)
    assert set(curves) == {
        "raw loss: pair",
        "raw loss: proxy",
        "share of the gradient at the proxies: pair",
    }
    share = curves["share of the gradient at the proxies: pair"]
    assert share == {"a, 2 seeds": [0.375] * 5, "b": [1.0] * 5}
    (band,) = figure.axes[-1].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.25, 0.5)


def test_a_target_is_a_line_in_its_objectives_colour():
    rows = rows_of("pair", "proxy", **{"share_proxies/pair": 0.5, "share_proxies/proxy": 0.5})
    rows.append({"step": 0, "kind": "target", "share_proxies/proxy": 0.9})
    figure = contribution_figure(tidy(rows, run="", seed=0), panels=("proxy_shares",))
    (axes,) = figure.axes
    (aim,) = (line for line in axes.lines if line.get_label().startswith("_"))
    assert set(aim.get_ydata()) == {0.9}
    (proxy,) = (line for line in axes.lines if line.get_label() == "proxy")
    assert aim.get_color() == proxy.get_color()


def test_long_curves_are_drawn_by_means_within_a_band_that_shows_spikes():
    rows = [{"step": s, "kind": "train", "loss/pair": float(s % 2)} for s in range(1000)]
    rows[500]["loss/pair"] = 7.0
    figure = contribution_figure(tidy(rows, run="", seed=0))
    (curve,) = curves_of(figure)["raw loss"].values()
    assert len(curve) == 334
    assert curve[0] == pytest.approx(1 / 3)  # of 0, 1, 0
    (band,) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0, 7)


def test_two_kinds_of_one_objective_look_different():
    rows = rows_of("pair", **{"kept_positive/pair": 0.5, "kept_negative/pair": 0.1})
    figure = contribution_figure(tidy(rows, run="", seed=0), panels=("kept",))
    assert len({line.get_linestyle() for line in figure.axes[0].lines}) == 2


def test_svg_is_one_element_that_is_the_same_each_time():
    table = tidy(rows_of("pair"), run="", seed=0)
    text, again = (svg_of(contribution_figure(table)) for _ in range(2))
    assert text == again
    assert text.startswith("<svg")
    assert text.rstrip().endswith("</svg>")


def test_an_unknown_panel_is_named():
    with pytest.raises(UserError, match="no panel 'weight'"):
        contribution_figure(tidy(rows_of("pair"), run="", seed=0), panels=("weight",))
    assert "weights" in PANELS


def test_forces_are_arrows_from_their_points_in_proportion():
    samples = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    proxies = np.array([[0.0, -1.0], [0.6, 0.8]])
    circle = Circle(
        samples,
        np.array([0, 0, 1]),
        proxies,
        np.array([[0.0, 4.0], [2.0, 0.0], [0.0, 0.0]]),
        np.array([[0.0, 0.0], [-1.0, 0.0]]),
    )
    figure = circle_figure(
        {
            "some": circle,
            "none": circle._replace(sample_forces=np.zeros((3, 2)), proxy_forces=np.zeros((2, 2))),
        }
    )
    some, none = figure.axes
    (arrows,) = (part for part in some.collections if hasattr(part, "U"))
    assert arrows.get_offsets().tolist() == [[1, 0], [0, 1], [0.6, 0.8]]
    assert np.stack([arrows.U, arrows.V], axis=1).tolist() == [[0, 0.5], [0.25, 0], [-0.125, 0]]
    assert not any(hasattr(part, "U") for part in none.collections)

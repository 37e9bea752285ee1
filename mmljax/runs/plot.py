"""Plots of runs: what each objective contributed, in small panels side by side.

Curves differ in line style and marker as well as in colour, so they can be distinguished in grey. A
run looks the same in every panel, and so does an objective.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.errors import UserError
from mmljax.files import written_atomically
from mmljax.text import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class Panel(NamedTuple):
    """A panel of a figure: one quantity, or a few of one kind."""

    title: str
    quantities: str  # a regular expression
    axis: (
        tuple[int, int] | str
    )  # limits, "linear", or "log": logarithmic if the values span a decade


class Circle(NamedTuple):
    """Points on the unit circle and the forces on them; NumPy."""

    samples: np.ndarray  # [n 2]
    labels: np.ndarray  # [n], rows of the proxies
    proxies: np.ndarray  # [c 2]
    sample_forces: np.ndarray  # [n 2]
    proxy_forces: np.ndarray  # [c 2]


PANELS: Mapping[str, Panel] = {
    "losses": Panel("raw loss", "loss", "log"),
    "weights": Panel("contribution weight", "weight", "log"),
    "embedding_shares": Panel(
        "share of the gradient at the embeddings", "share_embeddings", (0, 1)
    ),
    "proxy_shares": Panel("share of the gradient at the proxies", "share_proxies", (0, 1)),
    "conflict": Panel("cosine of gradients at the embeddings", "conflict", (-1, 1)),
    "kept": Panel("pairs kept by mining", "kept_positive|kept_negative", (0, 1)),
    "retrieval": Panel("retrieval", r"recall@\d+|map@r", "linear"),
}

_POINTS = 400  # of a curve; a longer one is drawn as means of neighbouring points within a band
_GREATEST = 1e30  # absolute value that is drawn; axes overflow far beyond it
_ACROSS = 4  # most panels in a row, with several runs
_LEGEND = 60  # width of a panel's legend in characters, lines and gaps included
_INK = (  # colour, line style, marker
    ("#1a1a1a", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#8c8c8c", ":", "D"),
    ("#009e73", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#b07aa1", (0, (8, 3)), "P"),
    ("#56b4e9", (0, (4, 1, 1, 1)), "X"),
    ("#e69f00", (0, (1, 1)), "*"),
)
_SVG: Any = {"svg.hashsalt": "mmljax", "svg.fonttype": "path"}  # the same file for the same curves


def contribution_figure(
    table: DataFrame, *, panels: Sequence[str] = tuple(PANELS)
) -> Figure | None:
    """Draw a tidy table (:mod:`mmljax.runs.reader`) as panels.

    One run has a panel per quantity with a curve per objective. Several runs have a panel per
    quantity and objective with a curve per run. The seeds of a run are one curve, their mean,
    within a band from the least to the greatest value. A curve of more than 400 steps is drawn as
    the mean of neighbouring steps, within a band of their least and greatest value. Targets of
    shares are thin dotted lines.

    Args:
      table: of one or several runs.
      panels: keys of ``PANELS``, in order; those without values are left out.

    Returns:
      The figure, or None if there is nothing to draw.

    Raises:
      UserError: if a panel is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for key in panels:
        if key not in PANELS:
            raise UserError(f"there is no panel {key!r}; {nearest(key, PANELS)}")
    parts = [(PANELS[key], _of_panel(table, PANELS[key])) for key in panels]
    parts = [(panel, part) for panel, part in parts if (part["kind"] != "target").any()]
    if not parts:
        return None
    several = table["run"].nunique() > 1
    grid = _by_objective(parts) if several else _in_rows(parts)
    down, across = len(grid), max(map(len, grid))
    figure = Figure(figsize=(4.2 * across, 2.9 * down), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    looks = list(dict.fromkeys(table["run"] if several else _objectives(parts)))
    for i, row in enumerate(grid):
        for j, (panel, part, title) in enumerate(row):
            axes = figure.add_subplot(down, across, i * across + j + 1)
            axes.set_title(_literal(title), loc="left", fontsize=10)
            _draw(axes, part, looks, several=several)
            _finish(axes, panel.axis)
    return figure


def circle_figure(circles: Mapping[str, Circle]) -> Figure:
    """Draw samples and proxies in two dimensions with the forces on them, a panel per title.

    Samples are filled, proxies large and hollow; a class has one marker and colour. The longest
    arrow of a panel has length 0.5, so lengths are comparable only within a panel.

    Args:
      circles: by title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle as Outline

    figure = Figure(figsize=(3.6 * len(circles), 3.9), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for place, (title, circle) in enumerate(circles.items(), 1):
        axes = figure.add_subplot(1, len(circles), place)
        axes.set_title(_literal(title), loc="left", fontsize=10)
        axes.add_patch(Outline((0, 0), 1, fill=False, color="#8c8c8c", linewidth=0.8))
        for label, proxy in enumerate(circle.proxies):
            colour, _, marker = _look(label)
            own = circle.samples[circle.labels == label]
            axes.scatter(own[:, 0], own[:, 1], s=28, color=colour, marker=marker, zorder=2)
            axes.scatter(
                proxy[0], proxy[1], s=130, edgecolors=colour, facecolors="none", marker=marker
            )
        forces = np.concatenate([circle.sample_forces, circle.proxy_forces])
        lengths = np.linalg.norm(forces, axis=1)
        seen = lengths > 0.01 * lengths.max()  # shorter ones would look like dots
        if seen.any():
            starts = np.concatenate([circle.samples, circle.proxies])
            axes.quiver(
                *starts[seen].T,
                *(forces[seen] / lengths.max() / 2).T,
                angles="xy",
                scale_units="xy",
                scale=1,
                width=0.008,
                color="#1a1a1a",
                zorder=3,
            )
        axes.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
        axes.set_axis_off()
    return figure


def threshold_figure(report: Mapping[str, Any]) -> Figure:
    """Draw a report of :mod:`mmljax.inference.threshold` as three panels.

    These are the similarities of the test pairs with the threshold; the calibration, false-match
    rates on the test classes over those wanted, where a perfect choice is on the diagonal; and
    both error rates against each other. The interval is that of the wanted rate.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    similarities, calibration, errors = figure.subplots(1, 3)
    curves = zip(("different", "matching"), _INK, strict=False)
    for kind, (colour, line, _) in curves:
        counts = np.array(report["histogram"][kind])
        edges = np.linspace(-1, 1, len(counts) + 1)
        density = counts / max(counts.sum(), 1) / np.diff(edges)
        label = f"{kind} pairs"
        similarities.stairs(density, edges, color=colour, linestyle=line, label=label)
    similarities.axvline(report["threshold"], color="#d55e00", linewidth=1, label="threshold")
    similarities.set(xlabel="similarity", ylabel="density, test classes")
    wanted, rows = report["false_match_rate"], report["curve"]
    rate = report["test"]["false_match_rate"]
    low, high = rate["value"] - rate["low"], rate["high"] - rate["value"]
    calibration.errorbar(
        wanted, rate["value"], [[low], [high]], color="#d55e00", marker="o", capsize=3
    )
    targets = [row["wanted"] for row in rows]
    calibration.plot(targets, targets, color="#8c8c8c", linestyle=":", label="as wanted")
    for part, (colour, line, marker) in zip(("chosen_on", "test"), _INK, strict=False):
        rates = [
            [row[part][f"false_{kind}_rate"] for row in rows] for kind in ("match", "non_match")
        ]
        style: Any = {"color": colour, "linestyle": line, "marker": marker, "markersize": 3.5}
        style["label"] = part.replace("_", " ")
        calibration.plot(targets, rates[0], **style)
        errors.plot(*rates, **style)
    calibration.set(xlabel="wanted false-match rate", ylabel="false-match rate")
    errors.set(xlabel="false-match rate", ylabel="false-non-match rate", xscale="log")
    calibration.set(xscale="log", yscale="log")
    for axes in (similarities, calibration, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=8)
        axes.legend(frameon=False, fontsize=8)
    return figure


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as its suffix says (``.png``, ``.svg``, ``.pdf``) and return its path."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_SVG), written_atomically(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."))
    return path


def svg_of(figure: Figure) -> str:
    """The figure as an ``<svg>`` element with a transparent background."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


_Cell = tuple[Panel, "DataFrame", str]  # the last: its title


def _of_panel(table: DataFrame, panel: Panel) -> DataFrame:
    part = table[table["quantity"].str.fullmatch(panel.quantities)]
    part = part[(part["quantity"] != "loss") | (part["name"] != "")]  # without the sum
    return part.assign(value=part["value"].where(part["value"].abs() <= _GREATEST))


def _objectives(parts: Sequence[tuple[Panel, DataFrame]]) -> list[str]:
    """Names in the order of their styles."""
    return list(dict.fromkeys(name for _, part in parts for name in part["name"] if name))


def _in_rows(parts: Sequence[tuple[Panel, DataFrame]]) -> list[list[_Cell]]:
    across = min(3, len(parts))
    cells = [(panel, part, panel.title) for panel, part in parts]
    return [cells[i : i + across] for i in range(0, len(cells), across)]


def _by_objective(parts: Sequence[tuple[Panel, DataFrame]]) -> list[list[_Cell]]:
    grid = []
    for panel, part in parts:
        curves = part[part["kind"] != "target"][["quantity", "name"]].drop_duplicates()
        row = []
        for quantity, name in curves.itertuples(index=False):
            cell = part[(part["quantity"] == quantity) & (part["name"] == name)]
            title = f"{panel.title}: {_label(quantity, name)}"
            row.append((panel, cell, title))
        grid += [row[i : i + _ACROSS] for i in range(0, len(row), _ACROSS)]
    return grid


def _draw(axes: Any, part: DataFrame, looks: list[str], *, several: bool) -> None:
    """Draw the curves of one panel: one per run, or one per objective."""
    targets = part[part["kind"] == "target"]
    keys = ["run"] if several else ["quantity", "name"]
    curves = part[part["kind"] != "target"].groupby(keys, sort=False, observed=True)
    owners = [key[-1] for key, _ in curves]  # runs or objectives
    for place, (key, curve) in enumerate(curves):
        own_look = key[-1] in looks and owners.count(key[-1]) == 1
        colour, line, marker = _look(looks.index(key[-1]) if own_look else place)
        seeds = curve["seed"].nunique()
        values = curve.groupby("step")["value"].agg(["mean", "min", "max"])
        banded = seeds > 1 or len(values) > _POINTS
        values = _shortened(values)
        label = f"{key[0]}, {seeds} seeds" if seeds > 1 else str(key[0])
        label = label if several else _label(*key)
        axes.plot(
            values.index,
            values["mean"],
            label=_literal(f" {label}" if label.startswith("_") else label),  # else hidden
            color=colour,
            linestyle=line,
            linewidth=1.4,
            marker=marker,
            markersize=3.5,
            markevery=max(1, len(values) // 8),
        )
        if banded:
            axes.fill_between(
                values.index, values["min"], values["max"], color=colour, alpha=0.18, linewidth=0
            )
        aims = targets if several else targets[(targets["name"] == key[-1])]
        for aim in aims[aims["run"].isin(curve["run"])]["value"].unique():
            axes.axhline(aim, color=colour, linestyle=(0, (1, 3)), linewidth=1)


def _look(place: int) -> tuple[str, Any, str]:
    """Colour, line and marker; past the last of ``_INK`` the markers shift, so none repeats."""
    colour, line, _ = _INK[place % len(_INK)]
    return colour, line, _INK[(place + place // len(_INK)) % len(_INK)][2]


def _shortened(values: DataFrame) -> DataFrame:
    """At most ``_POINTS`` rows, each the mean, min and max of equally many neighbouring ones."""
    every = -(-len(values) // _POINTS)
    if every <= 1:
        return values
    groups = values.reset_index().groupby(np.arange(len(values)) // every)
    return groups.agg({"step": "mean", "mean": "mean", "min": "min", "max": "max"}).set_index(
        "step"
    )


def _literal(text: str) -> str:
    """Text that matplotlib draws as it is, rather than as a formula between dollar signs."""
    return text.replace("$", r"\$")


def _label(quantity: str, name: str) -> str:
    if quantity.startswith("kept_"):
        return f"{quantity.removeprefix('kept_')}, {name}"
    score = quantity.replace("recall", "Recall").replace("map@r", "MAP@R")
    if score != quantity:
        return f"{score}, {name}" if name else score
    return name or quantity


def _finish(axes: Any, axis: tuple[int, int] | str) -> None:
    if isinstance(axis, tuple):
        margin = 0.04 * (axis[1] - axis[0])
        axes.set_ylim(axis[0] - margin, axis[1] + margin)
        if axis[0] < 0:
            axes.axhline(0, color="#8c8c8c", linewidth=0.6, zorder=0)
    elif axis == "log":
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        values = values[np.isfinite(values)]
        if values.size and values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    axes.legend(  # below the axes, where no curve is
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.2),
        ncols=max(1, min(4, _LEGEND // (8 + max(map(len, labels))))),
        columnspacing=1,
        handlelength=3,
    )

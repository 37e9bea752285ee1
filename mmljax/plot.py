"""The picture of a run: what each objective contributed, in small panels side by side."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PANELS: tuple[tuple[str, str, tuple[int, int] | str], ...] = (  # title, keys, y axis
    ("raw loss", r"loss/(.+)", "log"),
    ("contribution weight", r"weight/(.+)", "log"),
    ("share of the gradient at the embeddings", r"share_embeddings/(.+)", (0, 1)),
    ("share of the gradient at the proxies", r"share_proxies/(.+)", (0, 1)),
    ("cosine of gradients at the embeddings", r"conflict/(.+)", (-1, 1)),
    ("pairs kept by mining", r"kept[_/](.+)", (0, 1)),
    ("retrieval", r"(recall@1|map@r)", "linear"),
)
_INK = (  # colour, line, marker: told apart in grey by each of the three
    ("#1a1a1a", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#8c8c8c", ":", "D"),
    ("#009e73", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#b07aa1", (0, (8, 3)), "P"),
)
_NAMES = {"recall@1": "Recall@1", "map@r": "MAP@R"}


def plot_contributions(rows: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw what each objective contributed over a run, one small panel per quantity.

    Args:
      rows: as ``read_metrics`` gives them; a quantity that no row has gets no panel.
      path: of the picture; its suffix says the format (``.png``, ``.svg``, ``.pdf``).

    Returns:
      The path, or None where there is nothing to draw or no matplotlib (a line says so).
    """
    panels = []
    for title, pattern, axis in _PANELS:
        keys = {key: m[1] for row in rows for key in row if (m := re.fullmatch(pattern, key))}
        if keys:
            panels.append((title, keys, axis))
    if not panels:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("no plot: matplotlib is absent; pip install 'mmljax[plot]' brings it")
        return None
    objectives = list(panels[0][1].values())  # one look each, in whatever panel they are
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.2 * across, 2.9 * down), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for i, (title, keys, axis) in enumerate(panels):
        axes = figure.add_subplot(down, across, i + 1)
        axes.set_title(title, loc="left", fontsize=10)
        for j, (key, label) in enumerate(keys.items()):
            look = objectives.index(label) if label in objectives else j
            _draw_curve(
                axes, rows, key, label=_NAMES.get(label, label.replace("/", ", ")), look=look
            )
        _finish_panel(axes, axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_curve(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, *, label: str, look: int
) -> None:
    points = np.array([(row["step"], row[key]) for row in rows if key in row], float)
    colour, line, marker = _INK[look % len(_INK)]
    axes.plot(
        *points.T,
        label=label,
        color=colour,
        linestyle=line,
        linewidth=1.4,
        marker=marker,
        markersize=3.5,
        markevery=max(1, len(points) // 8),
    )


def _finish_panel(axes: Any, axis: tuple[int, int] | str) -> None:
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
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.legend(frameon=False, fontsize=8)

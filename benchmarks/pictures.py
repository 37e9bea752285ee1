"""The pictures of the README, from a run: its contribution curves and its worst queries.

    mmljax train --config quickstart --workdir runs/pictures
    python -m benchmarks.pictures runs/pictures --output docs/images

writes ``contributions.png`` and ``worst_queries.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmljax.runs.html import Query, usable_records, worst_queries
from mmljax.runs.plot import contribution_figure
from mmljax.runs.reader import load_run_data, read_run

NEAREST = 7
"""Gallery images beside each query."""

COLOURS = 64
"""Of a picture's palette: a quarter of the bytes, and no difference to be seen."""


def worst_figure(queries: Sequence[Query], images: Sequence[Image.Image]) -> Figure:
    """A row per query: the query, then its nearest images, green where they are of its item."""
    across = 1 + min(NEAREST, *(len(query.found) for query in queries))
    figure = Figure(figsize=(1.1 * across, 1.35 * len(queries)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(queries), across, squeeze=False)
    for cells, query in zip(grid, queries, strict=True):
        shown = [(query.picture, "query", "0.4")]
        for found in query.found[: across - 1]:
            colour = "tab:green" if found.right else "tab:red"
            shown.append((found.picture, f"{found.similarity:.2f}", colour))
        for axes, (picture, title, colour) in zip(cells, shown, strict=True):
            axes.imshow(images[picture])
            axes.set_title(title, fontsize=8, color=colour)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(edgecolor=colour, linewidth=2)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file of few colours."""
    figure.savefig(path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLOURS)
    small.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--queries", type=int, default=3)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    panels = ("weights", "embedding_shares", "proxy_shares")
    curves = contribution_figure(read_run(options.run), panels=panels)
    if curves is None:
        raise SystemExit(f"{options.run} has no curves; train it with three objectives")
    write(curves, options.output / "contributions.png")
    config, dataset = load_run_data(options.run)
    records, neighbors = usable_records(options.run, dataset, config)
    queries, images = worst_queries(records, neighbors, dataset, count=options.queries)
    write(worst_figure(queries, images), options.output / "worst_queries.png")


if __name__ == "__main__":
    main()

"""A run's retrieval as one HTML file that needs nothing else.

The scores and the protocol behind them, the curves of the contributions, the scores by category,
and the queries with the worst scores beside what they found. It reads the records of the last
evaluation (``queries.npz``), the ledger, and the data set's images for the thumbnails; no network
is run. Whatever comes from the data is escaped, and the file refers to no address.
"""

from __future__ import annotations

import base64
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.data.thumbnails import thumbnail, webp
from mmljax.errors import UserError
from mmljax.retrieval.records import Neighbors, Records, evaluation_protocol, read_records
from mmljax.runs.reader import read_run
from mmljax.runs.writer import read_metrics, score_keys, score_name, write_atomically

if TYPE_CHECKING:  # at run time they would bring jax before the arguments are found good
    from PIL.Image import Image

    from mmljax.config import Config
    from mmljax.types import Dataset, Split

PAGE = "page.html"
LIMIT = 4_800_000
"""Bytes that a page may have; its thumbnails are made as small as that takes."""

_PACKAGES = {"jinja2": "Jinja", "PIL": "Pillow", "matplotlib": "Matplotlib", "pandas": "pandas"}
_SIZES = ((128, 75), (112, 65), (96, 55), (80, 45), (64, 40), (48, 30))  # side, WebP's quality
_CATEGORIES = 300  # rows of the table of categories, at most


class Found(NamedTuple):
    """A gallery image in a query's list."""

    name: str
    picture: int
    right: bool
    similarity: float


class Query(NamedTuple):
    """A query with its nearest gallery images."""

    name: str
    category: str
    picture: int
    rank: int | None  # of the first right one, None if it is not among those shown
    average_precision: float  # MAP@R's
    found: list[Found]


def category(name: str, label: int) -> str:
    """The kind of thing an image shows, as far as its name tells.

    In-Shop's ``img/WOMEN/Dresses/id_00000002/02_1_front.jpg`` is of ``WOMEN/Dresses``; where images
    lie in folders by class, the class; else the item's number.
    """
    folders = name.split("/")[:-1]
    if len(folders) > 1 and folders[0] in ("img", "Img"):
        folders = folders[1:]
    if not folders:
        return f"item {label}"
    return "/".join(folders[:-1] or folders)


def write_page(
    run: Path, *, dataset: Dataset, config: Config, output: Path | None = None, worst: int = 200
) -> Path:
    """Write a run's page and return its path.

    Args:
      run: the run's directory, with the records of an evaluation.
      dataset: that the run was evaluated on, for the thumbnails.
      config: the run's.
      output: the file; ``page.html`` in the run's directory if None.
      worst: how many queries are shown.

    Raises:
      UserError: if a package is absent, the run was not evaluated or its files are damaged, the
        data set is another one, or an image cannot be shown.
    """
    require_packages(_PACKAGES, extra="page")
    records = read_records(run)
    if records.neighbors is None:
        raise UserError(
            f"{run} was evaluated by a version that kept no neighbours; run its command into "
            "another --workdir, or see it by mmljax atlas"
        )
    if records.protocol != evaluation_protocol(dataset, config):
        raise UserError(
            f"the data set is not the one that {run} was evaluated on; name the folder that holds "
            "it by --directory"
        )
    queries, images = _worst_queries(records, records.neighbors, dataset, count=worst)
    context = {
        "run": run.resolve().name,
        "step": records.step,
        "scores": _score_table(read_metrics(run), records.step),
        "stamp": records.protocol,
        "curves": _curves(run),
        "categories": _category_table(records),
        "left_out": max(0, len(set(_categories(records))) - _CATEGORIES),
        "queries": queries,
        "count": len(records.names),
        "shown": sorted({query.category for query in queries}),
    }
    path = run / PAGE if output is None else output
    text = _fitting(context, images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); name another --output") from error
    return path


def require_packages(packages: Mapping[str, str], *, extra: str) -> None:
    """Check, before any work is done, that optional packages are there.

    Args:
      packages: what is shown of each, by the name of its module.
      extra: of mmljax, that brings them.

    Raises:
      UserError: naming the first that is absent.
    """
    for module, name in packages.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"this needs {name}, which is absent; pip install 'mmljax[{extra}]'")


def _worst_queries(
    records: Records, neighbors: Neighbors, dataset: Dataset, *, count: int
) -> tuple[list[Query], list[Image]]:
    """The queries with the least MAP@R, then the least reciprocal rank, and every picture once."""
    precision, reciprocal = records.values["map@r"], records.values["mrr"]
    counted = np.flatnonzero(~np.isnan(precision))
    order = np.lexsort((records.names[counted], reciprocal[counted], precision[counted]))
    side = _SIZES[0][0]
    pictures: dict[tuple[int, str], int] = {}
    images: list[Image] = []

    def picture(split: Split, places: Mapping[str, int], name: str) -> int:
        key = id(split), name
        if key not in pictures:
            pictures[key] = len(images)
            images.append(thumbnail(split, places[name], side=side))
        return pictures[key]

    gallery = dataset.gallery or dataset.query
    of_query, of_gallery = _places(dataset.query), _places(gallery)
    queries = []
    for row in counted[order[:count]]:
        name, label = str(records.names[row]), records.labels[row]
        found = []
        for place, similarity in zip(neighbors.rows[row], neighbors.similarity[row], strict=True):
            other = str(neighbors.names[place])
            shown = picture(gallery, of_gallery, other)
            right = bool(neighbors.labels[place] == label)
            found.append(Found(other, shown, right, float(similarity)))
        rank = next((i for i, one in enumerate(found, 1) if one.right), None)
        queries.append(
            Query(
                name=name,
                category=category(name, int(label)),
                picture=picture(dataset.query, of_query, name),
                rank=rank,
                average_precision=float(precision[row]),
                found=found,
            )
        )
    return queries, images


def _places(split: Split) -> dict[str, int]:
    return {str(name): row for row, name in enumerate(split.names)}


def _score_table(rows: Sequence[Mapping[str, Any]], step: int) -> list[tuple[str, list[str]]]:
    """Scores in percent: of the evaluation at ``step``, untrained, and by chance."""
    evaluations = {row["step"]: row for row in rows if row["kind"] == "evaluation"}
    if step not in evaluations:
        raise UserError(f"metrics.jsonl has no evaluation of step {step}; evaluate the run again")
    scores, untrained = evaluations[step], evaluations.get(0, {})
    chance = {"recall@1": scores.get("chance", math.nan)}
    return [
        (score_name(key), [_percent(column.get(key)) for column in (scores, untrained, chance)])
        for key in score_keys(scores)
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def _categories(records: Records) -> list[str]:
    return [category(str(n), int(y)) for n, y in zip(records.names, records.labels, strict=True)]


def _category_table(records: Records) -> dict[str, Any]:
    """Mean scores by category, the worst first: header, and a row of texts per category."""
    keys = score_keys(records.values)
    kinds, place = np.unique(_categories(records), return_inverse=True)
    counted = ~np.isnan(records.values[keys[0]])
    sizes = np.bincount(place[counted], minlength=len(kinds))
    means = {
        key: np.bincount(place[counted], records.values[key][counted], minlength=len(kinds))
        / np.maximum(sizes, 1)
        for key in keys
    }
    order = [row for row in np.argsort(means[keys[0]], kind="stable") if sizes[row]]
    rows = [
        [str(kinds[row]), str(sizes[row]), *(_percent(float(means[key][row])) for key in keys)]
        for row in order[:_CATEGORIES]
    ]
    return {"header": ["category", "queries", *map(score_name, keys)], "rows": rows}


def _curves(run: Path) -> str:
    from mmljax.runs.plot import contribution_figure, svg_of

    figure = contribution_figure(read_run(run))
    return "" if figure is None else svg_of(figure)


def _fitting(context: Mapping[str, Any], images: Sequence[Image]) -> str:
    """The page with the largest thumbnails that keep it within ``LIMIT``, or with the smallest."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmljax.runs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    text = ""
    for side, quality in _SIZES:
        files = (webp(image, side=side, quality=quality) for image in images)
        pictures = [base64.b64encode(file).decode() for file in files]
        text = template.render(context, pictures=pictures)
        if len(text.encode()) <= LIMIT:
            break
    return text

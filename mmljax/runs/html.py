"""One-page HTML report of a run: ``page.html``, a single file without external references.

It shows the scores with the evaluation protocol, the curves of the contributions, the scores by
category, and the queries with the worst scores beside their nearest gallery images. It reads the
records of the last evaluation (``queries.npz``), ``metrics.jsonl``, and the data set's images for
the thumbnails; it does not run the model. All text from the data is escaped.
"""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmljax.data.thumbnails import thumbnail, webp
from mmljax.errors import UserError, require
from mmljax.files import write_atomically
from mmljax.retrieval.records import QUERIES, Neighbors, Records, evaluation_protocol, read_records
from mmljax.runs.plot import contribution_figure, svg_of, write_figure
from mmljax.runs.reader import read_run
from mmljax.runs.writer import (
    METRICS,
    Row,
    percent,
    read_metrics,
    score_keys,
    score_name,
    size_table,
)
from mmljax.text import one_line

if TYPE_CHECKING:  # at run time these would import jax before the arguments are checked
    from pandas import DataFrame
    from PIL.Image import Image

    from mmljax.config import Config
    from mmljax.types import Dataset, Split

PAGE, PLOT = "page.html", "contributions.png"
LIMIT = 4_800_000
"""Most bytes of a page; thumbnails shrink until it fits, then queries are left out."""

_log = logging.getLogger(__name__)

_MOST = 1000  # queries; more would not fit, whatever the size of the thumbnails
_SIZES = (
    (128, 75),
    (112, 65),
    (96, 55),
    (80, 45),
    (64, 40),
    (48, 30),
)  # side in pixels, WebP quality
_CATEGORIES = 300  # most rows in the table of categories


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
    rank: int | None  # of the first correct image, None if none is shown
    average_precision: float  # at R
    found: list[Found]


def category(name: str, label: int) -> str:
    """The category of an image, from its name.

    ``WOMEN/Dresses`` for In-Shop's ``img/WOMEN/Dresses/id_00000002/02_1_front.jpg``; the class if
    images lie in folders by class; else the item's number.
    """
    folders = name.split("/")[:-1]
    if len(folders) > 1 and folders[0] in ("img", "Img"):
        folders = folders[1:]
    if not folders:
        return f"item {label}"
    return "/".join(folders[:-1] or folders)


def write_plot_and_page(run: Path, *, dataset: Dataset, config: Config) -> dict[str, Path]:
    """Write ``contributions.png`` and ``page.html`` of a finished run; a failure is a warning.

    Returns:
      Paths of the files that were written, by ``plot`` and ``page``.
    """
    written: dict[str, Path] = {}
    table: DataFrame | None = None
    try:  # any error: a finished run must not fail because of its report
        for package in ("pandas", "matplotlib"):
            require(package, extra="plot", purpose=PLOT)
        table = read_run(run)
        if (figure := contribution_figure(table)) is not None:
            written["plot"] = write_figure(figure, run / PLOT)
    except Exception as error:
        _log.warning("no %s: %s", PLOT, one_line(error))
    try:
        written["page"] = write_page(run, dataset=dataset, config=config, table=table)
    except Exception as error:
        _log.warning("no %s: %s", PAGE, one_line(error))
    return written


def write_page(
    run: Path,
    *,
    dataset: Dataset,
    config: Config,
    output: Path | None = None,
    worst: int = 200,
    table: DataFrame | None = None,
) -> Path:
    """Write a run's page and return its path.

    Args:
      run: the run's directory, with the records of an evaluation.
      dataset: the data set on which the run was evaluated, for the thumbnails.
      config: the run's config.
      output: the file; ``page.html`` in the run's directory if None.
      worst: number of queries shown; fewer where the page would exceed ``LIMIT``.
      table: the run's tidy table, if it was read already.

    Raises:
      UserError: if a package is absent, the run was not evaluated or its files are damaged, the
        data set is another one, or an image cannot be decoded.
    """
    check_packages()
    records, neighbors = usable_records(run, dataset, config)
    queries, images = worst_queries(records, neighbors, dataset, count=min(worst, _MOST))
    evaluations = _evaluations(run, records.step)
    context = {
        "run": run.resolve().name,
        "step": records.step,
        "scores": _score_table(run, evaluations, records.step),
        "by_size": size_table(evaluations[records.step]),
        "protocol": records.protocol,
        "curves": _curves(read_run(run) if table is None else table),
        "categories": _category_table(records),
        "left_out": max(0, len(set(_categories(records))) - _CATEGORIES),
        "count": len(records.names),
    }
    path = run / PAGE if output is None else output
    text, shown = _fitting(context, queries, images)
    if shown < (asked := min(worst, _counted(records).size)):
        _log.warning(
            "%s shows %d of %d queries; more do not fit in %.1f MB", path, shown, asked, LIMIT / 1e6
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({one_line(error)}); give another --output"
        ) from error
    return path


def check_packages() -> None:
    """Check that the optional packages of a page are installed.

    Raises:
      UserError: naming the first that is absent.
    """
    for package in ("jinja2", "PIL", "matplotlib", "pandas"):
        require(package, extra="page", purpose="the page of a run")


def usable_records(run: Path, dataset: Dataset, config: Config) -> tuple[Records, Neighbors]:
    """The run's records and their neighbours.

    Raises:
      UserError: if they lack what the page shows, are of another data set, or hold scores that are
        not between 0 and 1.
    """
    records = read_records(run)
    if records.neighbors is None:
        raise UserError(
            f"{run} was evaluated by a version that stored no neighbours; run its command with "
            "another --workdir, or use mmljax atlas"
        )
    if records.protocol != evaluation_protocol(dataset, config):
        raise UserError(
            f"the data set is not the one on which {run} was evaluated; give its folder by "
            "--directory"
        )
    for key in ("map@r", "mrr"):
        if key not in records.values:
            raise UserError(f"{run / QUERIES} has no score {key!r}; evaluate the run again")
    for key, values in records.values.items():
        if np.any((values < 0) | (values > 1)):
            raise UserError(
                f"{run / QUERIES}: scores {key!r} are not all between 0 and 1; evaluate the run "
                "again"
            )
    return records, records.neighbors


def _counted(records: Records) -> np.ndarray:
    """Rows of the queries that have a match, and so a score."""
    return np.flatnonzero(~np.isnan(records.values["map@r"]))


def worst_queries(
    records: Records, neighbors: Neighbors, dataset: Dataset, *, count: int
) -> tuple[list[Query], list[Image]]:
    """The queries with the lowest MAP@R, then the lowest reciprocal rank, and each image once."""
    precision, reciprocal = records.values["map@r"], records.values["mrr"]
    counted = _counted(records)
    order = np.lexsort((records.names[counted], reciprocal[counted], precision[counted]))
    side = _SIZES[0][0]
    pictures: dict[tuple[int, str], int] = {}
    images: list[Image] = []

    def picture(split: Split, places: Mapping[str, int], name: str) -> int:
        key = id(split), name
        if name not in places:
            raise UserError(
                f"{QUERIES} names the image {name[:200]!r}, which the data set does not have; "
                "evaluate the run again"
            )
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


def _evaluations(run: Path, step: int) -> dict[int, Row]:
    """The rows of the run's evaluations, among them that of a step."""
    evaluations = {row["step"]: row for row in read_metrics(run, kind="evaluation")}
    if step not in evaluations:
        raise UserError(f"{METRICS} has no evaluation of step {step}; evaluate the run again")
    return evaluations


def _score_table(run: Path, evaluations: Mapping[int, Row], step: int) -> list[list[str]]:
    """The names of the columns, and rows of a score's name and its values in percent.

    The columns are the evaluation at ``step``, that of the records, the untrained network, the
    pretrained features if they were scored, and chance.
    """
    scores = evaluations[step]
    columns = {"trained": scores, "untrained": evaluations.get(0, {})}
    if features := read_metrics(run, kind="pretrained"):
        columns["pretrained"] = features[-1]
    columns["chance"] = {"recall@1": scores.get("chance", math.nan)}
    table = [["%", *columns]]
    for key in score_keys(scores):
        values = [column.get(key, math.nan) for column in columns.values()]
        if any(value < 0 or value > 1 for value in values):
            raise UserError(
                f"{METRICS}: {key!r} of an evaluation is not between 0 and 1; evaluate the run "
                "again"
            )
        table.append([score_name(key), *map(percent, values)])
    return table


def _categories(records: Records) -> list[str]:
    return [category(str(n), int(y)) for n, y in zip(records.names, records.labels, strict=True)]


def _category_table(records: Records) -> dict[str, Any]:
    """Mean scores by category, the worst first: the header, and a row of cells per category."""
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
        [str(kinds[row]), str(sizes[row]), *(percent(float(means[key][row])) for key in keys)]
        for row in order[:_CATEGORIES]
    ]
    return {"header": ["category", "queries", *map(score_name, keys)], "rows": rows}


def _curves(table: DataFrame) -> str:
    figure = contribution_figure(table)
    return "" if figure is None else svg_of(figure)


def _fitting(
    context: Mapping[str, Any], queries: list[Query], images: Sequence[Image]
) -> tuple[str, int]:
    """The page within ``LIMIT`` and its number of queries.

    The thumbnails are the largest that fit; if the smallest do not, the last queries are left out.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmljax.runs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")

    def render() -> tuple[str, int]:
        shown = sorted({query.category for query in queries})
        text = template.render(context, queries=queries, shown=shown, pictures=pictures)
        return text, len(text.encode())

    for side, quality in _SIZES:
        files = (webp(image, side=side, quality=quality) for image in images)
        pictures = [base64.b64encode(file).decode() for file in files]
        text, size = render()
        if size <= LIMIT:
            break
    while size > LIMIT and queries:
        queries = queries[: int(0.98 * len(queries) * LIMIT / size)]
        used = [query.picture for query in queries]
        used += [one.picture for query in queries for one in query.found]
        pictures = pictures[: 1 + max(used, default=-1)]  # numbered as they first appear
        text, size = render()
    return text, len(queries)

"""The page of a run shows the evaluation; it is escaped, small, and of the run's data set."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import commands as verbs
import evaluated
from benchmarks import pictures
from mmljax.errors import UserError
from mmljax.retrieval import records as protocol
from mmljax.runs import html as page
from mmljax.runs.reader import load_run_data

for package in ("jinja2", "PIL", "matplotlib", "pandas"):
    pytest.importorskip(package, reason=f"a page needs {package}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return evaluated.write_evaluated_run(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def text(run):
    return page.write_page(run.folder, dataset=run.dataset, config=run.config).read_text()


class Elements(HTMLParser):
    """All tags with their attributes, in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def worst_order(run):
    """Rows of the queries, by the definition: least MAP@R, then least reciprocal rank, by name."""
    values, names = run.result.per_query, run.dataset.query.names
    rows = [row for row in range(len(names)) if not np.isnan(values["map@r"][row])]
    return sorted(rows, key=lambda r: (values["map@r"][r], values["mrr"][r], str(names[r])))


def test_queries_come_worst_first_with_their_exact_neighbours(run, text):
    parts = text.split('<li class="query"')[1:]
    names, gallery = run.dataset.query.names, run.dataset.gallery
    order = worst_order(run)
    assert len(parts) == len(order) == 36
    for part, row in zip(parts, order, strict=True):
        assert html.escape(str(names[row])).replace("&#x27;", "&#39;") in part
        found = re.findall(r'<li class="(right|wrong)" title="([^"]+)"', part)
        expected = [
            (
                "right" if gallery.labels[place] == run.dataset.query.labels[row] else "wrong",
                str(gallery.names[place]),
            )
            for place in run.result.neighbors[row]
        ]
        assert [(mark, html.unescape(name)) for mark, name in found] == expected


def test_scores_are_those_of_the_ledger(run, text):
    shown = f"{100 * run.result.scores['recall@1']:.1f}"
    assert f'<th scope="row">Recall@1</th><td>{shown}</td><td>25.0</td>' in text
    names = re.findall(r'<th scope="row">([^<]+)</th>', text)[:6]
    assert names == ["Recall@1", "Recall@4", "Recall@10", "R-precision", "MAP@R", "MRR"]


def test_scores_by_dimensions_are_a_table_of_their_own(run, text):
    table = text.split("By the number of dimensions")[1].split("</table>")[0]
    assert re.findall(r'scope="col">([^<]+)<', table) == ["dimensions", "Recall@1", "MAP@R"]
    whole = [f"{100 * run.result.scores[key]:.1f}" for key in ("recall@1", "map@r")]
    rows = re.findall(r'scope="row">([^<]+)</th><td>([^<]+)</td><td>([^<]+)</td>', table)
    assert rows == [("4", "12.5", "6.2"), ("all", *whole)]


def test_scores_by_category_are_means_over_its_queries(run, text):
    table = text.split('id="categories"')[1].split("</section>")[0]
    names = [str(name) for name in run.dataset.query.names]
    recalls = run.result.per_query["recall@1"]
    rows = dict(re.findall(r'<th scope="row">([^<]+)</th><td>\d+</td><td>([\d.]+)</td>', table))
    assert {html.unescape(name) for name in rows} == set(evaluated.KINDS)
    for name, value in rows.items():
        inside = [f"/{html.unescape(name)}/" in other for other in names]
        assert float(value) == pytest.approx(100 * recalls[inside].mean(), abs=0.051)
    assert [*rows.values()] == sorted(rows.values(), key=float)


def test_names_from_the_data_are_escaped(text):
    assert "<b>" not in text
    assert "UNISEX/&lt;b&gt;&amp;&#39;hats&#39;" in text


def test_nothing_refers_to_the_outside(text):
    for tag, attributes in Elements(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert "src" not in attributes
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#"), attributes
    assert set(re.findall(r"url\((\w+):", text)) <= {"data"}
    assert "default-src 'none'" in text


def test_each_picture_is_embedded_once(run, text):
    pictures = re.findall(r"base64,([\w+/=]+)", text)
    shown = {("query", name) for name in run.dataset.query.names}
    shown |= {
        ("gallery", run.dataset.gallery.names[place])
        for row in worst_order(run)
        for place in run.result.neighbors[row]
    }
    assert len(pictures) == len(shown)
    used = {int(k) for k in re.findall(r'class="picture p(\d+)"', text)}
    assert used == set(range(len(shown)))


def test_thumbnails_shrink_until_the_page_fits(run, tmp_path, monkeypatch):
    options = {"dataset": run.dataset, "config": run.config, "worst": 4}
    whole = page.write_page(run.folder, output=tmp_path / "whole.html", **options)
    limit = whole.stat().st_size - 1
    monkeypatch.setattr(page, "LIMIT", limit)
    fitted = page.write_page(run.folder, output=tmp_path / "fitted.html", **options)
    assert fitted.stat().st_size <= limit


@pytest.mark.slow
def test_two_hundred_queries_take_less_than_five_megabytes(tmp_path):
    """Of noise, which compresses worse than photographs do."""
    run = evaluated.write_evaluated_run(tmp_path, items=70, views=6)
    path = page.write_page(run.folder, dataset=run.dataset, config=run.config)
    assert path.read_text().count('<li class="query"') == 200
    assert path.stat().st_size < 5e6


def test_fewer_queries_may_be_shown(run, tmp_path):
    path = page.write_page(
        run.folder, dataset=run.dataset, config=run.config, output=tmp_path / "p.html", worst=3
    )
    assert path.read_text().count('<li class="query"') == 3


def test_command_writes_into_the_run(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    (copy / "page.html").unlink(missing_ok=True)
    verbs.run("page", copy)
    assert capsys.readouterr().out.strip() == str(copy / "page.html")
    assert "<h1>copy</h1>" in (copy / "page.html").read_text()


def test_another_data_set_is_refused(run, tmp_path):
    data = Path(shutil.copytree(run.config.data.directory, tmp_path / "data"))
    listed = data / "Eval" / "list_eval_partition.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join([str(int(lines[0]) - 1), *lines[1:-1], ""]))
    with pytest.raises(UserError, match="not the one on which .* was evaluated"):
        verbs.run("page", run.folder, "--directory", data)
    assert not (data / "page.html").exists()


def test_records_without_neighbours_are_refused(run, tmp_path):
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    protocol.write_records(copy, protocol.read_records(copy)._replace(neighbors=None))
    with pytest.raises(UserError, match="stored no neighbours"):
        page.write_page(copy, dataset=run.dataset, config=run.config)


def test_a_run_that_was_not_evaluated_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="--workdir of a run"):
        verbs.run("page", tmp_path / "none")
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(UserError, match="no evaluation of step 20"):
        page.write_page(copy, dataset=run.dataset, config=run.config)


def test_queries_are_left_out_where_the_page_would_not_fit(run, tmp_path, monkeypatch, caplog):
    """Of all the queries asked for, the worst are shown, with their own pictures."""
    options = {"dataset": run.dataset, "config": run.config}
    path = page.write_page(run.folder, output=tmp_path / "some.html", worst=12, **options)
    twelve = path.read_text()
    monkeypatch.setattr(page, "LIMIT", int(0.85 * path.stat().st_size))
    monkeypatch.setattr(page, "_SIZES", page._SIZES[:1])
    caplog.clear()
    path = page.write_page(run.folder, output=tmp_path / "fewer.html", worst=5000, **options)
    assert path.stat().st_size <= page.LIMIT
    fewer = path.read_text()
    count = fewer.count('<li class="query"')
    assert 1 <= count < 12
    (record,) = caplog.records
    assert f"shows {count} of 36 queries" in record.getMessage()
    items = [text.split('<li class="query"')[1:] for text in (fewer, twelve)]
    for a, b in zip(items[0][: count - 1], items[1], strict=False):
        assert a == b
    assert f"The {count} of 36 queries" in fewer
    used = {int(k) for k in re.findall(r'class="picture p(\d+)"', fewer)}
    assert used == set(range(len(re.findall(r"base64,", fewer))))


def test_a_page_that_cannot_be_written_leaves_nothing(run, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"page.html cannot be written .*give another --output"):
        page.write_page(
            run.folder, dataset=run.dataset, config=run.config, output=tmp_path / "page.html"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def changed_records(run, folder, change):
    """A copy of the run whose records are changed."""
    copy = Path(shutil.copytree(run.folder, folder / "copy"))
    protocol.write_records(copy, change(protocol.read_records(copy)))
    return copy


def foreign_names(records):
    names = records.names.copy()
    names[:] = [f"img/{row}.jpg" for row in range(len(names))]
    return records._replace(names=names)


def foreign_neighbors(records):
    names = np.array(["no/such.jpg"] * len(records.neighbors.names))
    return records._replace(neighbors=records.neighbors._replace(names=names))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (foreign_names, "names the image 'img/.*', which the data set does not have"),
        (foreign_neighbors, "names the image 'no/such.jpg'"),
        (lambda r: r._replace(values={}), "has no score 'map@r'"),
        (
            lambda r: r._replace(values={"map@r": r.values["map@r"], "recall@1": r.values["mrr"]}),
            "has no score 'mrr'",
        ),
        (
            lambda r: r._replace(values={**r.values, "recall@4": 7 + r.values["recall@4"]}),
            "'recall@4' are not all between 0 and 1",
        ),
        (
            lambda r: r._replace(values={**r.values, "mrr": -r.values["mrr"]}),
            "'mrr' are not all between 0 and 1",
        ),
    ],
)
def test_records_that_do_not_fit_are_refused(run, tmp_path, change, said):
    copy = changed_records(run, tmp_path, change)
    with pytest.raises(UserError, match=said):
        page.write_page(copy, dataset=run.dataset, config=run.config)


def test_a_score_above_one_is_refused(run, tmp_path):
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1]) | {"recall@1": 7.0}
    (copy / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row), ""]))
    with pytest.raises(UserError, match="'recall@1' of an evaluation is not between 0 and 1"):
        page.write_page(copy, dataset=run.dataset, config=run.config)


def test_no_data_is_written_for_a_run_whose_data_is_gone(run, tmp_path):
    """Only training writes synthetic images; a foreign run may name any directory."""
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["data"] |= {"source": "synthetic", "directory": str(tmp_path / "named")}
    (copy / "config.json").write_text(json.dumps(config))
    for directory in (None, tmp_path / "typo"):
        with pytest.raises(UserError):
            load_run_data(copy, directory=directory and str(directory))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# After training.


def finish(run, folder):
    return page.write_plot_and_page(folder, dataset=run.dataset, config=run.config)


def test_a_finished_run_gets_its_plot_and_page(run, tmp_path):
    copy = Path(shutil.copytree(run.folder, tmp_path / "$a $b"))
    written = finish(run, copy)
    assert written == {"plot": copy / "contributions.png", "page": copy / "page.html"}
    assert written["plot"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "<h1>$a $b</h1>" in written["page"].read_text()


def failing(*arguments, **options):
    raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder, patch: (folder / "metrics.jsonl").unlink(), "does not exist"),
        (lambda folder, patch: (folder / "metrics.jsonl").write_text("damaged\n"), "not a row"),
        (lambda folder, patch: patch.setattr(page, "svg_of", failing), "first line second line"),
        (lambda folder, patch: patch.setattr(page, "webp", failing), "first line second line"),
        (lambda folder, patch: patch.setattr(page, "write_figure", failing), "first line second"),
        (
            lambda folder, patch: patch.setitem(sys.modules, "matplotlib", None),
            r"pip install 'mmljax\[plot\]'",
        ),
        (
            lambda folder, patch: patch.setitem(sys.modules, "jinja2", None),
            r"pip install 'mmljax\[page\]'",
        ),
    ],
)
def test_no_plot_and_no_page_are_a_warning(run, tmp_path, monkeypatch, caplog, break_it, said):
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    with monkeypatch.context() as patch:
        break_it(copy, patch)
        written = finish(run, copy)
    assert len(written) < 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 - len(written)
    assert re.search(said, messages[0])
    assert not any("\n" in text for text in messages)
    assert not list(copy.glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "WOMEN/Dresses"),
        ("001.Albatross/a.jpg", "001.Albatross"),
        ("img/001.Albatross/a.jpg", "001.Albatross"),
        ("a.jpg", "item 7"),
        ("images[3]", "item 7"),
    ],
)
def test_category(name, kind):
    assert page.category(name, 7) == kind


def test_the_pictures_of_the_readme_are_drawn_and_small(run, tmp_path):
    records, neighbors = page.usable_records(run.folder, run.dataset, run.config)
    queries, images = page.worst_queries(records, neighbors, run.dataset, count=3)
    figure = pictures.worst_figure(queries, images)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 3 * (1 + min(7, *(len(query.found) for query in queries)))
    assert [axes.get_title() for axes in shown].count("query") == 3
    pictures.write(figure, tmp_path / "worst.png")
    assert (tmp_path / "worst.png").read_bytes()[:4] == b"\x89PNG"


def test_the_readme_shows_two_pictures_of_at_most_100_kilobytes():
    root = Path(__file__).parents[2]
    names = re.findall(r"!\[[^]]+\]\((docs/images/\S+\.png)\)", (root / "README.md").read_text())
    assert len(names) == 2
    assert all(0 < (root / name).stat().st_size < 100_000 for name in names)

"""A run's page: what stands in it is the evaluation's, escaped, small, and of this data set."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import evaluated
from mmljax.errors import UserError
from mmljax.retrieval import records as protocol
from mmljax.runs import html as page

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
    page.main([str(copy)])
    assert capsys.readouterr().out.strip() == str(copy / "page.html")
    assert "<h1>copy</h1>" in (copy / "page.html").read_text()


def test_another_data_set_is_refused(run, tmp_path):
    data = Path(shutil.copytree(run.config.data.directory, tmp_path / "data"))
    listed = data / "Eval" / "list_eval_partition.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join([str(int(lines[0]) - 1), *lines[1:-1], ""]))
    with pytest.raises(UserError, match="not the one that .* was evaluated on"):
        page.main([str(run.folder), "--directory", str(data)])


def test_records_without_neighbours_are_refused(run, tmp_path):
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    protocol.write_records(copy, protocol.read_records(copy)._replace(neighbors=None))
    with pytest.raises(UserError, match="kept no neighbours"):
        page.write_page(copy, dataset=run.dataset, config=run.config)


def test_a_run_that_was_not_evaluated_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="name the --workdir of a run"):
        page.main([str(tmp_path / "none")])
    copy = Path(shutil.copytree(run.folder, tmp_path / "copy"))
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(UserError, match="no evaluation of step 20"):
        page.write_page(copy, dataset=run.dataset, config=run.config)


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

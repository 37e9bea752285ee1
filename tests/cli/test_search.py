"""Answers to query images, against a slow stable argsort in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import saved
from commands import run
from mmljax.config import ModelConfig
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference import embed, search
from mmljax.inference.embedding_file import FORMAT, embeddings_table, read_gallery
from mmljax.inference.parquet_parts import METADATA, metadata
from mmljax.retrieval.quantization import decode, quantize

pytestmark = pytest.mark.usefixtures("loaded_once")


def write_gallery(path: Path, vectors: np.ndarray, labels: np.ndarray) -> Path:
    names = np.array([f"image {i}" for i in range(len(vectors))])
    table = embeddings_table(names, labels, vectors)
    metadata = {"format": FORMAT, "rows": len(vectors), "embedding_size": vectors.shape[1]}
    table = table.replace_schema_metadata({METADATA: json.dumps(metadata).encode()})
    parquet.write_table(table, path, row_group_size=7)
    return path


def slow_search(queries, gallery, *, k):
    similarity = queries.astype(np.float64) @ gallery.astype(np.float64).T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(similarity, order, axis=1)


def exact_unit_vectors(random: np.random.Generator, rows: int) -> np.ndarray:
    """Four of six coordinates are +-1/2: inner products are exact and many are equal."""
    vectors = np.zeros((rows, 6), np.float32)
    for row in vectors:
        row[random.permutation(6)[:4]] = random.choice([-0.5, 0.5], 4)
    return vectors


@pytest.mark.parametrize("chunk", [1, 128, 32768])
@pytest.mark.parametrize("rows", [5, 300])
def test_answers_equal_a_slow_argsort_with_ties(tmp_path, monkeypatch, rows, chunk):
    random = np.random.default_rng(rows)
    gallery, queries = exact_unit_vectors(random, rows), exact_unit_vectors(random, 9)
    labels = random.integers(-1, 4, rows)
    monkeypatch.setattr(search, "CHUNK", chunk)
    opened = read_gallery(write_gallery(tmp_path / "g.parquet", gallery, labels))
    np.testing.assert_array_equal(opened.vectors, gallery)
    names = np.array([f"q{i}" for i in range(9)])
    table = search.search(opened, names, queries, k=5)
    order, similarity = slow_search(queries, gallery, k=5)
    assert table["query"].to_pylist() == np.repeat(names, 5).tolist()
    assert table["rank"].to_pylist() == [1, 2, 3, 4, 5] * 9
    assert table["id"].to_pylist() == [f"image {i}" for i in order.ravel()]
    assert table["similarity"].to_pylist() == similarity.ravel().tolist()
    expected = [None if labels[i] < 0 else labels[i] for i in order.ravel()]
    assert table["label"].to_pylist() == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "1 of 300 gallery .* not finite: the first is row 7"), (2.0, "not of unit length")],
)
def test_a_gallery_row_that_cannot_be_ranked_is_refused(tmp_path, value, message) -> None:
    random = np.random.default_rng(0)
    gallery = exact_unit_vectors(random, 300)
    gallery[7, 0] = value
    opened = read_gallery(write_gallery(tmp_path / "g.parquet", gallery, np.arange(300)))
    with pytest.raises(UserError, match=message):
        search.search(opened, np.array(["q"]), exact_unit_vectors(random, 1), k=5)


@pytest.fixture(scope="module")
def gallery(saved_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("gallery") / "gallery.parquet"
    run("embed", saved_run.folder, "--split=gallery", "--output", path)
    return path


def ask(folder: Path, gallery: Path, *more: str | Path) -> int:
    return run("search", folder, "--embeddings", gallery, "--split=query", "--k=4", *more)


def test_a_run_answers_its_queries(saved_run, gallery, tmp_path, capsys):
    folder, dataset = saved_run.folder, load.load_dataset(saved_run.config)
    queries, _ = saved.own_embeddings(saved_run, dataset.query, step=5)
    among, labels = saved.own_embeddings(saved_run, dataset.gallery, step=5)
    order, similarity = slow_search(queries, among, k=4)

    ask(folder, gallery)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(search.COLUMNS)
    assert len(lines) == 1 + 24 * 4
    cells = [line.split() for line in lines[1:]]
    assert [row[3] for row in cells] == dataset.gallery.names[order.ravel()].tolist()
    assert [row[0] for row in cells] == np.repeat(dataset.query.names, 4).tolist()
    assert [int(row[1]) for row in cells] == [1, 2, 3, 4] * 24
    np.testing.assert_allclose([float(r[2]) for r in cells], similarity.ravel(), atol=1e-4)
    assert [int(row[4]) for row in cells] == labels[order.ravel()].tolist()

    ask(folder, gallery, "--output", tmp_path / "a.parquet")
    ask(folder, gallery, "--output", tmp_path / "a.jsonl")
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["id"] for row in rows] == [row[3] for row in cells]
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_interrupted_and_resumed_gives_the_same_bytes(
    saved_run, gallery, tmp_path, monkeypatch, name
):
    whole, path = tmp_path / f"whole-{name}", tmp_path / name
    small = "--rows-per-part=16"
    ask(saved_run.folder, gallery, small, "--output", whole)
    before, calls = embed.embed_images, []

    def interrupt(trained, split, **options):
        calls.append(len(split.labels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return before(trained, split, **options)

    monkeypatch.setattr(embed, "embed_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ask(saved_run.folder, gallery, small, "--output", path)
    with pytest.raises(UserError, match="k: 4 -> 3"):
        ask(saved_run.folder, gallery, small, "--output", path, "--k=3")
    ask(saved_run.folder, gallery, small, "--output", path)
    assert calls == [16, 8, 8]
    assert path.read_bytes() == whole.read_bytes()


@pytest.fixture(scope="module", params=["int8", "binary"])
def small_gallery(request, saved_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("gallery") / f"{request.param}.parquet"
    arguments = "embed", saved_run.folder, "--split=gallery", "--rows-per-part=16"
    run(*arguments, "--output", path, f"--dtype={request.param}")
    with pytest.raises(UserError, match=f"dtype: '{request.param}' -> 'float32'"):
        run(*arguments, "--output", path)
    return path


def test_a_small_gallery_holds_what_a_plain_one_holds_and_its_codes(gallery, small_gallery):
    plain, small = parquet.read_table(gallery), parquet.read_table(small_gallery)
    assert small.column_names == [*plain.column_names, "code", "scale", "error"]
    assert small.select(plain.column_names).cast(plain.schema).equals(plain)
    vectors = np.array(plain["embedding"].to_pylist(), np.float32)
    codes = quantize(vectors, dtype=small_gallery.stem)
    opened = read_gallery(small_gallery)
    assert opened.vectors is None
    assert isinstance(opened.codes.values, np.memmap)
    for name in ("values", "scale", "error"):
        np.testing.assert_array_equal(getattr(opened.codes, name), getattr(codes, name))


def test_rescored_answers_are_those_of_float32_and_say_what_is_proved(
    saved_run, gallery, small_gallery, tmp_path, monkeypatch, capsys
):
    def rows(name: str, searched: Path, *more: str) -> list[dict]:
        path = tmp_path / name
        ask(saved_run.folder, searched, *more, "--rows-per-part=16", "--output", path)
        return parquet.read_table(path).to_pylist()

    plain = rows("plain.parquet", gallery)
    whole = rows("whole.parquet", small_gallery, "--rescore=1000")
    assert "24 of 24 queries are proved" in capsys.readouterr().err
    assert whole == [row | {"proved": True} for row in plain]

    alone = rows("alone.parquet", small_gallery)
    assert "proved" not in alone[0]
    opened = read_gallery(small_gallery)
    decoded = decode(opened.codes.values, opened.codes.scale, size=opened.codes.size)
    dataset = load.load_dataset(saved_run.config)
    queries, _ = saved.own_embeddings(saved_run, dataset.query, step=5)
    _, similarity = slow_search(queries, np.asarray(decoded), k=4)
    np.testing.assert_allclose([row["similarity"] for row in alone], similarity.ravel(), atol=1e-6)

    few = rows("few.parquet", small_gallery, "--rescore=6")
    proved = sum(row["proved"] for row in few) // 4
    assert f"{proved} of 24 queries are proved" in capsys.readouterr().err
    for ours, theirs in zip(few, plain, strict=True):
        assert not ours["proved"] or ours == theirs | {"proved": True}
    with pytest.raises(UserError, match="rescore: 6 -> 7"):
        rows("few.parquet", small_gallery, "--rescore=7")
    ask(saved_run.folder, small_gallery, "--rescore=6")
    shown = capsys.readouterr()
    assert f"{proved} of 24 queries are proved" in shown.err
    words = [line.split()[-1] for line in shown.out.splitlines()]
    assert words == ["proved", *("yes" if row["proved"] else "no" for row in few)]


def test_what_cannot_be_rescored(saved_run, gallery, small_gallery):
    with pytest.raises(UserError, match="--rescore=3 is below --k=4"):
        ask(saved_run.folder, small_gallery, "--rescore=3")
    with pytest.raises(UserError, match="--rescore=9: .* float32 embeddings alone.*--dtype int8"):
        ask(saved_run.folder, gallery, "--rescore=9")


@pytest.fixture(scope="module")
def short_gallery(saved_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("gallery") / "short.parquet"
    arguments = "embed", saved_run.folder, "--split=gallery", "--dtype=int8", "--output", path
    run(*arguments, "--dims=6")
    with pytest.raises(UserError, match="embedding_size: 6 -> 7"):
        run(*arguments, "--dims=7")
    return path


def test_the_first_dimensions_are_searched_at_unit_length(
    saved_run, gallery, short_gallery, tmp_path, capsys
):
    dataset = load.load_dataset(saved_run.config)
    cut = []
    for split in (dataset.query, dataset.gallery):
        vectors = saved.own_embeddings(saved_run, split, step=5)[0][:, :6].astype(np.float64)
        cut.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    table, found = parquet.read_table(short_gallery), metadata(short_gallery)
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), cut[1], atol=1e-6)
    assert {len(code) for code in table["code"].to_pylist()} == {6}
    assert (found["embedding_size"], found["first_of"]) == (6, 16)

    order, similarity = slow_search(*cut, k=4)
    ask(
        saved_run.folder,
        short_gallery,
        "--dims=6",
        "--rescore=24",
        "--output",
        tmp_path / "a.jsonl",
    )
    assert "--dims=6 is no size that the run was trained for (16 alone)" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == dataset.gallery.names[order.ravel()].tolist()
    np.testing.assert_allclose([row["similarity"] for row in rows], similarity.ravel(), atol=1e-6)
    assert all(row["proved"] for row in rows)

    run(
        "embed",
        saved_run.folder,
        "--split=gallery",
        "--dims=16",
        "--output",
        tmp_path / "x.parquet",
    )
    assert (tmp_path / "x.parquet").read_bytes() == gallery.read_bytes()
    assert "warning" not in capsys.readouterr().err


def test_queries_and_gallery_have_the_same_number_of_dimensions(
    saved_run, gallery, short_gallery, tmp_path
):
    refused = "dimensions of each embedding, but the queries have"
    for file, more, text in (
        (short_gallery, [], f"6 {refused} 16; search with --dims=6, or .* embed without --dims"),
        (short_gallery, ["--dims=7"], f"6 {refused} 7; search with --dims=6, or .* with --dims=7"),
        (gallery, ["--dims=6"], f"16 {refused} 6; omit --dims, or .* embed with --dims=6"),
        (gallery, ["--dims=17"], "--dims=17 is more than the 16 .* name at most 16"),
        (gallery, ["--dims=0"], "--dims: must be at least 1, found 0"),
    ):
        with pytest.raises(UserError, match=text) as error:
            ask(saved_run.folder, file, *more, "--force")
        assert "\n" not in str(error.value)
    path = tmp_path / "t.json"
    run("threshold", saved_run.folder, "--false-match-rate=0.1", "--dims=6", "--output", path)
    ask(saved_run.folder, short_gallery, "--dims=6", "--threshold", path)
    with pytest.raises(UserError, match="another network .embedding_size 6, of the run 16"):
        ask(saved_run.folder, gallery, "--threshold", path)


def test_the_sizes_of_a_run_have_no_warning(caplog):
    model = ModelConfig(
        embedding_size=16, matryoshka=(2, 4, 16), matryoshka_weights=(0.0, 1.0, 1.0)
    )
    for dims in (4, 16):
        embed._warn_if_untrained(model, dims)
    assert not caplog.records
    embed._warn_if_untrained(model, 2)
    assert "--dims=2 is no size that the run was trained for (4, 16)" in caplog.text


def test_embeddings_of_another_step_are_refused_unless_forced(saved_run, gallery, capsys):
    with pytest.raises(UserError, match="another network.*step 5, of the run 3.*--force"):
        ask(saved_run.folder, gallery, "--step=3")
    ask(saved_run.folder, gallery, "--step=3", "--force")
    shown = capsys.readouterr()
    assert "warning" in shown.err
    assert len(shown.out.splitlines()) == 1 + 24 * 4


def test_a_moved_run_is_the_same(saved_run, gallery, tmp_path, capsys):
    moved = shutil.copytree(saved_run.folder, tmp_path / "elsewhere")
    ask(moved, gallery)
    assert "warning" not in capsys.readouterr().err


def test_more_answers_than_there_are(saved_run, gallery):
    with pytest.raises(UserError, match="--k=25 is more than the 24 rows of"):
        ask(saved_run.folder, gallery, "--k=25")
    for wrong in (["--k=0"], ["--output=x.txt"]):
        with pytest.raises(UserError, match="must"):
            ask(saved_run.folder, gallery, *wrong)


def test_files_that_hold_no_embeddings(saved_run, gallery, tmp_path):
    with pytest.raises(UserError, match=r"absent\.parquet does not exist"):
        ask(saved_run.folder, tmp_path / "absent.parquet")
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(gallery.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a table of mmljax"):
        ask(saved_run.folder, torn)
    other = tmp_path / "answers.parquet"
    table = pa.table({"x": [1]}).replace_schema_metadata({METADATA: b'{"format": "other"}'})
    parquet.write_table(table, other)
    with pytest.raises(UserError, match="holds no embeddings"):
        ask(saved_run.folder, other)
    vectors = np.eye(8, dtype=np.float32)
    small = write_gallery(tmp_path / "small.parquet", vectors, np.zeros(8, np.int32))
    with pytest.raises(UserError, match="size 8, but the run's are of size 16"):
        ask(saved_run.folder, small, "--force")


def test_the_gallery_is_mapped_from_a_file(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    opened = read_gallery(write_gallery(tmp_path / "g.parquet", vectors, np.zeros(20, np.int32)))
    assert isinstance(opened.vectors, np.memmap)

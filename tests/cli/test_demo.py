"""The web page's server: answers as ``mmljax search`` gives, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import saved
from commands import run
from mmljax.cli import demo as verb
from mmljax.cli.command import parse
from mmljax.errors import UserError
from mmljax.inference import demo, demo_server
from mmljax.inference.demo import open_gallery
from mmljax.inference.threshold import FILE, FORMAT

testclient = pytest.importorskip(
    "starlette.testclient", reason="pip install 'mmljax[demo]' brings Starlette"
)
pytest.importorskip("uvicorn", reason="pip install 'mmljax[demo]' brings uvicorn")
Image = pytest.importorskip("PIL.Image", reason="pip install 'mmljax[demo]' brings Pillow")


pytestmark = pytest.mark.usefixtures("loaded_once")


def images_of(colour_run) -> Path:
    return Path(colour_run.config.data.directory) / "img"


@pytest.fixture(scope="module")
def gallery(colour_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "photos.parquet"
    run("embed", colour_run.folder, "--images", images_of(colour_run), "--output", path)
    return path


def load(colour_run, gallery: Path, *more: str | Path) -> demo.Demo:
    words = ["demo", colour_run.folder, "--gallery", gallery, *more]
    return verb.load(parse([str(word) for word in words]))


@pytest.fixture(scope="module")
def loaded(colour_run, gallery):
    return load(colour_run, gallery, "--k=5")


@pytest.fixture
def client(loaded):
    return testclient.TestClient(
        demo_server.make_app(loaded), base_url="http://127.0.0.1:8000", raise_server_exceptions=True
    )


def post(client, contents: bytes, kind: str = "image/png"):
    return client.post("/search", content=contents, headers={"Content-Type": kind})


def encoded(format: str, *, size: tuple[int, int] = (20, 16)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def test_answers_are_those_of_search(colour_run, gallery, client, tmp_path):
    file, output = images_of(colour_run) / "item4/view_2.jpg", tmp_path / "answers.jsonl"
    words = ["--images", file, "--k=5", "--output", output]
    run("search", colour_run.folder, "--embeddings", gallery, *words)
    expected = [json.loads(line) for line in output.read_text().splitlines()]
    response = post(client, file.read_bytes(), "image/jpeg")
    assert response.status_code == 200
    answers = response.json()["answers"]
    assert [row["name"] for row in answers] == [row["id"] for row in expected]
    np.testing.assert_allclose(
        [row["similarity"] for row in answers], [row["similarity"] for row in expected], atol=1e-5
    )
    assert answers[0]["name"] == "item4/view_2.jpg"
    assert answers[0]["similarity"] == pytest.approx(1, abs=1e-5)
    names = parquet.read_table(gallery)["id"].to_pylist()
    assert [names[row["row"]] for row in answers] == [row["name"] for row in answers]
    assert set(response.json()["milliseconds"]) == {"embed", "search"}
    assert all(value > 0 for value in response.json()["milliseconds"].values())
    assert client.get("/facts").json()["images"] == len(names) == 24


@pytest.mark.parametrize(
    ("contents", "kind", "status", "text"),
    [
        (encoded("PNG"), "text/plain", 415, "send a JPEG, PNG, WebP, AVIF, GIF or BMP file"),
        (encoded("PNG"), "", 415, "send a JPEG"),
        (encoded("TIFF"), "image/png", 415, "this is no JPEG, PNG, WebP, AVIF, GIF or BMP file"),
        (b"", "image/png", 415, "this is no JPEG"),
        (b"<svg/>" * 99, "image/jpeg", 415, "this is no JPEG"),
        (encoded("PNG")[:200], "image/png", 400, "damaged and cannot be decoded"),
        (encoded("PNG", size=(60, 50)), "image/png", 413, "more than 0 million pixels"),
        (bytes(30_000), "image/png", 413, "larger than"),
    ],
)
def test_what_is_no_photograph_is_refused(client, monkeypatch, contents, kind, status, text):
    monkeypatch.setattr(demo, "MAX_PIXELS", 2_500)
    monkeypatch.setattr(demo_server, "MAX_BYTES", 20_000)
    response = post(client, contents, kind)
    assert (response.status_code, response.text.count("\n")) == (status, 0)
    assert text in response.text


@pytest.mark.parametrize("format", demo.FORMATS)
def test_every_kind_of_file_is_answered(client, format):
    response = post(client, encoded(format), f"image/{format.lower()}")
    assert response.status_code == 200, response.text
    assert len(response.json()["answers"]) == 5


def test_a_stated_size_that_no_memory_holds_is_refused_by_the_header(client):
    bomb = bytearray(encoded("BMP"))
    bomb[18:26] = np.array([60_000, 60_000], "<i4").tobytes()
    response = post(client, bytes(bomb), "image/bmp")
    assert (response.status_code, response.text) == (413, response.text)
    assert "50 million pixels" in response.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("127.0.0.1:8000", "LOCALHOST", "localhost:99", "[::1]:8000")),
        *((name, 400) for name in ("evil.example", "127.0.0.1.evil.example", "", "[::1", "a:b:c")),
        *((name, 400) for name in ("x@localhost", "localhost/x", "localhost?x", "localhost#x")),
    ],
)
def test_only_the_servers_own_names_are_answered(client, host, status):
    for path in ("/", "/facts", "/images/0"):
        response = client.get(path, headers={"Host": host})
        assert response.status_code == status
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_pictures_are_those_of_rows_and_nothing_else(client, colour_run, gallery):
    names = parquet.read_table(gallery)["id"].to_pylist()
    for row in (0, 23):
        response = client.get(f"/images/{row}")
        assert response.headers["Content-Type"] == "image/webp"
        with Image.open(io.BytesIO(response.content)) as shown:
            found = np.asarray(shown.convert("RGB"), float)
        with Image.open(images_of(colour_run) / names[row]) as original:
            expected = np.asarray(original.convert("RGB"), float)
        assert found.shape == expected.shape
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.6
    wrong = ["24", "-1", "1e0", "9" * 5000, "\u0661", "..%2f..%2fetc%2fpasswd", names[0], "", "0/x"]
    for name in wrong:
        assert client.get(f"/images/{name}").status_code == 404, name
    assert client.get("/demo.html").status_code == 404
    assert client.get("/search").status_code == 405


def test_the_page_runs_its_own_script_alone_and_names_no_other_server(client):
    response = client.get("/")
    page, policy = response.text, response.headers["Content-Security-Policy"]
    assert not re.findall(r"//\w|\bsrc=|\bhref=|@import|\bstyle=|\bon[a-z]+=", page)
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def rewritten(gallery: Path, path: Path, *, names: list[str] | None = None, **facts) -> Path:
    """A copy of a gallery with other names or metadata."""
    table = parquet.read_table(gallery)
    metadata = json.loads(table.schema.metadata[b"mmljax"]) | facts
    if names is not None:
        table = table.set_column(0, "id", pa.array(names))
    table = table.replace_schema_metadata({"mmljax": json.dumps(metadata)})
    parquet.write_table(table, path)
    return path


def test_images_that_moved_or_lie_outside(colour_run, gallery, tmp_path, caplog):
    trained = saved.load_once(colour_run.folder)
    moved = shutil.copytree(images_of(colour_run), tmp_path / "moved")
    names = parquet.read_table(gallery)["id"].to_pylist()
    found = open_gallery(gallery, trained, folder=moved).images
    assert found.images.tolist() == [f"{moved}/{name}" for name in names]
    (moved / names[3]).unlink()
    open_gallery(gallery, trained, folder=moved)
    assert f"{moved}/{names[3]} of {gallery} does not exist, and 0 more" in caplog.text
    for facts in ({"folder": ""}, {"folder": str(tmp_path)}):
        with pytest.raises(UserError, match="nor any other image; add --images FOLDER"):
            open_gallery(rewritten(gallery, tmp_path / "x.parquet", **facts), trained, folder=None)
    for name in ("../secret.jpg", "/etc/secret.jpg", "a/../../b.jpg", "gs://b/x.jpg"):
        path = rewritten(gallery, tmp_path / "x.parquet", names=[*names[:-1], name])
        with pytest.raises(UserError, match=r"row 23 names a file outside of .*/moved: "):
            open_gallery(path, trained, folder=moved)


def test_a_gallery_of_a_split_has_the_images_of_the_data_set(colour_run, tmp_path):
    path, trained = tmp_path / "split.parquet", saved.load_once(colour_run.folder)
    run("embed", colour_run.folder, "--split=gallery", "--dtype=int8", "--output", path)
    opened = open_gallery(path, trained, folder=None)
    assert opened.gallery.vectors is not None
    for name, image in zip(opened.images.names, opened.images.images, strict=True):
        assert image == f"{colour_run.config.data.directory}/{name}"
        assert Path(image).is_file()
    absent = rewritten(path, tmp_path / "x.parquet", names=["none"] * len(opened.images.names))
    with pytest.raises(UserError, match="no image none in its split gallery; add --images"):
        open_gallery(absent, trained, folder=None)


def test_the_threshold_is_that_of_the_run_unless_another_one_is_named(
    colour_run, gallery, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(demo, "Demo", lambda *arguments, threshold, **more: threshold)
    folder = shutil.copytree(colour_run.folder, tmp_path / "run")
    copy = colour_run._replace(folder=folder)
    report = {"format": FORMAT, "threshold": 0.25}
    assert load(copy, gallery) is None
    identity = saved.load_once(folder).identity
    (folder / FILE).write_text(json.dumps(report | {"made_from": identity}))
    assert load(copy, gallery) == 0.25
    assert load(copy, gallery, "--threshold=0.5") == 0.5
    (folder / FILE).write_text(json.dumps(report | {"made_from": identity | {"step": 1}}))
    assert load(copy, gallery) is None
    assert f"{FILE} is left out: it was made for another network" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"another network \(step 1, of the run 5\).*--force"):
        load(copy, gallery, "--threshold", folder / FILE)
    assert load(copy, gallery, "--threshold", folder / FILE, "--force") == 0.25


def test_a_gallery_of_the_first_dimensions(colour_run, tmp_path):
    path, photograph = tmp_path / "short.parquet", images_of(colour_run) / "item4/view_2.jpg"
    run("embed", colour_run.folder, "--images", images_of(colour_run), "--dims=8", "--output", path)
    answers = load(colour_run, path, "--k=1").answer(photograph.read_bytes())["answers"]
    assert answers[0]["name"] == "item4/view_2.jpg"
    assert answers[0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_runs_and_galleries_that_do_not_fit(colour_run, saved_run, gallery, tmp_path):
    with pytest.raises(UserError, match="images of 1 channels, but photographs have colour"):
        load(saved_run, gallery)
    with pytest.raises(UserError, match="--k=25 is more than the 24 rows of"):
        load(colour_run, gallery, "--k=25")
    with pytest.raises(UserError, match="another network.*step 5, of the run 3.*--force"):
        load(colour_run, gallery, "--step=3")
    with pytest.raises(UserError, match=r"absent\.parquet does not exist"):
        load(colour_run, tmp_path / "absent.parquet")


def test_addresses_that_cannot_be_served(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["demo", "RUN", "--gallery=x", f"--port={port}"]
        with pytest.raises(UserError, match=f"--port={port} cannot be served .*in use.*--port"):
            run(*words)
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(UserError, match=f"--host={host} "):
            demo_server.listen(host, 0)
    with pytest.raises(UserError, match="cannot be served"):
        demo_server.listen("192.0.2.1", 0)
    with demo_server.listen("127.0.0.1", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match="must be from 0 to 65535, found 70000"):
        parse(["demo", "RUN", "--gallery=x", "--port=70000"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    with pytest.raises(UserError, match=r"needs the package uvicorn: pip install 'mmljax\[demo\]'"):
        run("demo", "RUN", "--gallery=x")

"""The quickstart's file in Embedding Atlas, written by ``mmljax atlas``, in a browser."""

from __future__ import annotations

import functools
import http.server
import io
import os
import re
import shlex
import shutil
import subprocess
import threading

import numpy as np
import pytest

from browser import CHROMIUM, chromium
from commands import run
from mmljax.inference.atlas import opening_command

pytest.importorskip("playwright", reason="pip install 'mmljax[browser]' brings Playwright")
parquet = pytest.importorskip("pyarrow.parquet", reason="mmljax[look] brings PyArrow")
Image = pytest.importorskip("PIL.Image", reason="mmljax[look] brings Pillow")

ATLAS = shutil.which("embedding-atlas")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        ATLAS is None,
        reason="needs embedding-atlas on the PATH, installed in an environment of its own; 0.22.0 "
        "is the last that draws its map without WebGPU",
    ),
]


class Silent(http.server.SimpleHTTPRequestHandler):
    """Serves a folder."""

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture(scope="module")
def path(quickstart, tmp_path_factory):
    path = tmp_path_factory.mktemp("atlas") / "atlas.parquet"
    run("atlas", quickstart.folder, "--output", path)
    return path


@pytest.fixture(scope="module")
def rows(path):
    return parquet.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def shown(path):
    """The explorer with the file in it, as the printed command opens it but without a server."""
    folder = path.parent / "atlas"
    command = shlex.split(opening_command(path))
    subprocess.run(
        [*command, "--export-application", str(folder)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    handler = functools.partial(Silent, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        chromium() as browser,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("canvas").first.wait_for(timeout=90_000)
        page.locator("svg image").first.wait_for(timeout=90_000)  # thumbnails on the map
        yield page
        server.shutdown()


def drawn_points(page):
    """Pixels ``[n 2]`` (x, y) of the map, in the page, that points cover."""
    style = page.add_style_tag(content="svg image { visibility: hidden }")
    box = page.locator("canvas").first.bounding_box()
    picture = Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")
    style.evaluate("element => element.remove()")
    red, _, blue = np.moveaxis(np.asarray(picture).astype(int), 2, 0)
    marked = blue - red > 60
    marked[:60] = marked[-40:] = False  # what stands there belongs to the frame
    return np.argwhere(marked)[:, ::-1] + [box["x"], box["y"]]


def row_at(page, pixel, places):
    """The row whose point is at a pixel, by the image name that the explorer shows."""
    titles = page.locator("[title]")
    before = titles.evaluate_all("all => all.map((one) => one.title)")
    page.mouse.click(*pixel)
    page.get_by_text("Nearest Neighbors").wait_for(timeout=20_000)
    page.wait_for_timeout(1_000)
    after = titles.evaluate_all("all => all.map((one) => one.title)")
    (name,) = {title for title in after if title in places} - set(before)
    return places[name]


def test_points_are_where_the_projection_puts_them(shown, rows):
    assert f"{len(rows)} points" in shown.inner_text("body")
    pixels = drawn_points(shown)
    assert len(pixels) > 3 * len(rows)  # several for each, except where points overlap
    outermost = [pixels[:, 0].argmin(), pixels[:, 0].argmax()]
    outermost += [pixels[:, 1].argmin(), pixels[:, 1].argmax()]
    at = pixels[outermost]
    found = [row_at(shown, pixel.tolist(), places(rows)) for pixel in at]
    plane = np.array([[rows[row]["x"], -rows[row]["y"]] for row in found])  # a screen's y is down
    scale = (at[1, 0] - at[0, 0]) / (plane[1, 0] - plane[0, 0])
    assert scale > 0
    moved = at - scale * plane
    np.testing.assert_allclose(moved, np.broadcast_to(moved.mean(axis=0), (4, 2)), atol=10)


def test_neighbours_are_the_files_own_in_order(shown, rows):
    pixels = drawn_points(shown)
    row = row_at(shown, pixels[len(pixels) // 2].tolist(), places(rows))
    shown.get_by_text("Nearest Neighbors").click()
    heading = shown.get_by_text(f"Neighbors of #{row}")
    heading.wait_for(timeout=20_000)
    shown.get_by_text("10 results.").wait_for(timeout=20_000)
    listed = re.findall(r"Distance\s+([\d.]+)\s+id\s+(\S+)", shown.inner_text("body"))
    expected = rows[row]["neighbors"]
    assert [name for _, name in listed] == [rows[other]["id"] for other in expected["ids"]]
    distances = [float(distance) for distance, _ in listed]
    np.testing.assert_allclose(distances, expected["distances"], atol=1e-5)


def places(rows):
    """Row by name."""
    return {row["id"]: place for place, row in enumerate(rows)}

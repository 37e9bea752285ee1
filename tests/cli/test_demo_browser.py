"""The page of ``mmljax demo`` in a browser of a phone's width."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from browser import CHROMIUM, chromium
from commands import run
from mmljax.cli import demo as verb
from mmljax.cli.command import parse
from mmljax.inference import demo_server

pytest.importorskip("playwright", reason="pip install 'mmljax[browser]' brings Playwright")
for module in ("starlette", "uvicorn"):
    pytest.importorskip(module, reason="pip install 'mmljax[demo]' brings Starlette and uvicorn")
Image = pytest.importorskip("PIL.Image", reason="pip install 'mmljax[demo]' brings Pillow")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
DROP = """bytes => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "mine.jpg", {type: "image/jpeg"}));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def images(colour_run):
    return Path(colour_run.config.data.directory) / "img"


@pytest.fixture(scope="module")
def served(colour_run, images, tmp_path_factory):
    """The demo and the address of its page."""
    path = tmp_path_factory.mktemp("demo") / "photos.parquet"
    run("embed", colour_run.folder, "--images", images, "--output", path)
    words = ["demo", colour_run.folder, "--gallery", path, "--k=6", "--threshold=0.98765"]
    demo = verb.load(parse([str(word) for word in words]))
    with demo_server.listen("127.0.0.1", 0) as listening:
        server = demo_server.make_server(demo, host="127.0.0.1")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield demo, demo_server.address_of("127.0.0.1", listening)
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser, served):
    """The page; a complaint of the browser or a request to another server fails the test."""
    page = browser.new_page(viewport={"width": 360, "height": 740})
    complaints, requests = [], []
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(served[1])
    wait_until(page, lambda: page.locator("#facts").inner_text() != "")
    yield page
    server = urlsplit(served[1]).netloc
    assert {urlsplit(url).netloc for url in requests if not url.startswith("blob:")} == {server}
    assert [text for text in complaints if "status of 415" not in text] == []
    page.close()


def wait_until(page, condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for a condition, asked from here: the page's policy forbids a script of text, so that
    `page.wait_for_function` fails unless its first look succeeds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        page.wait_for_timeout(50)


def shown(page) -> list[str]:
    """The text of each item of the list, when its pictures are loaded."""
    page.locator("li.line").wait_for(timeout=20_000)
    loaded = "all => all.every(one => one.complete && one.naturalWidth)"
    wait_until(page, lambda: page.locator("li img").evaluate_all(loaded))
    return [" ".join(text.split()) for text in page.locator("#list li").all_inner_texts()]


def expected(demo, photograph: Path, threshold: float) -> list[str]:
    """The items that the page should show."""
    answers = demo.answer(photograph.read_bytes())["answers"]
    lines = [
        f"{row['similarity']:.3f}{'' if row['similarity'] >= threshold else ' no match'} "
        f"{row['name']}"
        for row in answers
    ]
    matches = sum(row["similarity"] >= threshold for row in answers)
    lines.insert(matches, f"Threshold {threshold:.3f}: no match below it")
    return lines


def test_a_chosen_file_by_keyboard_alone_at_a_phones_width(page, served, images):
    demo, _ = served
    photograph = images / "item1/view_0.jpg"
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.keyboard.press("Enter")
    wait_until(page, lambda: choosers)
    choosers[0].set_files(photograph)
    assert shown(page) == expected(demo, photograph, 0.98765)
    state = page.locator("[role=status][aria-live=polite]")
    assert re.fullmatch(r"\d+ match(es)?", state.inner_text())
    latency = r"Latency \d+ ms: decode and embed \d+\.\d ms, search \d+\.\d ms, the rest transfer"
    assert re.fullmatch(latency, page.inner_text("#latency"))
    assert "24 images in the gallery" in page.inner_text("#facts")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "threshold"
    assert page.get_by_label("Threshold").evaluate("one => one.id") == "threshold"
    page.keyboard.press("ArrowLeft")
    assert shown(page) == expected(demo, photograph, 0.987)
    page.keyboard.press("Home")
    assert shown(page)[-1] == "Threshold -1.000: no match below it"
    assert state.inner_text() == "6 matches"
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert page.evaluate(widths) == [360, 360]


def test_a_dropped_photograph_without_a_match_and_a_wrong_file(page, served, tmp_path):
    photograph = tmp_path / "mine.jpg"
    Image.fromarray(np.tile(np.uint8([[[250, 10, 10]]]), (40, 30, 1))).save(photograph)
    page.evaluate(DROP, list(photograph.read_bytes()))
    shown(page)
    page.locator("#threshold").press("End")
    assert shown(page) == expected(served[0], photograph, 1)
    assert shown(page)[0] == "Threshold 1.000: no match below it"
    assert page.inner_text("#state") == "No match"
    assert page.locator("#asked").evaluate("one => one.naturalWidth") == 30
    wrong = tmp_path / "notes.txt"
    wrong.write_text("no image")
    page.set_input_files("#file", wrong)
    page.locator("#state.error").wait_for(timeout=20_000)
    assert page.inner_text("#state") == "Refused: send a JPEG, PNG, WebP, AVIF, GIF or BMP file"
    assert not page.locator("#results").is_visible()

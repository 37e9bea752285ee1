"""The page of the quickstart's run in a real browser."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from browser import CHROMIUM, chromium

pytest.importorskip("playwright", reason="pip install 'mmljax[browser]' brings Playwright")
for package in ("jinja2", "PIL", "matplotlib", "pandas"):
    pytest.importorskip(package, reason=f"a page needs {package}")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

WIDTHS = (1280, 420)
SCHEMES = ("light", "dark")

# Every element that has text of its own: its colour, and the first ground behind it.
TEXTS = """() => [...document.querySelectorAll("body *")].filter((element) =>
    element.checkVisibility() && !element.closest("svg, script") &&
    [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
  ).map((element) => {
    let ground = element;
    while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") {
      ground = ground.parentElement;
    }
    const style = getComputedStyle(element);
    return [element.outerHTML.slice(0, 80), style.color, getComputedStyle(ground).backgroundColor];
  })"""
FRAMES = """() => [...document.querySelectorAll(".found .picture")].map((element) =>
  [element.parentElement.className, getComputedStyle(element).borderTopStyle,
   getComputedStyle(element).borderTopColor, getComputedStyle(document.body).backgroundColor])"""


@pytest.fixture(scope="module")
def path(quickstart):
    return quickstart.folder / "page.html"


@pytest.fixture(scope="module")
def browser():
    with chromium("--disable-gpu") as browser:
        yield browser


@pytest.fixture
def open_page(browser, path):
    """Opens the page; no message of the console and no request beside the file itself may come."""
    told, contexts = [], []

    def opened(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: told.append(message.text))
        shown.on("pageerror", lambda error: told.append(str(error)))
        context.on("request", lambda request: told.append(f"request {request.url[:80]}"))
        shown.goto(path.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()
    own = f"request {path.as_uri()}"[:88]
    left = [text for text in told if not text.startswith((own, "request data:"))]
    assert left == []
    assert any(text.startswith(own) for text in told)


def luminance(colour):
    """Relative luminance of ``rgb(...)``, as WCAG 2.2 defines it."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """Contrast ratio of WCAG 2.2."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_by_the_definition():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_can_be_read(open_page, tmp_path, width, scheme):
    shown = open_page(width, scheme)
    texts = shown.evaluate(TEXTS)
    assert len(texts) > 200
    faint = [(text, contrast(ink, ground)) for text, ink, ground in texts]
    assert [row for row in faint if row[1] < 4.5] == []
    ground = luminance(texts[0][2])
    assert ground > 0.9 if scheme == "light" else ground < 0.1
    for kind, line, ink, behind in shown.evaluate(FRAMES):
        assert line == {"right": "solid", "wrong": "dashed"}[kind]
        assert contrast(ink, behind) >= 3
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    picture = shown.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    assert len(picture) > 20_000  # no blank page


def test_pictures_are_drawn(open_page):
    from PIL import Image

    shown = open_page()
    picture = shown.locator(".found .picture").first
    picture.scroll_into_view_if_needed()
    pixels = np.asarray(Image.open(io.BytesIO(picture.screenshot())).convert("RGB"))
    middle = pixels[20:-20, 20:-20].reshape(-1, 3)
    assert len(np.unique(middle, axis=0)) > 50  # the photographs' noise


def test_filter_shows_one_category(open_page):
    shown = open_page()
    everything = shown.locator(".query:visible").count()
    assert everything == 200
    names = [option.text_content() for option in shown.locator("#category option").all()]
    assert names[0] == "all"
    assert len(names) > 3
    numbers = []
    for name in names[1:]:
        shown.select_option("#category", name)
        visible = shown.locator(".query:visible")
        kinds = set(visible.evaluate_all("all => all.map((one) => one.dataset.category)"))
        assert kinds == {name}
        numbers.append(visible.count())
        assert shown.text_content("#count") == f"{numbers[-1]} shown"
    assert sum(numbers) == everything
    shown.select_option("#category", "")
    assert shown.locator(".query:visible").count() == everything


def test_keys_reach_everything(open_page):
    shown = open_page()
    focused = "document.activeElement"
    shown.focus("#category")
    shown.keyboard.press("End")  # the last category
    last = shown.locator("#category option").last.text_content()
    assert shown.evaluate(f"{focused}.value") == last
    labels = shown.locator(".query:visible").evaluate_all("all => all.map((one) => one.ariaLabel)")
    assert 3 < len(labels) < 200
    shown.keyboard.press("Tab")

    def label():
        return shown.evaluate(f"{focused}.ariaLabel")

    assert label() == labels[0]
    width = shown.evaluate(f"parseFloat(getComputedStyle({focused}).outlineWidth)")
    style = shown.evaluate(f"getComputedStyle({focused}).outlineStyle")
    assert (width, style) == (3, "solid")
    for key, place in (
        ("ArrowDown", 1),
        ("ArrowDown", 2),
        ("ArrowUp", 1),
        ("End", -1),
        ("ArrowDown", -1),
        ("Home", 0),
        ("ArrowUp", 0),
    ):
        shown.keyboard.press(key)
        assert label() == labels[place]
    box = shown.locator(".query:focus").bounding_box()
    assert 0 <= box["y"] < 900
    shown.keyboard.press("Shift+Tab")
    assert shown.evaluate(f"{focused}.id") == "category"

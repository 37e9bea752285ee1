"""The documentation builds without a warning, and its tutorial runs as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import mmljax
import small_runs
from mmljax.config import SyntheticConfig

DOCS = small_runs.ROOT / "docs"
PHOTOGRAPHS = small_runs.ROOT.parent / "shared" / "data" / "grocery" / "grocery_inshop.zip"

# Of this checkout, also where the installed console script is of another one.
MMLJAX = 'mmljax() { python -m mmljax "$@"; }'

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="needs pip install 'mmljax[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=small_runs.ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Page(HTMLParser):
    """The addresses that a page loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found["id"]} if found.get("id") else set()
        if tag in ("script", "img") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])


def test_every_page_is_in_the_site_and_loads_nothing_from_elsewhere(site):
    for source in DOCS.rglob("*.md"):
        place = source.relative_to(DOCS).with_suffix("")
        path = site / (place.parent if place.name == "index" else place) / "index.html"
        page = Page(path)
        assert page.loaded
        assert not [address for address in page.loaded if "//" in address], source


def test_the_reference_shows_docstrings(site):
    api = site / "reference" / "api" / "index.html"
    names = {f"mmljax.{name}" for name in mmljax.__all__ if name[0].isupper() or "_" in name}
    assert names | {"mmljax.train"} <= Page(api).anchors
    assert "with learned contribution weights" in api.read_text()
    losses = site / "reference" / "losses" / "index.html"
    assert "1904.06627" in losses.read_text()  # the source of Multi-Similarity


def photographs(folder: Path) -> None:
    """Write class folders of some shared photographs, or of generated images without them."""
    if PHOTOGRAPHS.exists():
        with zipfile.ZipFile(PHOTOGRAPHS) as archive:
            for name in archive.namelist():
                parts = name.split("/")
                if parts[:2] == ["Img", "img"] and parts[-1].endswith(".jpg"):
                    path = folder / "-".join(parts[2:-1]) / parts[-1]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if len(list(path.parent.iterdir())) < 6:
                        path.write_bytes(archive.read(name))
        return
    from mmljax.data.synthetic.dataset import write_synthetic

    drawn = write_synthetic(folder.parent / "drawn", SyntheticConfig(60, 40, 8, 64, 0))
    for path in drawn.rglob("*.jpg"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.parent.name / path.name)


def commands(marker: str) -> list[str]:
    """The blocks of the tutorial under a marker, with fewer steps of training and warm-up."""
    text = (DOCS / "tutorial.md").read_text()
    blocks = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", text, re.S)
    warmup = {
        "tutorial": '\n    config.optimizer.warmup = "5 steps"',  # in the config file
        "five": ' --config.optimizer.warmup="5 steps"',
    }
    assert '"100 steps"' in blocks[0]
    return [block.replace('"100 steps"', f'"15 steps"{warmup[marker]}') for block in blocks]


def run_block(block: str, folder: Path) -> str:
    """What a block prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    root = str(small_runs.ROOT)
    # XLA's defaults: with the tests' flags training is slower.
    environment = small_runs.environment(PATH=path, PYTHONPATH=root, XLA_FLAGS="")
    done = subprocess.run(
        ["bash", "-e", "-c", f"{MMLJAX}\n{block}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, f"{block}: {done.stderr}"
    return done.stdout


def test_the_ten_commands_of_the_tutorial(tmp_path):
    blocks = commands("tutorial")
    assert len(blocks) == 10
    photographs(tmp_path / "photos")
    printed = [run_block(block, tmp_path) for block in blocks]
    results = small_runs.results(tmp_path / "runs" / "three")
    assert results["scores"]["recall@1"] > results["untrained"]["recall@1"] > 0
    assert "recall@1" in printed[4]
    first = printed[7].splitlines()[1].split()
    assert first[0] == f"photos/{first[3]}"  # a photograph is nearest to itself
    for name in (
        "failures.html",
        "photos.parquet",
        "runs/three/atlas.parquet",
        "exported/receipt.json",
    ):
        assert (tmp_path / name).stat().st_size


def test_five_commands_from_photographs_of_dishes_to_files_for_other_programs(tmp_path):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="needs pip install 'mmljax[onnx]'")
    small_runs.write_dishes(tmp_path / "photos", train=80, test=40)
    (block,) = commands("five")
    printed = run_block(block, tmp_path)
    results = small_runs.results(tmp_path / "runs" / "photos")
    assert results["scores"]["recall@1"] > results["untrained"]["recall@1"] > 0
    assert "parity holds" in printed
    receipt = json.loads((tmp_path / "onnx" / "onnx_receipt.json").read_text())
    assert receipt["holds"] is True
    card = (tmp_path / "published" / "README.md").read_text()
    assert f"| Recall@1 | {100 * results['scores']['recall@1']:.1f} |" in card
    answers = [line.split() for line in printed.splitlines() if line.startswith("photos/")]
    assert answers[0][0] == f"photos/{answers[0][3]}"  # a photograph is nearest to itself


def test_files_for_indexes_and_services_agree_with_the_package() -> None:
    root = small_runs.ROOT
    package = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["license"] == package["license"]
    assert citation["version"] == package["version"]
    latest = f"## {package['version']} ({citation['date-released']})"
    assert latest in (root / "CHANGELOG.md").read_text().splitlines()
    assert citation["preferred-citation"]["title"] in (root / "README.md").read_text()
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["ci"]["steps"]
    assert steps[-1]["run"] == ".ci/run"
    (python,) = [step["with"]["python-version"] for step in steps if "with" in step]
    assert package["requires-python"] == f">={python}"

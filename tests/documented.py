"""The code blocks of the README and the docs, and small stand-ins for the data that they name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

import small_runs
from benchmarks.omniglot import halve, split_arrays
from mmljax.config import Config, to_dict
from mmljax.models.backbones import make_backbone

ROOT = small_runs.ROOT
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("mmljax", "python", "python3", "pip", "pytest", "pre-commit", "kubectl")
_FENCE = re.compile(r"^(?:<!-- (\S+) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_RECORD = """#!/bin/bash
printf '%s\\0' $# "${0##*/}" "${JAX_NUM_CPU_DEVICES:-1}" "$@" >>"$RECORD"
"""
_SIDE = 32  # of a stand-in's images, pixels; fewer are tiny to mmljax inspect


class Block(NamedTuple):
    """A fenced code block of a page."""

    page: str
    line: int
    marker: str  # of the comment above it
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Call(NamedTuple):
    """A program that a block starts."""

    program: str
    devices: int  # JAX_NUM_CPU_DEVICES
    words: list[str]


def read_blocks() -> list[Block]:
    """Every fenced block of every page."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            marker, language, body = match.groups(default="")
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(str(page.relative_to(ROOT)), line, marker, language, body))
    return found


def write_recorders(folder: Path) -> None:
    """Write stand-ins for all programs, which only record how they are called."""
    paths = [folder / at / name for at in ("bin", ".venv/bin") for name in PROGRAMS]
    paths += [folder / "launch" / path.name for path in (ROOT / "launch").glob("*.sh")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_RECORD)
        path.chmod(0o755)


def record(block: Block, folder: Path) -> list[Call]:
    """Let bash read a block in a folder with recorders; it finds no other program."""
    path = folder / "record"
    subprocess.run(
        [shutil.which("bash") or "bash", "-euc", block.text],
        cwd=folder,
        env={"PATH": str(folder / "bin"), "RECORD": str(path)},
        check=True,
    )
    fields = iter(path.read_text().split("\0")[:-1])
    return [
        Call(next(fields), int(next(fields)), [next(fields) for _ in range(int(count))])
        for count in fields
    ]


def extras(words: list[str]) -> set[str]:
    """The extras of mmljax that a ``pip install`` names and pyproject.toml does not."""
    named = {x for word in words for x in re.findall(r"(?:^\.|^mmljax)\[(.*)\]", word)}
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {extra for group in named for extra in group.split(",")} - set(known)


def write_stand_ins(folder: Path) -> None:
    """Write what the blocks name: images in each layout, weights, metrics of several runs."""
    (folder / "configs").symlink_to(ROOT / "configs")
    _write_in_shop(folder / "data" / "inshop")
    for name in ("DIR", "GROCERY_FOLDER", "data/grocery"):
        (folder / name).symlink_to(folder / "data" / "inshop")
    _write_characters(folder)
    for item in range(104):  # half of them are held out, and a batch takes 45
        _write_image(folder / "photos" / f"item {item}" / "1.jpg", item)
        _write_image(folder / "photos" / f"item {item}" / "2.jpg", item)
    for name in ("query.jpg", "other/1.jpg", "queries/1.jpg", "queries/2.jpg"):
        _write_image(folder / name, 1)
    _write_weights(folder / "resnet50.safetensors")
    for label, seed in (("share", 0), ("share", 1), ("fixed", 0)):
        _write_metrics(folder / "runs" / f"{label}-{seed}", seed)


def _write_image(path: Path, item: int) -> None:
    from PIL import Image

    ground = np.random.default_rng(item).integers(40, 200, 3)
    noise = np.random.default_rng([item, *path.name.encode()]).integers(0, 56, (_SIDE, _SIDE, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((ground + noise).astype(np.uint8)).save(path)


def _write_in_shop(folder: Path) -> None:
    rows = []
    for item in range(74):
        views = ("train",) * 2 if item < 48 else ("query", "gallery", "gallery")
        for view, split in enumerate(views):
            name = f"img/WOMEN/Dresses/id_{item:08}/{view:02}_1_front.jpg"
            _write_image(folder / "Img" / name, item)
            rows.append(f"{name} id_{item:08} {split}")
    (folder / "Eval").mkdir()
    lines = [str(len(rows)), "image_name item_id evaluation_status", *rows, ""]
    (folder / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines))


def _write_characters(folder: Path) -> None:
    """The Omniglot background set with three characters in each of its 30 alphabets."""
    labels = np.repeat(np.arange(90), 4).astype(np.int32)
    images = np.random.default_rng(0).integers(0, 256, (360, 56, 56), dtype=np.uint8)
    alphabet = labels // 3
    np.savez(folder / "omniglot_background_56.npz", images=images, labels=labels, alphabet=alphabet)
    arrays = split_arrays(halve(images), labels, alphabet >= 20)
    np.savez(folder / "data" / "omniglot.npz", **arrays)


def _write_weights(path: Path) -> None:
    """A narrow ResNet-18 by torchvision's names and axes."""
    from safetensors.numpy import save_file

    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
    backbone = make_backbone("resnet18", width=8, channels=3, dtype=np.float32, rngs=rngs)
    endings = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    weights = {}
    for place, variable in nnx.to_flat_state(nnx.state(backbone)):
        *module, last = map(str, place)
        value = np.array(variable[...])
        value = value.transpose(3, 2, 0, 1) if last == "kernel" else value
        weights[".".join([*module, endings.get(last, last)])] = np.ascontiguousarray(value)
    save_file(weights, path)


def _write_metrics(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(Config(seed=seed))))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(399, 403):
            share = {"share_embeddings/pair": step / 1000 + seed / 100}
            file.write(json.dumps({"step": step, "kind": "train", **share}) + "\n")


class FiftyOne:
    """A stand-in for the package ``fiftyone``, which records what it is given."""

    def __init__(self) -> None:
        self.samples: list[FiftyOne.Sample] = []
        self.calls: list[str] = []
        self.points = np.empty((0, 2))

    class Sample(dict):
        """One image and its fields."""

        def __init__(self, *, filepath: str, tags: list[str]) -> None:
            self.filepath, self.tags = filepath, tags

    class Classification(NamedTuple):
        """A label."""

        label: str

    def Dataset(self, name: str, *, overwrite: bool) -> FiftyOne:
        self.calls.append(f"Dataset {name} {overwrite}")
        return self

    def add_samples(self, samples: list[Sample]) -> None:
        self.samples += samples

    def compute_visualization(self, samples: FiftyOne, *, points: np.ndarray, brain_key: str):
        assert samples is self
        self.points = points
        self.calls.append(f"compute_visualization {brain_key}")

    def launch_app(self, dataset: FiftyOne) -> FiftyOne:
        assert dataset is self
        return self

    def wait(self) -> None:
        self.calls.append("wait")

"""The public API: lazy, documented, and in the wheel."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mmljax
from mmljax.retrieval import search, streaming

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "mmljax").rglob("*.py"))
    if re.search(r"^ *>>> ", path.read_text(), re.MULTILINE)
]


def run(code: str, *, cwd: Path = ROOT, path: Path = ROOT) -> str:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("imports", "spared"),
    [
        ("mmljax", {"jax", "numpy", "flax", "optax", "orbax", "tensorflow", "ml_collections"}),
        ("mmljax.losses, mmljax.metrics", {"tensorflow", "orbax", "flax", "optax"}),
        ("mmljax.training.loop", {"tensorflow"}),  # arrays train where TensorFlow is absent
        ("mmljax.main, mmljax.cli", {"tensorflow", "orbax", "flax", "optax", "jax", "pyarrow"}),
        ("mmljax.runs.reader, mmljax.runs.plot", {"tensorflow", "jax", "pandas", "matplotlib"}),
    ],
)
def test_an_import_loads_only_what_it_needs(imports: str, spared: set[str]) -> None:
    assert run(f"import sys, {imports}; print(sorted({spared} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("name", mmljax.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(mmljax, name)
    assert inspect.getdoc(found)
    assert name in dir(mmljax)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert "Args:" in (found.__doc__ or "") + (found.__init__.__doc__ or "")


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings(module: str, saved_run: Any) -> None:
    found = doctest.testmod(
        importlib.import_module(module),
        extraglobs={"run": saved_run.folder},
        optionflags=doctest.ELLIPSIS,
    )
    assert found.failed == 0
    assert found.attempted


def test_every_public_function_has_an_example() -> None:
    found = {name: getattr(mmljax, name) for name in mmljax.__all__}
    for module in ("losses", "miners", "combinations", "metrics"):
        members = found.pop(module)
        found |= {f"{module}.{name}": getattr(members, name) for name in members.__all__}
    for searches in (search, streaming):
        members = inspect.getmembers(searches, inspect.isfunction)
        found |= {k: x for k, x in members if x.__module__ == searches.__name__ and k[0] != "_"}
    assert [n for n, x in found.items() if ">>>" not in (inspect.getdoc(x) or "")] == []


def test_a_misspelled_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'MultiObjectiv'.*'MultiObjective'"):
        mmljax.MultiObjectiv  # noqa: B018


@pytest.mark.slow
def test_the_wheel_works_outside_a_checkout(tmp_path: Path) -> None:
    """Built and unpacked elsewhere, with this environment's dependencies."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*build, "-w", str(tmp_path / "wheel"), str(ROOT)], check=True, timeout=300)
    (wheel,) = (tmp_path / "wheel").glob("mmljax-*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(target), str(wheel)], check=True, timeout=300)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert (target / "mmljax" / "py.typed").exists()
    assert (target / "mmljax" / "inference" / "demo.html").exists()
    assert run("import mmljax; print(mmljax.__file__)", cwd=elsewhere, path=target) == str(
        target / "mmljax" / "__init__.py"
    )
    small = (
        "--config.duration=4 steps",
        "--config.data.synthetic.train_items=20",
        "--config.data.synthetic.test_items=12",
        "--config.optimizer.warmup=1 steps",
        "--config.evaluation.recall_at=(1,)",
    )
    for words in (
        ("train", "--config", "quickstart", *small, "--workdir=run"),
        ("embed", "run", "--split=query", "--dtype=int8", "--output=queries.parquet"),
        ("search", "run", "--embeddings=queries.parquet", "--split=query", "--k=2", "--rescore=9"),
        ("export", "run", "--output=exported", "--count=8"),
        ("export", "run", "--output=published", "--format=hub"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "mmljax", *words],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{words[0]}: {done.stderr}"
    assert (elsewhere / "run" / "results.json").exists()
    assert (elsewhere / "exported" / "receipt.json").exists()
    assert (elsewhere / "published" / "model.safetensors").exists()

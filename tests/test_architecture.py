"""The rules of the house, read off the syntax trees of ``mmljax``.

Each rule is a function of source text that returns what breaks it, one line each. It is tried on
the package, where it must find nothing, and on a small bad example, where it must find something.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmljax"
MAX_LINES = 350

LAYERS = (  # a module imports only from its own layer and those above it in this table
    ("types", "numerics", "errors", "ranges", "config", "mesh"),
    (
        "objectives.*",
        "mining",
        "relations",
        "combination",
        "ledger",
        "top_k",
        "retrieval",
        "streaming",
        "screening",
        "metrics",
        "geometry",
    ),
    ("models.*", "data.*"),
    ("build", "optim", "columns", "footprint", "train_step", "clustering", "evaluate", "assemble"),
    (
        *("checkpoints", "claim", "preemption", "plot", "progress", "rates", "report", "loggers"),
        *("recorder", "protocol", "parts"),
        *("restore", "table", "runs", "thumbnails", "offline", "page"),
    ),
    ("train", "gallery", "checks", "command"),
    ("main", "doctor", "compare", "embed", "search", "export", "look", "prepare"),
)
LIBRARY_IMPORTS = sys.stdlib_module_names | {"jax", "numpy", "jaxtyping", "mmljax"}
LIBRARY_LAYERS = 2  # the first ones are a library of their own
ONLY_IN = {  # top-level package: where it may be imported
    "tensorflow": ("data.*",),
    "tensorflow_datasets": ("data.*",),
    "orbax": ("checkpoints",),
}
COLLECTIVES = {
    *("psum", "psum_scatter", "pmean", "pmax", "pmin", "ppermute"),
    *("all_gather", "all_to_all", "axis_index", "shard_map"),
}
COLLECTIVES_IN = ("train_step", "columns", "retrieval", "mesh")

SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
every_module = pytest.mark.parametrize("module", SOURCES)


def matches(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of the names; ``data.*`` stands for all in ``data``."""
    return module in names or module.rpartition(".")[0] + ".*" in names


def layer(module: str) -> int | None:
    """Index of a module's layer; None if the table does not place it."""
    if module.rpartition(".")[2] == "__init__":
        return 0
    return next((i for i, names in enumerate(LAYERS) if matches(module, names)), None)


def imported(source: str) -> list[str]:
    """Full names of what a source imports, at the top, in functions, or by ``import_module``.

    ``from a import b`` counts as ``a.b``, since ``b`` may be a module; a relative import keeps its
    dots.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names += [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            argument = node.args[0]
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                names.append(str(argument.value))
    return names


def own_imports(source: str, modules: Mapping[str, str]) -> set[str]:
    """The modules of this package that a source imports."""
    found = set()
    for name in imported(source):
        parts = name.split(".")
        if parts[0] != "mmljax":
            continue
        for end in range(len(parts), 1, -1):  # mmljax.data.sampling.batch -> data.sampling
            if ".".join(parts[1:end]) in modules:
                found.add(".".join(parts[1:end]))
                break
    return found


# The rules.


def upward_imports(module: str, source: str, modules: Mapping[str, str]) -> list[str]:
    """Imports of a higher layer, from one package of a layer into another, or relative."""
    broken = [f"{module}: relative import {n}" for n in imported(source) if n.startswith(".")]
    here = layer(module)
    for other in sorted(own_imports(source, modules)):
        there = layer(other)
        folders = module.rpartition(".")[0], other.rpartition(".")[0]
        if here is None or there is None or there > here:
            broken.append(f"{module} (layer {here}) imports {other} (layer {there})")
        elif here == there and all(folders) and folders[0] != folders[1]:
            broken.append(f"{module} imports {other}, of another package in its layer")
    return broken


def import_cycle(modules: Mapping[str, str]) -> list[str]:
    """Modules that import one another in a circle, the first one found."""
    graph = {name: sorted(own_imports(source, modules)) for name, source in modules.items()}
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in finished:
            for other in graph[name]:
                if circle := visit(other, [*trail, name]):
                    return circle
            finished.add(name)
        return []

    return next((circle for name in graph if (circle := visit(name, []))), [])


def misplaced_imports(module: str, source: str) -> list[str]:
    """Imports of a package that is kept to a few modules, from another one."""
    tops = {name.split(".")[0] for name in imported(source)}
    return [
        f"{module} imports {top}, which belongs in {', '.join(places)}"
        for top, places in ONLY_IN.items()
        if top in tops and not matches(module, places)
    ]


def heavy_imports(module: str, source: str) -> list[str]:
    """In the layers that anybody's JAX loop can use: imports of anything but JAX and NumPy."""
    here = layer(module)
    if here is None or here >= LIBRARY_LAYERS:
        return []
    tops = {name.split(".")[0] for name in imported(source)}
    return [f"{module} imports {top}" for top in sorted(tops - LIBRARY_IMPORTS - {""})]


def misplaced_collectives(module: str, source: str) -> list[str]:
    """Names of collectives outside the modules that are meant to have them."""
    if module in COLLECTIVES_IN:
        return []
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.alias):
            used |= set(node.name.split("."))
    return [f"{module} uses {name}" for name in sorted(used & COLLECTIVES)]


def bad_form(module: str, source: str) -> list[str]:
    """Length, name, leftovers, and annotations that are evaluated when they need not be."""
    broken = []
    lines = source.splitlines()
    if len(lines) > MAX_LINES:
        broken.append(f"{module} has {len(lines)} lines, more than {MAX_LINES}")
    if "utils" in module.split("."):
        broken.append(f"{module} says nothing: name it after what it defines")
    for number, line in enumerate(lines, 1):
        broken += [f"{module}:{number} leaves a {w}" for w in ("TODO", "FIXME") if w in line]
    tree = ast.parse(source)
    if ast.get_docstring(tree) is None:
        broken.append(f"{module} has no docstring")
    annotated = (ast.FunctionDef, ast.AsyncFunctionDef, ast.AnnAssign)
    if any(isinstance(node, annotated) for node in ast.walk(tree)) and (
        "__future__.annotations" not in imported(source)
    ):
        broken.append(f"{module} lacks: from __future__ import annotations")
    return broken


# The package keeps them.


@every_module
def test_every_module_has_its_place(module):
    assert layer(module) is not None, f"place mmljax/{module} in the table of layers"


@every_module
def test_imports_go_downwards(module):
    assert upward_imports(module, SOURCES[module], SOURCES) == []


def test_imports_make_no_circle():
    assert import_cycle(SOURCES) == []


@every_module
def test_tensorflow_and_orbax_stay_where_they_belong(module):
    assert misplaced_imports(module, SOURCES[module]) == []


@every_module
def test_the_lower_layers_need_only_jax_and_numpy(module):
    assert heavy_imports(module, SOURCES[module]) == []


@every_module
def test_collectives_stay_where_they_belong(module):
    assert misplaced_collectives(module, SOURCES[module]) == []


@every_module
def test_form(module):
    assert bad_form(module, SOURCES[module]) == []


LIBRARY = "objectives.pair objectives.proxy objectives.separation retrieval metrics"


@pytest.mark.parametrize(
    ("modules", "spared"),
    [
        (LIBRARY, {"tensorflow", "orbax", "flax", "optax"}),
        ("train", {"tensorflow"}),  # arrays train where TensorFlow is absent
        ("main", {"tensorflow", "orbax", "flax", "optax", "jax"}),  # --help is immediate
        ("doctor", {"tensorflow", "orbax", "flax", "optax", "jax"}),
        ("compare", {"tensorflow", "orbax", "flax", "optax", "jax"}),
        ("embed search export prepare", {"tensorflow", "orbax", "flax", "optax", "jax", "pyarrow"}),
        ("page look", {"tensorflow", "orbax", "flax", "optax", "jax", "pyarrow", "pandas"}),
        ("runs plot", {"tensorflow", "orbax", "flax", "optax", "jax", "pandas", "matplotlib"}),
    ],
)
def test_loading_a_module_spares_what_it_does_not_need(modules, spared):
    names = ", ".join(f"mmljax.{module}" for module in modules.split())
    code = f"import sys, {names}; print(sorted({spared} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# And each rule can tell.

FUTURE = '"""Doc."""\n\nfrom __future__ import annotations\n'


@pytest.mark.parametrize(
    ("module", "place"),
    [("types", 0), ("data.sampling", 2), ("main", 6), ("data.__init__", 0)],
)
def test_layer_of(module, place):
    assert layer(module) == place


@pytest.mark.parametrize("module", ["new", "data", "objectives", "extra.pair", "types.more"])
def test_a_new_module_has_no_place_until_it_is_given_one(module):
    assert layer(module) is None


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b as c, d", ["a.b", "d"]),
        ("from a import b, c", ["a.b", "a.c"]),
        ("def f():\n    from a.b import c", ["a.b.c"]),
        ("if x:\n    import a", ["a"]),
        ("from . import a", ["..a"]),
        ("from ..b import a", ["..b.a"]),
        ("importlib.import_module('a.b')", ["a.b"]),
        ("__import__('a')", ["a"]),
        ("'import a'  # import b", []),
    ],
)
def test_imported(source, names):
    assert imported(source) == names


MODULES = dict.fromkeys(["config", "mining", "data.sampling", "models.resnet", "build", "train"])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import mmljax.data.sampling", {"data.sampling"}),
        ("from mmljax.data.sampling import batch", {"data.sampling"}),
        ("from mmljax.data import sampling", {"data.sampling"}),
        ("from mmljax import mining, config", {"mining", "config"}),
        ("import numpy.train, mmljax", set()),
    ],
)
def test_own_imports(source, found):
    assert own_imports(source, MODULES) == found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mining", "from mmljax.build import OBJECTIVES"),
        ("mining", "def f():\n    from mmljax import train"),
        ("build", "import mmljax.train"),
        ("models.embedder", "from mmljax.data.sampling import batch"),
        ("data.pipeline", "from .sampling import batch"),
        ("nowhere", "from mmljax import mining"),
    ],
)
def test_upward_imports_are_found(module, source):
    assert len(upward_imports(module, source, MODULES)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train", "from mmljax import build, mining"),
        ("data.pipeline", "from mmljax.data import sampling"),
        ("optim", "from mmljax.build import OBJECTIVES"),
    ],
)
def test_downward_imports_pass(module, source):
    assert upward_imports(module, source, MODULES) == []


def test_a_circle_is_found():
    line = "import mmljax.{}"
    chain = {"a": line.format("b"), "b": line.format("c"), "c": "", "d": line.format("b")}
    assert import_cycle(chain) == []
    chain["c"] = "def late():\n    from mmljax.b import x"
    assert import_cycle(chain) == ["b", "c", "b"]
    assert import_cycle({"a": "import mmljax.a"}) == ["a", "a"]


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("evaluate", "import tensorflow as tf", 1),
        ("evaluate", "def f():\n    import tensorflow_datasets as tfds", 1),
        ("data.pipeline", "def f():\n    import tensorflow as tf", 0),
        ("train", "import orbax.checkpoint", 1),
        ("data.pipeline", "from orbax import checkpoint", 1),
        ("checkpoints", "import orbax.checkpoint", 0),
    ],
)
def test_misplaced_imports_are_found(module, source, broken):
    assert len(misplaced_imports(module, source)) == broken


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("numerics", "import optax", 1),
        ("objectives.pair", "def f():\n    from flax import nnx", 1),
        ("retrieval", "import os, jax.numpy, numpy as np\nfrom jaxtyping import Array", 0),
        ("build", "import optax", 0),
    ],
)
def test_heavy_imports_are_found(module, source, broken):
    assert len(heavy_imports(module, source)) == broken


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("mining", "jax.lax.psum(x, 'data')", 1),
        ("objectives.pair", "from jax.lax import all_gather", 1),
        ("evaluate", "f = shard_map", 1),
        ("models.resnet", "from jax.experimental.shard_map import shard_map as s", 1),
        ("train_step", "jax.lax.psum(x, 'data')", 0),
        ("mining", "'psum'  # psum", 0),
    ],
)
def test_misplaced_collectives_are_found(module, source, broken):
    assert len(misplaced_collectives(module, source)) == broken


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("mining", FUTURE + "x = 1\n" * MAX_LINES, "lines"),
        ("utils", FUTURE, "says nothing"),
        ("data.utils", FUTURE, "says nothing"),
        ("mining", FUTURE + "# TODO: more", "TODO"),
        ("mining", FUTURE + "x = 1  # FIXME", "FIXME"),
        ("mining", "x = 1", "docstring"),
        ("mining", '"""Doc."""\ndef f(x: int): ...', "__future__"),
    ],
)
def test_bad_form_is_found(module, source, words):
    (broken,) = bad_form(module, source)
    assert words in broken


def test_good_form_passes():
    assert bad_form("mining", FUTURE + "x = 1\n" * (MAX_LINES - 3)) == []
    assert bad_form("errors", '"""Doc."""\nclass E(Exception):\n    """Doc."""') == []

"""Programs that libtpu compiles for slices that are not here.

``.ci/run`` runs this file in an environment with libtpu. Each program is compiled once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import pytest

from benchmarks import scale
from mmljax.cli import main
from mmljax.config import Config, load_config
from mmljax.mesh import make_mesh
from mmljax.planning import chips
from mmljax.planning.counts import PUBLISHED, Counts
from mmljax.planning.hlo_text import argument_bytes, collectives, instructions
from mmljax.planning.programs import (
    Cache,
    Compiled,
    RunShapes,
    abstract_run,
    compile_program,
    lower_step,
)
from mmljax.training.state import state_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="libtpu runs on x86-64 Linux",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="pip install 'mmljax[tpu]' brings libtpu",
    ),
]

RESNET50 = 23_508_032  # parameters without the classifier, torchvision's table less 2,049,000
ROW = 512 * 4  # bytes of an embedding


class Step(NamedTuple):
    """A training step that was compiled for a topology."""

    config: Config
    run: RunShapes
    compiled: Compiled
    chip: chips.Chip

    @property
    def share(self) -> int:
        """Images of one device."""
        return self.config.data.batch_size // self.run.mesh.devices.size


@pytest.fixture(scope="module")
def cache(request) -> Any:
    """The cache that a second run of these tests on the same machine reads."""
    return request.config.cache.mkdir("mmljax-plan")


def compile_for(topology: str, config: Config, counts: Counts, cache: Any) -> Step:
    target = chips.tpu_target(topology)
    assert target.chip is not None
    run = abstract_run(config, counts, make_mesh(target.devices))
    lowered = lower_step(run, config, channels=3)
    return Step(
        config, run, compile_program(lowered, name=topology, cache=Cache(cache)), target.chip
    )


@contextmanager
def optimization_level(level: str) -> Iterator[None]:
    """At O1 libtpu takes about a fifth of its time; the memory differs by some per cent."""
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", level)
    yield
    jax.config.update("jax_optimization_level", before)


@pytest.fixture
def low_effort() -> Iterator[None]:
    with optimization_level("O1"):
        yield


@pytest.fixture(scope="module", params=["v5e:2x4", "v6e:2x4"])
def in_shop(request, cache) -> Step:
    """For v6e at the lower level: how collectives overlap is asked of v5e alone."""
    config = load_config("inshop", ["data.batch_size=192"])
    level = {"v5e:2x4": "UNKNOWN", "v6e:2x4": "O1"}[request.param]
    with optimization_level(level):
        return compile_for(request.param, config, PUBLISHED["in_shop"], cache)


def test_memory_of_in_shop_is_that_of_the_formulas(in_shop):
    """``docs/scale.md``, with the numbers of arrays counted by hand."""
    memory = in_shop.compiled.memory
    network = RESNET50 + 2048 * 512 + 512
    blocks = ((3, 64), (4, 128), (6, 256), (3, 512))  # and 4 w channels after each, 1 shortcut
    statistics = 2 * (64 + sum(n * 6 * w + 4 * w for n, w in blocks))
    rows = in_shop.run.state.params["proxies"].shape[0]
    assert rows == 4000
    scalars = 4 * (3 + 1 + 2 + 2 * 3 + 1)  # weights, step, key; counters of each optimiser group
    batch = 192 // 8 * (224 * 224 * 3 + 4 + 1)
    formula = 12 * network + 4 * statistics + 12 * rows * 512 // 8 + scalars + batch
    assert argument_bytes(in_shop.compiled.text) == formula
    assert formula <= memory.arguments < 1.01 * formula  # tiles round small arrays up
    assert memory.outputs - memory.aliased < 2**20  # the new state lies in the place of the old
    assert memory.total < 0.1 * in_shop.chip.hbm


def test_proxies_are_gathered_beside_other_work_and_moments_never(in_shop):
    gathered = collectives(in_shop.compiled.text)["all-gather"]
    proxies = in_shop.run.state.params["proxies"].shape[0] * ROW
    embeddings = 192 * ROW
    if in_shop.chip is chips.CHIPS["v5e"]:  # for v6e, with faster links, the compiler waits
        assert gathered.asynchronous >= proxies
    assert proxies + embeddings <= gathered.bytes < proxies + embeddings + 2**16


def test_the_network_computes_in_half_precision(in_shop):
    lines = list(instructions(in_shop.compiled.text))
    types = {(line.computation, line.name): line.result for line in lines}
    found = [
        [types[line.computation, name].partition("[")[0] for name in line.operands]
        for line in lines
        if line.kind == "convolution" and "conv_general_dilated" in line.attributes
    ]
    assert len(found) > 3 * 50  # forward and two gradients of each convolution
    assert {kind for kinds in found for kind in kinds} == {"bf16"}


def test_images_are_never_held_in_full_precision(in_shop):
    images = re.compile(rf"f32\[{in_shop.share},(224,224,3|3,224,224)\]")
    held = [
        line.name
        for line in instructions(in_shop.compiled.text)
        if line.entry and images.search(line.result)
    ]
    assert not held


@pytest.mark.parametrize(
    ("topology", "classes", "rows", "batch_size"),
    [("v5e:8x16", 1_000_000, 1_000_064, 512), ("v5e:16x16", 10_000_000, 10_000_128, 1024)],
)
def test_millions_of_classes_fit_a_pod(topology, classes, rows, batch_size, cache):
    options = argparse.Namespace(
        backbone="resnet18", image_size=32, sampled_proxies=8192, row_block=8192
    )
    options.batch_size = batch_size
    config = scale.make_config(options)
    step = compile_for(topology, config, Counts(classes, 10 * classes), cache)
    assert step.run.state.params["proxies"].shape[0] == rows
    devices = step.run.mesh.devices.size
    sizes = state_bytes(step.run.state)
    assert sizes["proxies"] == 4 * rows * 512 // devices
    assert sizes["optimizer of proxies"] == 8 * rows * 512 // devices + 8
    scalars = 4 * (3 + 1 + 2)
    batch = batch_size // devices * (32 * 32 * 3 + 5)
    assert argument_bytes(step.compiled.text) == sum(sizes.values()) + scalars + batch
    assert step.compiled.memory.total < 2**30
    # The batch, the drawn proxies and their gradient, the network's: on a pod the compiler makes
    # all-reduces of small gathers. Never all proxies.
    exchanged = sum(kind.bytes for kind in collectives(step.compiled.text).values())
    network = sum(4 * x.size for x in jax.tree.leaves(step.run.state.params["network"]))
    least = network + 2 * 8192 * ROW
    assert least < exchanged < 0.01 * network + least + 8 * batch_size * ROW


@pytest.mark.parametrize(
    ("recipe", "topology"),
    [
        ("inshop_vit_s", "v5e:2x4"),
        ("inshop_siglip2_b", "v5e:2x4"),
        ("sop_vit_b", "v5e:2x4"),
        ("cub_vit_b", "v5e:2x4"),
        ("inshop_vit_l336", "v6e:2x4"),
    ],
)
def test_recipes_fit_the_slice_that_they_name(recipe, topology, low_effort, cache):
    config = load_config(recipe)
    target = chips.tpu_target(topology)
    run = abstract_run(config, PUBLISHED[config.data.source], make_mesh(target.devices))
    lowered = lower_step(run, config, channels=3)
    stored = Cache(cache / "memory")  # as the texts are not read
    memory = compile_program(lowered, name=topology, with_text=False, cache=stored).memory
    assert target.chip is not None
    gib = f"{memory.total / 2**30:.2f} of {target.chip.hbm / 2**30:.0f} GiB"
    print(f"{recipe} on {topology}: {gib} per chip")  # shown by pytest -rP
    held = sum(state_bytes(run.state).values())
    assert held < memory.total < target.chip.hbm


def test_quickstart_is_planned_for_two_chips_at_once(cache, capsys):
    words = ["plan", "--config=quickstart", f"--cache={cache}", "--json"]
    assert main([*words, "--topology", "v5e:2x4", "v6e:2x4"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [found["target"] for found in plans] == ["v5e:2x4", "v6e:2x4"]
    for found in plans:
        assert set(found["programs"]) == {"training step", "embedding", "search"}
        assert found["devices"] == 8
        assert found["collectives"]["all-gather"]["bytes"] > 64 * 4 * 128
        assert all(0 < seconds < 1e-3 for seconds in found["lower_bounds_in_seconds"].values())
    old, new = (found["lower_bounds_in_seconds"] for found in plans)
    assert all(new[name] < old[name] for name in old)


def test_what_is_too_large_states_needed_and_available_bytes(cache, capsys):
    words = ["plan", "--config=quickstart", "--topology=v5e:2x2", f"--cache={cache}", "--json"]
    words += ["--config.data.batch_size=524288", "--classes=200000", "--images=1000000"]
    assert main(words) == 2
    shown = capsys.readouterr()
    (found,) = json.loads(shown.out)
    assert 15 * 2**30 < found["available"] <= 16 * 2**30 < found["needed"]
    assert "does not fit v5e:2x2: it needs" in shown.err

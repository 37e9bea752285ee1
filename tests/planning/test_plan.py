"""Plans of small runs on virtual CPU devices, and what is refused before anything is compiled."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import platform
import sys
import types

import jax
import numpy as np
import pytest

from mmljax.cli import main
from mmljax.config import load_config, to_dict
from mmljax.errors import UserError
from mmljax.planning import alone, chips, counts, plan, report
from mmljax.planning.alone import CompilerCrashed, Task, compile_alone
from mmljax.planning.hlo_text import Memory, Traffic
from mmljax.planning.operations import Operations
from mmljax.planning.programs import Cache, needed_and_available

OVERRIDES = ["model.width=8", "data.image_size=24", "data.batch_size=30", "data.images_per_class=2"]
SMALL = ["--config=quickstart", *(f"--config.{override}" for override in OVERRIDES)]


@pytest.fixture
def cache(tmp_path) -> str:
    return f"--cache={tmp_path / 'cache'}"


def test_a_plan_of_the_devices_here(cache, capsys, caplog):
    """Batch 30 does not divide over 8 devices in pairs of a class: 32 does."""
    assert main(["plan", *SMALL, cache, "--json"]) == 0
    shown = capsys.readouterr()
    (found,) = json.loads(shown.out)
    assert found["fits"]
    assert found["devices"] == 8
    assert found["batch_size"] == 32
    assert "batch_size=30 is not for 8 devices, and training refuses it" in shown.err
    assert found["counts"] == dict(
        zip(counts.Counts._fields, (200, 1600, 480, 480, 3), strict=True)
    )
    assert found["batch"] == 4 * (24 * 24 * 3 + 4 + 1)
    step = found["programs"]["training step"]
    scalars = 3 * 4 + 4 + 8  # contribution weights, step, key
    assert step["arguments"] == sum(found["state"].values()) + found["batch"] + scalars
    assert found["padding"] == 0
    assert found["lower_bounds_in_seconds"] is None
    assert found["collectives"]["all-gather"]["bytes"] >= 32 * (4 * 128 + 9)
    assert min(one["number"] for one in found["operations"].values()) > 0

    assert main(["plan", *SMALL, cache, "--buffers=3"]) == 0  # the second time nothing is compiled
    shown = capsys.readouterr()
    assert shown.err.count("compiled before") == 3
    assert "compiling" not in shown.err
    assert "parameters of the network" in shown.out
    assert "largest buffers" in shown.out


def test_what_does_not_fit_is_refused_with_both_figures(cache, capsys, monkeypatch):
    monkeypatch.setattr(chips, "total_memory", lambda: 8 * 2**17)
    assert main(["plan", *SMALL, cache, "--json"]) == 2
    shown = capsys.readouterr()
    (found,) = json.loads(shown.out)
    assert not found["fits"]
    assert found["available"] == 2**17 < found["needed"]
    line = shown.err.splitlines()[-1]
    assert "the training step does not fit cpu: it needs" in line
    assert "on each device, and 0.1 MiB are available; lower --config.data.batch_size=32" in line


def test_a_compiler_that_crashes_is_one_line(tmp_path, capfd, monkeypatch):
    """The other target is planned; of the crash's report only the progress is shown."""
    dies = "import os, sys; print('v5e:2x4: step: compiling ...', '*** SIGSEGV', sep='\\n', "
    dies += "file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
    program = (sys.executable, "-c", dies)
    config = load_config("quickstart")
    with pytest.raises(
        CompilerCrashed, match=r"--topology=v5e:2x4: the compiler crashed \(SIGSEGV"
    ):
        compile_alone(Task(config, SIZES, "v5e:2x4", tmp_path, False), program=program)
    assert capfd.readouterr().err == "v5e:2x4: step: compiling ...\n"

    def fill(task):
        if task.topology == "v5e:2x4":
            compile_alone(task, program=program)

    here = chips.present_target()
    monkeypatch.setattr(alone, "compile_alone", fill)
    monkeypatch.setattr(chips, "tpu_target", lambda name: here._replace(name=name))
    words = ["plan", *SMALL, f"--cache={tmp_path}", "--json", "--topology"]
    assert main([*words, "v5e:2x4", "v6e:2x4"]) == 2
    shown = capfd.readouterr()
    crashed, planned = json.loads(shown.out)
    assert (crashed["target"], crashed["fits"]) == ("v5e:2x4", None)
    assert (planned["target"], planned["fits"]) == ("v6e:2x4", True)
    assert "SIGSEGV" in crashed["error"]
    assert shown.err.splitlines().count(f"mmljax: error: {crashed['error']}") == 1


def test_a_process_of_its_own_fills_the_cache(tmp_path, monkeypatch):
    """What it is sent and what it leaves; the target is that of this machine's devices."""
    here = chips.present_target()
    monkeypatch.setattr(chips, "tpu_target", lambda name: here._replace(name=name))
    config = plan.fitting_config(load_config("quickstart", OVERRIDES), SIZES, devices=8)
    task = Task(config, SIZES, "v5e:2x4", tmp_path, True)
    sent = json.dumps(task._replace(config=to_dict(config), cache=str(tmp_path))._asdict())
    monkeypatch.setattr(sys, "stdin", io.StringIO(sent))
    logger = logging.getLogger("mmljax")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(plan, "find_batch_size", lambda *arguments, **options: 64)
    alone.main()
    cache = Cache(tmp_path, fill=lambda: pytest.fail("something was not compiled"))
    larger = plan.with_batch_size(config, 64)
    assert plan.make_plan(larger, SIZES, chips.tpu_target("v5e:2x4"), cache=cache).batch_size == 64


@pytest.mark.parametrize("largest", [0, 8, 64, 72, 1000])
def test_the_largest_size_that_fits_is_found(largest):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= largest

    found = plan.largest_fitting(fits, start=64, unit=8, tolerance=0)
    assert found == largest // 8 * 8
    assert len(asked) == len(set(asked)) <= 12
    assert all(size % 8 == 0 for size in asked)
    near = plan.largest_fitting(fits, start=64, unit=8)
    assert largest - max(8, largest / 32) <= near <= largest


SIZES = counts.Counts(200, 1600)


def test_batches_are_the_next_ones_that_training_accepts():
    words = ["data.micro_batches=3", "data.batch_size=100", "data.eval_batch_size=9"]
    config = load_config("quickstart", [*words, "data.images_per_class=4"])
    chosen = plan.fitting_config(config, SIZES, devices=2).data
    assert (chosen.batch_size, chosen.eval_batch_size) == (108, 10)
    with pytest.raises(UserError, match=r"batch_size=1536 on 512 devices needs more than the 200"):
        plan.fitting_config(config, SIZES, devices=512)


@pytest.mark.slow
def test_the_largest_batch_is_found_or_refused(tmp_path):
    """On the devices here, of as much memory as a batch of 48 takes."""
    config = load_config(SMALL[0].partition("=")[2], [w.partition(".")[2] for w in SMALL[1:]])
    devices = tuple(jax.devices())

    def total(size):
        target = chips.Target("cpu", devices, 0, None)
        made = plan.make_plan(
            plan.with_batch_size(config, size), SIZES, target, cache=Cache(tmp_path)
        )
        return made.memory["training step"].total

    enough = chips.Target("cpu", devices, total(48), None)
    start = plan.fitting_config(config, SIZES, devices=8)
    assert plan.find_batch_size(start, SIZES, enough, cache=Cache(tmp_path)) == 48
    small = chips.Target("cpu", devices, 2**10, None)
    with pytest.raises(plan.TooLarge, match=r"on each device, and 0.0 MiB are available; lower"):
        plan.find_batch_size(start, SIZES, small, cache=Cache(tmp_path))


def test_bounds_are_those_computed_by_hand():
    chip = chips.Chip(100, 1000.0, 50.0, 10.0, (), ())
    found = plan._bounds(
        chips.Target("chip", (), 100, chip),
        Memory(arguments=30, outputs=20, aliased=20, work=25, code=0),
        {"all-gather": Traffic(1, 40, 0)},
        {"network": Operations(200, 300), "objectives": Operations(100, 600)},
        devices=4,
    )
    assert found == pytest.approx((900 / 1000, (30 + 20 + 2 * 25) / 50, 40 * 3 / 4 / 10))


def test_targets_are_compared_by_figures_computed_by_hand():
    one = plan.Plan(
        *("v5e:2x2", 4, 100 * 2**20, 64, 7200, counts.Counts(9, 90), {}, 0, 0),
        {plan.STEP: Memory(arguments=2**20, outputs=0, aliased=0, work=2**21, code=2**19)},
        *({}, {}, plan.Bounds(0.5e-3, 2e-3, 1e-3), ()),
    )
    other = one._replace(target="cpu", bounds=None)
    lines = report.comparison_text([one, other], price=1.5).splitlines()
    assert len({len(line) for line in lines[:2]}) == 1
    assert lines[0].endswith("images/s at most  run at least, s  cost at least")
    assert lines[1].split() == [
        "v5e:2x2",
        "4",
        "64",
        "3.5",
        "100.0",
        "2.000",
        "32000",
        "14",
        "0.02",
    ]
    assert lines[2].split() == ["cpu", "4", "64", "3.5", "100.0"]
    assert "cost" not in report.comparison_text([one, other])


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5:2x4", r"chip 'v5' is unknown \(did you mean 'v5\w'\?\)"),
        ("v5e:2x5", "v5e has no such shape; it has v5e:1x1, v5e:2x2, v5e:2x4"),
        ("v5p:2x4", "it has v5p:2x2x1, v5p:2x2x2"),
        ("v5e", "v5e has no such shape"),
        ("v5e:2x4,v6e:2x4", "separate topologies by spaces"),
        ("2xv5e:2x4", "a plan is of one slice"),
        ("v5e:2x4*2", "a plan is of one slice"),
    ],
)
def test_topologies_that_do_not_exist_are_named(topology, message):
    with pytest.raises(UserError, match=message):
        chips.tpu_target(topology)


def test_a_machine_without_the_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(UserError, match="x86-64 Linux, and this is .* on arm64"):
        chips.tpu_target("v5e:2x4")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(chips.sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package libtpu: pip install 'mmljax\[tpu\]'"):
        chips.tpu_target("v5e:2x4")


def test_libtpu_states_needed_and_available_bytes():
    """In two forms: the sum of all parts, or of the temporaries alone where these are too many."""
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 30.50G of 15.75G hbm. Exceeded hbm capacity by 14.75G."
    )
    assert needed_and_available(message) == (30.5 * 2**30, 15.75 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (760.50G) exceeds available HBM (15.75G)."
    )
    assert needed_and_available(message) == (760.5 * 2**30, 15.75 * 2**30)
    assert needed_and_available("RESOURCE_EXHAUSTED: no figures") == (0, 0)


def test_sizes_come_from_flags_data_or_the_benchmark(tmp_path):
    config = load_config("inshop", ["data.directory=absent"])
    assert counts.count(config) == counts.Counts(3997, 25882, 14218, 12612)
    assert counts.count(config, classes=9, images=90) == counts.Counts(9, 90)
    assert counts.count(config, queries=7).queries == 7
    products = load_config("sop", ["data.directory=absent"])
    assert counts.count(products) == counts.Counts(11_318, 59_551, 60_502)

    absent = load_config("inshop", ["data.source=folder", f"data.directory={tmp_path / 'no'}"])
    with pytest.raises(UserError, match="state them: --classes N --images N"):
        counts.count(absent)
    with pytest.raises(UserError, match="plan a run on images"):
        counts.count(load_config("inshop", ["data.source=features"]))

    path = tmp_path / "data.npz"
    images, labels = np.zeros((10, 5, 5, 1), np.uint8), np.arange(10) // 2
    np.savez(path, images=images, labels=labels, split=["train"] * 6 + ["query"] * 4)
    arrays = load_config("inshop", ["data.source=arrays", f"data.directory={path}"])
    assert counts.count(arrays) == counts.Counts(3, 6, 4, 0, 1)


def test_a_chip_is_known_by_its_devices(monkeypatch):
    assert chips.present_target().chip is None
    memory = {"bytes_limit": 17}
    for kind in ("TPU v5 lite", "TPU v5e"):
        device = types.SimpleNamespace(
            device_kind=kind, platform="tpu", memory_stats=lambda: memory
        )
        monkeypatch.setattr(jax, "devices", lambda device=device: [device] * 3)
        target = chips.present_target()
        assert target == (kind, (device,) * 3, 17, chips.CHIPS["v5e"])

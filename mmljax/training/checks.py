"""Checks before a run: each is a function that returns a finding with its cure."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from mmljax.config import CheckpointConfig, Config
from mmljax.data import load
from mmljax.data.tensorflow_devices import visible_accelerators
from mmljax.errors import UserError
from mmljax.mesh import make_mesh
from mmljax.retrieval.checks import check_evaluation
from mmljax.runs import sessions, writer
from mmljax.text import one_line, size_text
from mmljax.training.trainer import Trainer, make_trainer
from mmljax.types import Dataset, TrainState

_ACCELERATORS = {  # the file of a device's driver: what it is, and our extra that uses it
    "/dev/nvidiactl": ("an NVIDIA GPU", "cuda"),
    "/dev/accel0": ("a TPU", "tpu"),
}


class Finding(NamedTuple):
    """The result of a check; a failure states its cure."""

    verdict: Literal["ok", "warn", "FAIL", "skip"]
    name: str
    text: str

    @property
    def failed(self) -> bool:
        """Whether a run would not start."""
        return self.verdict == "FAIL"


def check_versions(requirements: Sequence[str] | None = None) -> Finding:
    """Installed versions against the package's requirements.

    Args:
      requirements: as ``name>=version``; those of the installed package if None.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("mmljax") or ()
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            requirements = ()
    found = sessions.versions()
    wrong = [r for r in requirements if not _satisfied(r)]
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if wrong:
        needed = " ".join(f"'{requirement}'" for requirement in wrong)
        return Finding("FAIL", "versions", f"{text}: too old or absent: pip install -U {needed}")
    return Finding("ok", "versions", text)


def _satisfied(requirement: str) -> bool:
    """Whether ``name>=version`` is installed; True of requirements of extras."""
    match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
    if match is None:
        return True
    try:
        installed = importlib.metadata.version(match[1])
    except importlib.metadata.PackageNotFoundError:
        return False
    return _numbers(installed) >= _numbers(match[2])


def _numbers(version: str) -> list[int]:
    release = re.match(r"[\d.]*", version)
    return [int(part) for part in release[0].split(".") if part] if release else []


def check_devices() -> Finding:
    """The devices that JAX uses, and whether an accelerator is left unused."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        text = f"JAX finds no device ({one_line(error)}): check the driver, or set JAX_PLATFORMS"
        return Finding("FAIL", "devices", text)
    first = devices[0]
    memory = (first.memory_stats() or {}).get("bytes_limit")
    size = f", {size_text(memory)} each" if memory else ""
    text = f"{len(devices)} x {first.device_kind}{size}"
    for file, (what, extra) in _ACCELERATORS.items():
        if first.platform == "cpu" and os.path.exists(file):
            cure = f"pip install 'mmljax[{extra}]'"
            return Finding("warn", "devices", f"{text}: {what} is present and not used: {cure}")
    return Finding("ok", "devices", text)


def check_tensorflow() -> Finding:
    """Whether TensorFlow leaves the accelerators to JAX."""
    name = "TensorFlow"
    seen = visible_accelerators()
    if seen is None:
        text = "absent, so only arrays can be read: pip install 'mmljax[data]' for image files"
        return Finding("warn", name, text)
    if seen:
        text = f"sees {', '.join(seen)}: pip install tensorflow-cpu in place of tensorflow"
        return Finding("FAIL", name, text)
    return Finding("ok", name, "sees no accelerator")


def check_workdir(workdir: Path) -> Finding:
    """Whether a checkpoint can be written; folders made for the test are removed again."""
    folder, name = workdir.absolute() / "checkpoints", "workdir"
    made: list[Path] = []
    try:
        made += [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"{folder} cannot be written ({error}): choose another --workdir"
        return Finding("FAIL", name, text)
    finally:
        for path in made:  # the deepest first
            with suppress(OSError):
                path.rmdir()
    return Finding("ok", name, f"{folder} can be written")


def check_disk(workdir: Path, state: TrainState, *, kept: CheckpointConfig) -> Finding:
    """Free disk space against the checkpoints that are kept and the one being written.

    Args:
      workdir: of the run; it may be missing.
      state: the content of a checkpoint.
      kept: how many checkpoints are kept.
    """
    place = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    needed = checkpoint_bytes(state) * (kept.keep_last + kept.keep_best + 1)
    text = f"{size_text(free)} free at {place}, checkpoints take up to {size_text(needed)}"
    if free < needed:
        cure = "make room, lower --config.checkpoint.keep_last, or choose another --workdir"
        return Finding("FAIL", "disk", f"{text}: {cure}")
    return Finding("ok" if free > 2 * needed else "warn", "disk", text)


def checkpoint_bytes(state: TrainState) -> int:
    """Bytes of one checkpoint before compression."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def check_data(config: Config) -> tuple[Finding, Dataset | None]:
    """Whether the data set can be read, and the data set; None where it cannot."""
    try:
        dataset = load.load_dataset(config, create=False)
    except UserError as error:
        if config.data.source == "synthetic":
            text = "the run writes its generated images when it starts; run it once to check more"
            return Finding("skip", "data", text), None
        return Finding("FAIL", "data", str(error)), None
    gallery = "self-retrieval" if dataset.gallery is None else f"{len(dataset.gallery.labels)}"
    text = (
        f"train {len(dataset.train.labels)} images of {dataset.classes} items, "
        f"query {len(dataset.query.labels)}, gallery {gallery}"
    )
    return Finding("ok", "data", text), dataset


def check_config(config: Config, dataset: Dataset) -> tuple[Finding, Trainer | None]:
    """Whether a trainer can be built from the config, and the trainer; None where it cannot."""
    try:
        load.check_batches(dataset, config)
        check_evaluation(dataset, config)
        trainer = make_trainer(
            config,
            classes=dataset.classes,
            channels=load.image_channels(dataset),
            features=load.feature_size(dataset),
            train_examples=len(dataset.train.labels),
            class_sizes=dataset.class_sizes,
            mesh=make_mesh(),
        )
    except UserError as error:
        return Finding("FAIL", "config", str(error)), None
    except jax.errors.JaxRuntimeError as error:
        return Finding("FAIL", "config", f"the state has no room ({one_line(error)})"), None
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params["network"]))
    size = size_text(checkpoint_bytes(trainer.state))
    text = f"{parameters / 1e6:.2f} M parameters in the network, {size} of state"
    return Finding("ok", "config", text), trainer


def check_speed(
    config: Config, dataset: Dataset, trainer: Trainer, workdir: Path, *, seconds: float
) -> Finding:
    """Images per second that the input yields, against those that the steps consume.

    The steps' rate comes from the run in ``workdir`` where there is one, without its input wait;
    otherwise a few steps are timed here.

    Args:
      config: of the run.
      dataset: of it.
      trainer: of it; its state is donated.
      workdir: of it.
      seconds: of timing for each of the two, after their start.
    """
    name = "input against step"
    try:
        made = input_rate(config, dataset, seconds=seconds)
        logged = logged_step_rate(workdir)
        taken = logged or step_rate(config, dataset, trainer, seconds=seconds)
    except UserError as error:
        return Finding("FAIL", name, str(error))
    except jax.errors.JaxRuntimeError as error:
        cure = "lower --config.data.batch_size, or set --config.model.compute_dtype=bfloat16"
        return Finding("FAIL", name, f"a step cannot run ({one_line(error)}): {cure}")
    source = f"in {workdir / writer.METRICS}" if logged else "measured"
    text = f"input {made:.0f} images/s, step {taken:.0f} images/s ({source})"
    if made < taken:
        cure = "raise --config.data.threads, or store the images smaller or as arrays"
        return Finding("warn", name, f"{text}; steps would wait {1 - made / taken:.0%}: {cure}")
    return Finding("ok", name, text)


def input_rate(config: Config, dataset: Dataset, *, seconds: float) -> float:
    """Images per second of the training input alone, at full speed.

    Batches that were prefetched while the input started are left out.
    """
    batches: Any = load.train_batches(dataset, config, make_mesh(), range(1_000_000))
    with closing(batches):
        jax.block_until_ready(next(batches))
        _count(itertools.islice(batches, config.data.prefetch + 1), seconds=seconds)
        count, took = _count(batches, seconds=seconds)
    return count * config.data.batch_size / took


def step_rate(config: Config, dataset: Dataset, trainer: Trainer, *, seconds: float) -> float:
    """Images per second of the compiled step, repeated on one batch."""
    batches: Any = load.train_batches(dataset, config, make_mesh(), range(1))
    with closing(batches):
        batch = next(batches)
    state = trainer.state
    for _ in range(2):  # the second may compile again, on the state that the first returned
        state, _ = jax.block_until_ready(trainer.step(state, batch))

    def steps() -> Iterable[Any]:
        nonlocal state
        while True:
            state, scalars = trainer.step(state, batch)
            yield scalars

    count, took = _count(steps(), seconds=seconds)
    return count * config.data.batch_size / took


def logged_step_rate(workdir: Path) -> float | None:
    """Images per second of the run's steps without input wait; None without timing rows."""
    if not (workdir / writer.METRICS).exists():
        return None
    rows = writer.read_metrics(workdir, kind="rates")
    # The first row includes the compilation.
    rates = [row["images_per_second"] / max(1 - row["input_wait"], 0.01) for row in rows[1:]]
    return statistics.median(rates) if rates else None


def _count(items: Iterable[Any], *, seconds: float) -> tuple[int, float]:
    """How many items arrived in about that time, at least one, and the time taken."""
    begin = time.perf_counter()
    count, took = 0, 0.0
    for item in items:
        jax.block_until_ready(item)
        count, took = count + 1, time.perf_counter() - begin
        if took >= seconds:
            break
    return count, took

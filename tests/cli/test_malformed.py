"""Three hundred malformed inputs: each is named in one error, or skipped and counted."""

from __future__ import annotations

import collections
import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import malformed
import small_runs
from mmljax.config import to_dict
from mmljax.errors import UserError

pytestmark = pytest.mark.slow

SECONDS = 120  # for one input, before it counts as a hang


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise where a call hangs."""

    def stop(*_):
        raise AssertionError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents_of(folder: Path) -> dict[str, str]:
    """A digest of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


FAMILIES = {  # and how many of each
    malformed.in_shop_list: 45,
    malformed.bounding_boxes: 10,
    malformed.csv_list: 40,
    malformed.class_folders: 10,
    malformed.image_evaluated: 20,
    malformed.image_skipped: 15,
    malformed.image_left_out: 20,
    malformed.image_shown: 15,
    malformed.array_file: 25,
    malformed.weight_file: 25,
    malformed.embeddings: 15,
    malformed.config_values: 30,
    malformed.run_config: 10,
    malformed.run_metrics: 10,
    malformed.run_records: 10,
    malformed.checkpoint_read: 10,
    malformed.checkpoint_passed_over: 3,
}


# Where one read of a damaged checkpoint fails, orbax leaves those beside it unfinished.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)
def test_malformed_inputs_are_named_or_skipped_and_counted(saved_run, tmp_path, monkeypatch):
    before = contents_of(saved_run.folder)
    plain, run = {"plain": to_dict(saved_run.config)}, {"run": saved_run.folder}
    needs = {
        malformed.config_values: plain,
        malformed.run_config: plain,
        malformed.run_metrics: plain,
        malformed.checkpoint_read: run,
        malformed.checkpoint_passed_over: {**run, "state": saved_run.states[3]},
    }
    counted: collections.Counter[str] = collections.Counter()
    for number, (family, count) in enumerate(FAMILIES.items()):
        for draw in range(count):
            folder = tmp_path / f"{family.__name__}{draw}"
            folder.mkdir()
            monkeypatch.setattr(malformed.Trap, "sprung", folder / "sprung")
            random = np.random.default_rng([number, draw])
            attempt = family(random, folder, **needs.get(family, {}))
            what = f"{family.__name__}, draw {draw}"
            try:
                with limited(SECONDS):
                    skipped, named = attempt(), ""
            except UserError as error:
                skipped, named = 0, str(error)
            except Exception as error:
                raise AssertionError(f"{what}: a traceback in place of a named error") from error
            assert skipped > 0 or named, f"{what}: taken for sound"
            assert "\n" not in named, what
            counted["named" if named else "skipped"] += 1
            assert not malformed.Trap.sprung.exists(), f"{what}: a pickle ran"
    assert contents_of(saved_run.folder) == before
    print(
        f"\n{counted.total()} malformed inputs: {counted['named']} errors named, "
        f"{counted['skipped']} skipped and counted"
    )
    assert counted.total() >= 300


# The same through the command line: exit code 2, one line, and nothing is touched.

CONFIGS = {
    "syntax": b"def get_config(:\n",
    "raises": b"def get_config():\n    raise RuntimeError('several\\nlines')\n",
    "divides": b"def get_config():\n    return 1 / 0\n",
    "imports": b"import nothing_of_that_name\n",
    "empty": b"",
    "returns_nothing": b"def get_config():\n    pass\n",
    "returns_another": b"def get_config():\n    return {'seed': 0}\n",
    "recursion": b"def get_config():\n    return get_config()\n",
    "binary": b"\xff\xfe\x00\x00",
}
COMMANDS = {
    **{
        f"config_{name}": f"main --config={{tmp}}/{name}.py --workdir={{tmp}}/new"
        for name in CONFIGS
    },
    "config_absent": "main --config={tmp}/absent.py --workdir={tmp}/new",
    "override": "main --config={tmp}/sound.py --config.data.batch_size=many --workdir={tmp}/new",
    "value": "main --config={tmp}/sound.py --config.data.batch_size=-8 --workdir={tmp}/new",
    "data": "main --config={tmp}/sound.py --config.data.directory={tmp}/bad --workdir={tmp}/new",
    "weights": "main --config={tmp}/sound.py --config.model.pretrained={tmp}/bad.pth"
    " --workdir={tmp}/new",
    "run_config": "embed --run={tmp}/run --images {tmp}/1.jpg --output {tmp}/new",
    "records": "compare {tmp}/run {tmp}/run",
    "embeddings": "search --run={tmp}/run --embeddings {tmp}/bad --images {tmp}/1.jpg",
    "page": "page {tmp}/run",
}


@pytest.fixture(scope="module")
def sight(tmp_path_factory):
    """A folder with what the commands are told to read."""
    tmp = tmp_path_factory.mktemp("commands")
    random = np.random.default_rng(0)
    for name, text in CONFIGS.items():
        malformed.put(tmp, f"{name}.py", text)
    small_runs.write_config(tmp / "sound.py", small_runs.write_images(tmp / "images.npz"))
    for name in ("bad", "bad.pth", "1.jpg", "run/config.json", "run/queries.npz"):
        malformed.put(tmp, name, malformed.garbage(random))
    return tmp


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_in_one_line_and_touches_nothing(sight, name):
    before = contents_of(sight)
    words = COMMANDS[name].format(tmp=sight).split()
    done = subprocess.run(
        [sys.executable, "-m", f"mmljax.{words[0]}", *words[1:]],
        cwd=small_runs.ROOT,
        env=small_runs.environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("mmljax: error: ")
    assert contents_of(sight) == before

"""Three hundred malformed inputs: each is named in one error, or skipped and counted."""

from __future__ import annotations

import collections
import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import malformed
import small_runs
from mmljax.cli import main
from mmljax.config import Config, DataConfig, to_dict
from mmljax.errors import UserError
from mmljax.inference.embedding_file import FORMAT, embeddings_table
from mmljax.inference.parquet_parts import METADATA

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'mmljax[offline]'")

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


@pytest.mark.slow
# When a read of a damaged checkpoint fails, orbax leaves the reads beside it unfinished.
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
            assert skipped > 0 or named, f"{what}: was accepted"
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
    "returns_another": b"def get_config():\n    return {'seeds': 0}\n",
    "recursion": b"def get_config():\n    return get_config()\n",
    "binary": b"\xff\xfe\x00\x00",
}
TRAIN = "train --config={tmp}/sound.py --workdir={tmp}/new"
IMAGES = "--images {tmp}/1.jpg --output {tmp}/new"
COMMANDS = {  # the command, and what its line names
    **{
        f"config_{name}": (f"train --config={{tmp}}/{name}.py --workdir={{tmp}}/new", "--config")
        for name in CONFIGS
    },
    "config_absent": ("train --config={tmp}/absent.py --workdir={tmp}/new", "absent.py"),
    "config_long": ("train --config={long}.py --workdir={tmp}/new", "aaa...aaa"),
    "override": (f"{TRAIN} --config.data.batch_size=many", "--config.data.batch_size"),
    "value": (f"{TRAIN} --config.data.batch_size=-8", "--config.data.batch_size"),
    "data": (f"{TRAIN} --config.data.directory={{tmp}}/bad", "bad"),
    "weights": (f"{TRAIN} --config.model.pretrained={{tmp}}/bad.pth", "bad.pth"),
    "workdir_long": ("train --config={tmp}/sound.py --workdir={long}", "aaa...aaa"),
    "workdir_file": ("train --config={tmp}/sound.py --workdir={tmp}/bad", "bad"),
    "run_config": (f"embed {{tmp}}/run {IMAGES}", "config.json"),
    "run_config_list": (f"embed {{tmp}}/list {IMAGES}", "config.json"),
    "run_config_null": ("page {tmp}/null", "config.json"),
    "run_root": (f"embed /1 {IMAGES}", "run /1 "),
    "run_digit": (f"embed \u00b2 {IMAGES}", "run "),
    "run_file": (f"embed {{tmp}}/bad {IMAGES}", "bad"),
    "run_in_file": ("export {tmp}/bad/run --output {tmp}/new", "bad/run"),
    "run_loop": (f"embed {{tmp}}/loop {IMAGES}", "loop"),
    "run_loop_page": ("page {tmp}/loop", "loop"),
    "run_control": (f"embed {{tmp}}/\x1b[31m {IMAGES}", "\\x1b[31m does not exist"),
    "run_not_utf8": (f"embed {{tmp}}/\udcff {IMAGES}", "\\udcff does not exist"),
    **{
        f"run_long_{verb}": (f"{verb} {{long}} {more}", "aaa...aaa")
        for verb, more in {
            "embed": IMAGES,
            "search": f"--embeddings {{embeddings}} {IMAGES}.jsonl",
            "export": "--output {tmp}/new",
            "page": "",
            "atlas": "",
            "threshold": "",
            "interpolate": "",
            "compare": "{long}",
        }.items()
    },
    "output_long": ("embed {saved} --split=query --output {long}", "aaa...aaa"),
    "output_in_file": ("embed {saved} --split=query --output {tmp}/bad/x", "--output"),
    "output_foreign": ("embed {saved} --split=query --output {tmp}/bad", "exists already"),
    "export_file": ("export {saved} --output {tmp}/bad", "--output"),
    "inspect_file": ("inspect {tmp}/bad --output {tmp}/new", "bad"),
    "inspect_long": ("inspect {long} --output {tmp}/new", "folder 'aaa"),
    "export_long": ("export {saved} --output {long}", "--output"),
    "records": ("compare {tmp}/run {tmp}/run", "run"),
    "embeddings": ("search {tmp}/run --embeddings {tmp}/bad --images {tmp}/1.jpg", "bad"),
    "embeddings_long": ("search {saved} --embeddings {long} --split=query", "aaa...aaa"),
    "page": ("page {tmp}/run", "run"),
    "page_typo": ("page {tmp}/synthetic --directory {tmp}/typo", "typo"),
    "atlas_typo": ("atlas {tmp}/synthetic --directory {tmp}/typo", "typo"),
    "prepare_absent": ("prepare {tmp}/absent {tmp}/new", "absent"),
    "prepare_file": ("prepare {tmp} {tmp}/bad", "bad"),
    "prepare_long": ("prepare {tmp} {long}", "aaa...aaa"),
}


@pytest.fixture(scope="module")
def sight(tmp_path_factory):
    """A folder with what the commands read."""
    tmp = tmp_path_factory.mktemp("commands")
    random = np.random.default_rng(0)
    for name, text in CONFIGS.items():
        malformed.put(tmp, f"{name}.py", text)
    small_runs.write_config(tmp / "sound.py", small_runs.write_images(tmp / "images.npz"))
    for name in ("bad", "bad.pth", "1.jpg", "run/config.json", "run/queries.npz"):
        malformed.put(tmp, name, malformed.garbage(random))
    malformed.put(tmp, "list/config.json", b"[]")
    malformed.put(tmp, "null/config.json", b"null")
    synthetic = Config(data=DataConfig(source="synthetic"))
    malformed.put(tmp, "synthetic/config.json", json.dumps(to_dict(synthetic)).encode())
    (tmp / "loop").symlink_to("loop")
    return tmp


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A file of embeddings."""
    table = embeddings_table(np.array(["a", "b"]), np.array([0, 1], np.int32), np.eye(2, 16))
    metadata = {"format": FORMAT, "rows": 2, "embedding_size": 16, "weights": "\x1b[31m"}
    path = tmp_path_factory.mktemp("embeddings") / "e.parquet"
    parquet.write_table(
        table.replace_schema_metadata({METADATA: json.dumps(metadata).encode()}), path
    )
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_in_one_line_and_touches_nothing(
    sight, embeddings, saved_run, name, capsys, monkeypatch
):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = contents_of(sight), contents_of(saved_run.folder)
    command, named = COMMANDS[name]
    places = {"tmp": sight, "long": "a" * 5000, "saved": saved_run.folder, "embeddings": embeddings}
    with limited(SECONDS):
        assert main([word.format(**places) for word in command.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" or command.startswith("prepare")  # TFDS prints what it starts
    (line,) = shown.err.splitlines()
    assert line.startswith("mmljax: error: ")
    assert named in line
    assert len(line) < 1500
    assert (contents_of(sight), contents_of(saved_run.folder)) == before


def test_metadata_of_a_file_is_escaped(saved_run, embeddings, capsys):
    words = "--split=query", "--k=1", "--embeddings", str(embeddings)
    assert main(["search", str(saved_run.folder), *words]) == 2
    assert main(["search", str(saved_run.folder), *words, "--force"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("weights \\x1b[31m, of the run") == 2
    assert "\x1b" not in shown

"""The command line as a user meets it: mistakes are one line on stderr and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import small_runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file over real arrays."""
    directory = tmp_path_factory.mktemp("small")
    return small_runs.write_config(
        directory / "small.py",
        small_runs.write_images(directory / "images.npz"),
        duration="2 steps",
    )


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("mmljax: error:")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == errors[0]
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.data.batchsize=8"], ["batchsize", "batch_size"]),
        (["--config.optimizer.shedule=cosine"], ["shedule", "schedule"]),
        (["--config.optimizer.schedule=cosin"], ["'cosin'", "'cosine'"]),
        (["--config.data.batch_size=many"], ["batch_size", "many"]),
        (["--config.data.batch_size=18"], ["batch_size=18", "images_per_class=4"]),
        (["--config.duration=soon"], ["--config.duration='soon'", "'600 steps'"]),
        (["--config.objectives.pair.loss=circl"], ["'circl'", "'circle'"]),
        (["--config.combination.name=shares"], ["'shares'", "'share'"]),
        (["--config.objectives.pair.mining.rule=any"], ["rule='any'", "either"]),
        (["--config.data.directory=/nowhere/x.npz"], ["/nowhere/x.npz", "--config.data.directory"]),
        (["--config.data.source=album"], ["'album'", "in_shop"]),
        (["--confg=x"], ["confg"]),
        (["extra"], ["'extra'"]),
    ],
)
def test_mistake_is_one_line(
    small: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    assert_refused(small_runs.run(small, tmp_path / "run", *overrides), *words)


def test_batch_that_devices_do_not_divide(small: Path, tmp_path: Path) -> None:
    done = small_runs.run(
        small, tmp_path / "run", "--config.data.batch_size=12", JAX_NUM_CPU_DEVICES="8"
    )
    assert_refused(done, "--config.data.batch_size=12", "8 devices", "use 8")


def write_photographs(directory: Path) -> Path:
    """A folder in In-Shop's layout with a few JPEGs."""
    tf = pytest.importorskip("tensorflow", reason="image files are read by TensorFlow")
    rows = []
    for item in range(6):
        for view in range(4):
            split = "train" if item < 4 else ("query", "gallery")[view % 2]
            name = f"img/WOMEN/Dresses/id_{item:08}/{view:02}_1_front.jpg"
            path = directory / "Img" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((20, 20, 3), 40 * item + view, np.uint8)
            path.write_bytes(tf.io.encode_jpeg(pixels).numpy())
            rows.append(f"{name}   id_{item:08} {split}   ")
    (directory / "Eval").mkdir()
    header = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    (directory / "Eval/list_eval_partition.txt").write_text(header + "\n".join(rows) + "\n")
    return directory


LIST = "Eval/list_eval_partition.txt"
IMAGE = "Img/img/WOMEN/Dresses/id_00000002/01_1_front.jpg"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("directory", ["--config.data.directory", "missing"]),
        ("list", [LIST]),
        ("image", [IMAGE.removeprefix("Img/"), LIST]),
        ("contents", [IMAGE.removeprefix("Img/"), "decode"]),
    ],
)
def test_damaged_data_is_one_line(
    small: Path, tmp_path: Path, damage: str, words: list[str]
) -> None:
    data = write_photographs(tmp_path / "data")
    if damage == "directory":
        data = tmp_path / "missing"
    elif damage == "list":
        (data / LIST).unlink()
    elif damage == "image":
        (data / IMAGE).unlink()
    else:
        (data / IMAGE).write_bytes(b"no image at all")
    done = small_runs.run(
        small,
        tmp_path / "run",
        "--config.data.source=in_shop",
        f"--config.data.directory={data}",
        "--config.data.resize_size=16",
        "--config.evaluation.recall_at=(1,)",
        "--config.evaluation.untrained=False",
    )
    assert_refused(done, *words)


def test_missing_config_file(tmp_path: Path) -> None:
    assert_refused(small_runs.run(tmp_path / "none.py", tmp_path / "run"), "none.py")


def test_workdir_that_cannot_be_made(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(small_runs.run(small, tmp_path / "file/run"), "--workdir", "file/run")


def test_runs_on_eight_devices(small: Path, tmp_path: Path) -> None:
    done = small_runs.run(small, tmp_path / "run", JAX_NUM_CPU_DEVICES="8")
    assert done.returncode == 0, done.stderr
    assert "Recall@1" in done.stdout
    assert "8 x cpu" in done.stderr


def test_help_and_objectives_import_no_tensorflow() -> None:
    """Neither help nor the pure functions may wait for TensorFlow."""
    listing = "; import sys; print(any(m.split('.')[0] == 'tensorflow' for m in sys.modules))"
    for program in (
        "import mmljax.losses.pair, mmljax.losses.proxy, mmljax.losses.mining" + listing,
        "import runpy, sys; sys.argv = ['main', '--help']\n"
        "try:\n runpy.run_module('mmljax.main', run_name='__main__')\n"
        "except SystemExit as end: assert end.code in (0, 1), end.code\n"
        "import sys; print(any(m.split('.')[0] == 'tensorflow' for m in sys.modules))",
    ):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=small_runs.ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip().splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config():\n    raise RuntimeError('two\\nlines')\n", ["line 2", "two lines"]),
        ("def get_config(:\n", ["line 1", "SyntaxError"]),
        ("def get_config():\n    pass\n", ["returned nothing"]),
    ],
)
def test_a_config_that_fails_is_one_line_that_says_where(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    config = tmp_path / "failing.py"
    config.write_text(text)
    done = small_runs.run(config, tmp_path / "run")
    assert_refused(done, "--config", *words)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()

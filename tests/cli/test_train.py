"""``mmljax train``: mistakes in flags, config and data are one line on stderr and exit code 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import small_runs
from mmljax.cli import main
from mmljax.cli import options as shared
from mmljax.cli.command import parse


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file over real arrays."""
    directory = tmp_path_factory.mktemp("small")
    return small_runs.write_config(
        directory / "small.py",
        small_runs.write_images(directory / "images.npz"),
        duration="2 steps",
    )


def train(config: Path, workdir: Path, *overrides: str) -> int:
    """``mmljax train`` in this process."""
    return main(["train", f"--config={config}", f"--workdir={workdir}", *overrides])


def assert_refused(code: int, shown: str, *words: str) -> None:
    assert code == 2, shown
    errors = [line for line in shown.splitlines() if line.startswith("mmljax: error:")]
    assert errors == shown.splitlines()[-1:]
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.data.batchsize=8"], ["batchsize", "batch_size"]),
        (["--config.data.batchsize", "8"], ["batchsize", "batch_size"]),
        (["--config.optimizer.shedule=cosine"], ["shedule", "schedule"]),
        (["--config.optimizer.schedule=cosin"], ["'cosin'", "'cosine'"]),
        (["--config.data.batch_size=many"], ["batch_size", "many"]),
        (["--config.data.batch_size=18"], ["batch_size=18"]),
        (["--config.data.batch_size=12"], ["batch_size=12", "8 devices", "use 8"]),
        (["--config.duration=soon"], ["--config.duration='soon'", "'600 steps'"]),
        (["--config.objectives.pair.loss=circl"], ["'circl'", "'circle'"]),
        (["--config.combination.name=shares"], ["'shares'", "'share'"]),
        (["--config.objectives.pair.mining=any"], ["mining='any'", "either"]),
        (["--config.data.directory=/nowhere/x.npz"], ["/nowhere/x.npz", "--config.data.directory"]),
        (["--config.data.source=album"], ["'album'", "in_shop"]),
        (["--config.data.flip=perhaps"], ["--config.data.flip", "perhaps"]),
    ],
)
def test_mistake_is_one_line(
    small: Path, tmp_path: Path, overrides: list[str], words: list[str], capsys
) -> None:
    code = train(small, tmp_path / "run", *overrides)
    assert_refused(code, capsys.readouterr().err, *words)


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
    small: Path, tmp_path: Path, damage: str, words: list[str], capsys
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
    code = train(
        small,
        tmp_path / "run",
        "--config.data.source=in_shop",
        f"--config.data.directory={data}",
        "--config.data.resize_size=16",
        "--config.evaluation.recall_at=(1,)",
        "--config.evaluation.untrained=False",
    )
    assert_refused(code, capsys.readouterr().err, *words)


def test_workdir_that_cannot_be_made(small: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    code = train(small, tmp_path / "file/run")
    assert_refused(code, capsys.readouterr().err, "--workdir", "file/run")


@pytest.mark.slow
def test_runs_on_eight_devices(small: Path, tmp_path: Path) -> None:
    done = small_runs.run(small, tmp_path / "run", JAX_NUM_CPU_DEVICES="8")
    assert done.returncode == 0, done.stderr
    assert "Recall@1" in done.stdout
    assert "8 x cpu" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config():\n    raise RuntimeError('two\\nlines')\n", ["line 2", "two lines"]),
        ("def get_config(:\n", ["line 1", "SyntaxError"]),
        ("def get_config():\n    pass\n", ["get_config() must return the config, returned None"]),
        ("config = {}\n", ["failing.py defines no get_config()"]),
        (None, ["failing.py", "no such file"]),
    ],
)
def test_a_config_that_fails_is_one_line_that_says_where(
    tmp_path: Path, text: str | None, words: list[str], capsys
) -> None:
    config = tmp_path / "failing.py"
    if text is not None:
        config.write_text(text)
    code = train(config, tmp_path / "run")
    shown = capsys.readouterr().err
    assert_refused(code, shown, "--config", *words)
    assert shown.count("\n") == 1
    assert "config_config" not in shown
    assert not (tmp_path / "run").exists()


def test_a_recipe_by_its_name(capsys) -> None:
    assert_refused(
        main(["train", "--config=quickstar"]), capsys.readouterr().err, "did you mean 'quickstart'"
    )


def test_overrides_without_a_config(capsys) -> None:
    assert_refused(main(["train"]), capsys.readouterr().err, "--config is missing")
    code = main(["train", "--config.seed=1"])
    assert_refused(code, capsys.readouterr().err, "--config.seed=1 overrides no config")


def test_default_workdir_has_the_name_and_the_values_of_the_config(small: Path) -> None:
    def default(*words: str) -> Path:
        options = parse(["train", f"--config={small}", *words])
        return shared.workdir(options, shared.load_config(options))

    assert default().parent == Path("runs")
    assert default().name.startswith("small-")
    assert default() == default("--config.seed=0") != default("--config.seed=1")

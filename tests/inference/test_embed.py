"""Files of embeddings: equal to the trainer's evaluation, complete after any interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

import saved
import small_runs
from commands import run, run_alone
from mmljax.data import load
from mmljax.errors import UserError
from mmljax.inference import embed
from mmljax.inference.parquet_parts import metadata

pytestmark = pytest.mark.usefixtures("loaded_once")


def vectors_of(path: Path) -> np.ndarray:
    return np.array(parquet.read_table(path)["embedding"].to_pylist(), np.float32)


def command(folder: Path, output: Path, *more: str | Path) -> list[str | Path]:
    return ["embed", folder, "--output", output, "--split=query", *more]


@pytest.mark.parametrize("split", ["train", "query", "gallery"])
def test_a_split_has_the_embeddings_of_the_trainers_evaluation(saved_run, tmp_path, split):
    config = saved_run.config
    path = tmp_path / "x.parquet"
    run("embed", saved_run.folder, f"--split={split}", "--step=3", "--output", path)
    images = getattr(load.load_dataset(config), split)
    expected, labels = saved.own_embeddings(saved_run, images, step=3)
    table = parquet.read_table(path)
    assert table.column_names == ["id", "label", "embedding"]
    np.testing.assert_array_equal(vectors_of(path), expected)
    assert table["label"].to_pylist() == labels.tolist()
    assert table["id"].to_pylist() == images.names.tolist()
    found = metadata(path)
    assert (found["run"], found["step"], found["source"]) == ("run", 3, f"split {split}")
    assert (found["rows"], found["left_out"], found["embedding_size"]) == (len(labels), 0, 16)
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[16]"


def test_interrupted_in_the_middle_and_resumed_gives_the_same_bytes(
    saved_run, tmp_path, monkeypatch, capsys
):
    whole, path = tmp_path / "whole.parquet", tmp_path / "x.parquet"
    small = "--rows-per-part=16"  # the split's 24 images are two parts
    run(*command(saved_run.folder, whole, small))
    before, calls = embed.embed_images, []

    def interrupt(trained, split, **options):
        calls.append(len(split.labels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return before(trained, split, **options)

    monkeypatch.setattr(embed, "embed_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(*command(saved_run.folder, path, small))
    assert not path.exists()
    with pytest.raises(UserError, match=r"step: 5 -> 3.*remove it"):
        run(*command(saved_run.folder, path, small, "--step=3"))
    with pytest.raises(UserError, match="source: 'split query' -> 'split gallery'.*digest"):
        run(*command(saved_run.folder, path, small), "--split=gallery")
    run(*command(saved_run.folder, path, small))
    assert calls == [16, 8, 8]  # the first part was not made again
    assert path.read_bytes() == whole.read_bytes()
    assert parquet.ParquetFile(path).num_row_groups == 2
    run(*command(saved_run.folder, path, small))
    assert "complete already" in capsys.readouterr().err
    assert len(calls) == 3


DEFAULT_SIGINT = ("env", "--default-signal=INT")


@pytest.mark.slow
def test_stopped_repeatedly_and_resumed_gives_the_same_bytes(tmp_path):
    images = small_runs.write_images(
        tmp_path / "many.npz", test_items=400
    )  # 1200 queries, 75 parts
    folder = saved.write_run(tmp_path / "files", data__directory=str(images)).folder
    small = "--rows-per-part=16"
    whole, path = tmp_path / "whole.parquet", tmp_path / "x.parquet"
    done = run_alone(*command(folder, whole, small))
    assert done.returncode == 0, done.stderr
    parts = tmp_path / "x.parquet.parts"
    stops = ((5, signal.SIGKILL), (20, signal.SIGINT), (37, signal.SIGKILL), (70, signal.SIGINT))
    for target, number in stops:
        process = subprocess.Popen(
            # A shell's background jobs, and so these tests, ignore SIGINT unless told otherwise.
            [
                *DEFAULT_SIGINT,
                sys.executable,
                "-m",
                "mmljax",
                *map(str, command(folder, path, small)),
            ],
            cwd=small_runs.ROOT,
            env=small_runs.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(parts.glob("part-*.parquet"))) >= target:
                break
            time.sleep(0.001)
        os.kill(process.pid, number)
        shown = process.communicate(timeout=60)[1]
        if number == signal.SIGINT:
            assert shown == "mmljax: interrupted; run the same command again\n"
            assert process.returncode == 130
        else:
            assert process.returncode == -number
        assert not path.exists()
    done = run_alone(*command(folder, path, small))
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == whole.read_bytes()
    assert "1200 embeddings" in done.stderr


def test_a_second_process_with_the_same_output_is_refused(saved_run, tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    before, seconds = embed.embed_images, []

    def embed_twice(trained, split, **options):
        monkeypatch.setattr(embed, "embed_images", before)
        seconds.append(run_alone(*command(saved_run.folder, path)))
        return before(trained, split, **options)

    monkeypatch.setattr(embed, "embed_images", embed_twice)
    assert run(*command(saved_run.folder, path)) == 0
    (second,) = seconds
    assert second.returncode == 2
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert second.stderr.startswith(f"mmljax: error: --output={path} is being written by {holder};")
    assert second.stderr.count("\n") == 1
    assert len(vectors_of(path)) == 24
    assert list(tmp_path.iterdir()) == [path]


def test_arrays_need_no_tensorflow(saved_run, tmp_path):
    blocked = tmp_path / "blocked"
    (blocked / "tensorflow").mkdir(parents=True)
    (blocked / "tensorflow/__init__.py").write_text("raise ImportError('no tensorflow')")
    alone = {"PYTHONPATH": f"{blocked}{os.pathsep}{small_runs.ROOT}"}
    done = run_alone(*command(saved_run.folder, tmp_path / "x.parquet"), **alone)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"24 embeddings in {tmp_path / 'x.parquet'}; 0 images left out\n"


def test_files_for_a_network_of_grey_arrays_are_refused(saved_run, tmp_path):
    with pytest.raises(UserError, match="images of 1 channels"):
        run("embed", saved_run.folder, "--images", tmp_path, "--output=x.parquet")


def test_an_embedding_that_is_not_finite_is_named(saved_run):
    trained = saved.load_once(saved_run.folder)
    broken = trained._replace(embed=lambda images: np.full((len(images), 16), np.nan))
    query = load.load_dataset(saved_run.config).query
    with pytest.raises(UserError, match=r"images\[72\] is not finite"):
        embed.embed_images(broken, query, skip_corrupt=False)


# Files.


def test_a_folder_gives_what_evaluation_gives_of_the_same_files(colour_run, tmp_path):
    config = colour_run.config
    images, path = Path(config.data.directory), tmp_path / "x.parquet"
    run("embed", colour_run.folder, "--images", images, "--output", path)
    table = parquet.read_table(path)
    names = table["id"].to_pylist()
    assert names == sorted(names)
    assert len(names) == 24
    assert set(table["label"].to_pylist()) == {None}
    found = dict(zip(names, vectors_of(path), strict=True))
    dataset = load.load_dataset(config)
    for split in (dataset.train, dataset.query, dataset.gallery):
        expected, _ = saved.own_embeddings(colour_run, split, step=5)
        got = np.stack([found[name] for name in split.names])
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_corrupt_image_is_named_or_left_out_and_counted(colour_run, tmp_path, capsys):
    images = Path(colour_run.config.data.directory)
    folder = tmp_path / "folder"
    folder.mkdir()
    good = sorted(images.rglob("*.jpg"))[:4]
    for number, file in enumerate(good):
        (folder / f"{number}.jpg").write_bytes(file.read_bytes())
    options = ["embed", colour_run.folder, "--images", folder]
    run(*options, "--output", tmp_path / "good.parquet")
    (folder / "15.JPG").write_bytes(good[0].read_bytes()[:40])
    (folder / "25.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not counted")
    (folder / ".hidden.jpg").write_bytes(b"")
    output = ["--output", tmp_path / "x.parquet"]
    with pytest.raises(UserError, match=r"image 15\.JPG .* --skip-corrupt"):
        run(*options, *output)
    with pytest.raises(UserError, match="skip_corrupt: False -> True"):
        run(*options, *output, "--skip-corrupt")
    output = ["--output", tmp_path / "y.parquet"]
    run(*options, *output, "--skip-corrupt")
    table = parquet.read_table(tmp_path / "y.parquet")
    assert table["id"].to_pylist() == [f"{n}.jpg" for n in range(4)]
    np.testing.assert_allclose(
        vectors_of(tmp_path / "y.parquet"), vectors_of(tmp_path / "good.parquet"), atol=1e-6
    )
    found = metadata(tmp_path / "y.parquet")
    assert (found["images"], found["rows"], found["left_out"]) == (6, 4, 2)
    shown = capsys.readouterr().err
    assert "left out: 15.JPG" in shown
    assert "4 embeddings" in shown
    assert "2 images left out" in shown


def test_bad_paths(colour_run, tmp_path):
    options = ["embed", colour_run.folder, "--output", tmp_path / "x.parquet", "--images"]
    with pytest.raises(UserError, match="does not exist"):
        run(*options, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        run(*options, tmp_path / "empty")
    with pytest.raises(UserError, match="--images: aaa"):
        run(*options, "a" * 5000)
    (tmp_path / "empty/\udcff.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"\\udcff\.jpg"):
        run(*options, tmp_path / "empty")
    (tmp_path / "empty/\udcff.jpg").unlink()
    (tmp_path / "empty/bad.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        run(*options, tmp_path / "empty", "--skip-corrupt")


def test_several_paths_keep_their_names(colour_run, tmp_path, monkeypatch):
    from mmljax.data.readers.image_files import list_images

    monkeypatch.chdir(colour_run.config.data.directory)
    found = list_images(["img/item1", "img/item0/view_0.jpg"], flag="--images")
    assert found.names.tolist() == [
        *(f"img/item1/view_{v}.{'png' if v % 2 else 'jpg'}" for v in range(4)),
        "img/item0/view_0.jpg",
    ]
    assert all(Path(image).is_file() for image in found.images)


def test_progress_counts_every_image_once(colour_run, tmp_path):
    from mmljax.data.readers.image_files import list_images

    files = sorted(Path(colour_run.config.data.directory).rglob("*.jpg"))
    for number in range(40):
        (tmp_path / f"{number:02d}.jpg").write_bytes(files[number % len(files)].read_bytes())
    (tmp_path / "39.jpg").write_bytes(b"no image")  # in the last of three batches
    steps = []
    split = list_images([tmp_path], flag="--images")
    trained = saved.load_once(colour_run.folder)
    kept, _ = embed.embed_images(trained, split, skip_corrupt=True, advance=steps.append)
    assert len(kept.names) == 39
    assert sum(steps) == 40

"""What TFDS prepared of CUB-200-2011, Cars196 and Stanford Online Products, split by classes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the data sets are prepared by TFDS")

import tensorflow as tf

import fake_tfds
import small_runs
from mmljax import config as config_lib
from mmljax.data.readers import tfds as tfds_sources
from mmljax.data.readers.tfds import read_tfds
from mmljax.errors import UserError
from mmljax.training.loop import train

SETS = {  # classes of TFDS's splits, and of ours
    "caltech_birds2011": ({"train": [9, 99, 150], "test": [9, 100, 150]}, [9, 99], [100, 150]),
    "cars196": ({"train": [7, 97, 99], "test": [7, 98, 99]}, [7, 97], [98, 99]),
    "stanford_online_products": ({"train": [3, 7], "test": [200, 101]}, [3, 7], [101, 200]),
}
every_set = pytest.mark.parametrize("name", SETS)


def values(images: Any) -> list[int]:
    """The classes of images by their brightness."""
    return [int(tf.io.decode_image(image).numpy()[0, 0, 0]) for image in images]


@every_set
@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_first_classes_train_and_the_others_test(
    tmp_path: Path, name: str, file_format: str
) -> None:
    splits, train_classes, test_classes = SETS[name]
    fake_tfds.prepare(name, tmp_path, splits, file_format=file_format)
    data = read_tfds(name, tmp_path, check_counts=False)
    assert (data.classes, data.gallery) == (2, None)
    images = 0
    for split, classes in ((data.train, train_classes), (data.query, test_classes)):
        shown = values(split.images)
        assert sorted(set(shown)) == classes
        assert [classes[label] for label in split.labels] == shown
        assert len(set(split.names.tolist())) == len(split.names) == len(split.labels)
        assert all(isinstance(image, bytes) for image in split.images)
        if name == "caltech_birds2011":
            assert [int(n.split("_")[1]) for n in split.names] == shown
        images += len(split.labels)
    assert images == sum(map(len, splits.values()))


def test_stored_images_are_read_when_asked_for_and_index_as_an_array(tmp_path: Path) -> None:
    splits = {"train": range(8), "test": range(100, 104)}
    fake_tfds.prepare("caltech_birds2011", tmp_path, splits, file_format="array_record")
    split = read_tfds("caltech_birds2011", tmp_path, check_counts=False).train
    assert isinstance(split.images, tfds_sources.StoredImages)
    assert (len(split.images), split.images.ndim) == (8, 1)
    shown = values(split.images)
    for index in (slice(2, 5), split.labels > 4, np.array([7, 0, -1])):
        assert values(split.images[index]) == np.array(shown)[index].tolist()
        assert values(split.images[index][::-1]) == np.array(shown)[index][::-1].tolist()
    assert values([split.images[-1], split.images[np.int64(1)]]) == [shown[-1], shown[1]]
    with pytest.raises(IndexError):
        split.images[8]


@every_set
def test_other_counts_than_the_benchmarks_are_refused(tmp_path: Path, name: str) -> None:
    fake_tfds.prepare(name, tmp_path, SETS[name][0])
    wanted = {"caltech_birds2011": "5864 of 100", "cars196": "8054 of 98"}
    text = wanted.get(name, "59551 of 11318")
    with pytest.raises(
        UserError, match=rf"\d train images of 2 classes, but {name} has {text}; .*check_counts=F"
    ):
        read_tfds(name, tmp_path)


def test_counts_add_up_to_those_of_the_whole_sets() -> None:
    """The sizes of the data sets as their authors give them."""
    totals = {"caltech_birds2011": 11_788, "cars196": 16_185, "stanford_online_products": 120_053}
    for name, images in totals.items():
        assert sum(count for count, _ in tfds_sources.LAYOUTS[name].counts) == images


def test_the_benchmarks_counts_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tfds.prepare("cars196", tmp_path, SETS["cars196"][0])
    layout = tfds_sources.LAYOUTS["cars196"]
    for counts, fits in ((((3, 2), (3, 2)), True), (((3, 2), (4, 2)), False)):
        monkeypatch.setitem(tfds_sources.LAYOUTS, "cars196", layout._replace(counts=counts))
        if fits:
            assert len(read_tfds("cars196", tmp_path).train.labels) == 3
        else:
            with pytest.raises(UserError, match="3 test images of 2 classes, but cars196 has 4 of"):
                read_tfds("cars196", tmp_path)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_damaged_files_are_named(tmp_path: Path, file_format: str) -> None:
    splits = {"train": range(8), "test": range(100, 104)}
    fake_tfds.prepare("caltech_birds2011", tmp_path, splits, file_format=file_format)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for contents in (whole[: len(whole) // 2], b"", b"\xff" * len(whole), None):
            path.unlink() if contents is None else path.write_bytes(contents)
            with pytest.raises(UserError, match="prepare it.*: tfds build caltech_birds") as error:
                read_tfds("caltech_birds2011", tmp_path, check_counts=False)
            assert "\n" not in str(error.value)
        path.write_bytes(whole)


def test_an_image_of_a_damaged_record_is_named() -> None:
    class Damaged:
        def __getitem__(self, row: int) -> dict[str, bytes]:
            raise RuntimeError("chunk header\nhash mismatch")

    images = tfds_sources.StoredImages(Damaged(), np.array([4, 7]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"image 7 of an ArrayRecord file .*\(chunk header hash"):
        images[1]


@every_set
def test_a_set_that_is_not_prepared(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"no prepared TFDS data set '{name}'; .*tfds build {name}"):
        read_tfds(name, tmp_path)


def test_an_unknown_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'cars196'"):
        read_tfds("cars", tmp_path)


CONFIGS = {
    "cub": ("caltech_birds2011", {"train": [*range(4), 100, 101], "test": [2, 3, 102, 103]}),
    "cars": ("cars196", {"train": [*range(4), 100, 101], "test": [2, 3, 102, 103]}),
    "sop": ("stanford_online_products", {"train": range(4), "test": range(10, 14)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_train_and_evaluate(tmp_path: Path, name: str) -> None:
    builder_name, splits = CONFIGS[name]
    kind = {"file_format": "array_record" if name == "cub" else "tfrecord"}
    fake_tfds.prepare(builder_name, tmp_path / "tfds", splits, views=3, size=20, **kind)
    mapping = importlib.import_module(f"configs.{name}").get_config()
    mapping.update_from_flattened_dict(
        {
            "duration": "2 steps",
            "data.directory": str(tmp_path / "tfds"),
            "data.check_counts": False,
            "data.image_size": 16,
            "data.resize_size": 16,
            "data.batch_size": 8,
            "data.eval_batch_size": 8,
            "model.backbone": "small",
            "model.width": 8,
            "model.embedding_size": 16,
            "model.compute_dtype": "float32",
            "evaluation.recall_at": (1, 2),
            "evaluation.geometry": False,
            "log.tensorboard": False,
            "log.plot": False,
        }
    )
    results = train(config_lib.from_mapping(mapping), tmp_path / "run")
    assert results["scores"]["step"] == 2
    assert results["protocol"]["gallery"] == "the other queries"
    assert (results["protocol"]["queries"], results["protocol"]["items"]) == (12, 4)
    assert 0 <= results["scores"]["recall@1"] <= 1
    steps = [line for line in small_runs.metrics(tmp_path / "run") if '"kind": "train"' in line]
    assert len(steps) == 2
